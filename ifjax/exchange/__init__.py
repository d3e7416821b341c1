"""4-bit weights as other tools store them, in and out.

    names, types, shapes -> recognize -> layout.read -> QTensors
    QTensors -> layout.write -> arrays, configuration

A layout is a record (`Layout`), and one reader and one writer serve all of them: `LAYOUTS.register` adds a tool's.
"""

from ifjax.arrays.ml_dtypes import from_ml_dtypes, to_ml_dtypes
from ifjax.exchange.containers import Source, open_checkpoint, parts_of_quantized
from ifjax.exchange.fused import FUSED, common_amax, fused_groups
from ifjax.exchange.layouts import (
    LAYOUTS,
    Blocks,
    Declared,
    Floats,
    InputFactor,
    Layout,
    Model,
    Part,
    Size,
    Spec,
    layouts_of,
)
from ifjax.exchange.load import load
from ifjax.exchange.read import import_tensors
from ifjax.exchange.recast import recast
from ifjax.exchange.recognize import Found, companions, declared, recognize
from ifjax.exchange.swizzle import swizzle_scales, unswizzle_scales
from ifjax.exchange.tools import TOOLS
from ifjax.exchange.write import export_tensor, export_tensors, save

__all__ = [
    "FUSED", "LAYOUTS", "TOOLS", "Blocks", "Declared", "Floats", "Found", "InputFactor", "Layout", "Model", "Part",
    "Size", "Source", "Spec", "common_amax", "companions", "declared", "export_tensor", "export_tensors",
    "from_ml_dtypes", "fused_groups", "import_tensors", "layouts_of", "load", "open_checkpoint",
    "parts_of_quantized", "recast", "recognize", "save", "swizzle_scales", "to_ml_dtypes", "unswizzle_scales",
]  # fmt: skip
