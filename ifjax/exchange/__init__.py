"""4-bit weights as other tools store them, in and out."""

from ifjax.arrays.ml_dtypes import from_ml_dtypes, to_ml_dtypes
from ifjax.exchange.layouts import LAYOUTS, TOOLS, Layout
from ifjax.exchange.read import import_tensors, load
from ifjax.exchange.swizzle import swizzle_scales, unswizzle_scales
from ifjax.exchange.write import export_tensor, export_tensors, save

__all__ = [
    "LAYOUTS", "TOOLS", "Layout", "export_tensor", "export_tensors", "from_ml_dtypes", "import_tensors", "load", "save",
    "swizzle_scales", "to_ml_dtypes", "unswizzle_scales",
]  # fmt: skip
