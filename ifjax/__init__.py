"""Adaptive block-scaled number formats for JAX.

Quantize:    quantize, dequantize, fake_quantize, QTensor
Formats:     FORMATS, get_format, Format, Candidate, Grid, Scale
Multiply:    dot_general, einsum, matmul, ragged_dot, explain_matmul, prepack
Models:      quantize_params, fake_quantize_params, gptq, trainable_mask, Report
             Rule, default_rules, load_rules, save_rules
Training:    quantized_dot_general, recipes, ms_eden, training_report, optim
Flax:        quantized, interceptors, calibrate, PackedParam, with_recipes (these import flax when first used)
Rotate:      hadamard, inverse_hadamard, random_signs
Place:       device_put, shardings
Store:       save_file, load_file, open_file (safetensors; checkpoint has Orbax's, convert works file to file)
Exchange:    exchange, to_ml_dtypes, swizzle_scales, unswizzle_scales
Hardware:    mac (IF4 and NVFP4 multiply-accumulate units)
Look:        analysis, plots (imports matplotlib)
"""

import importlib
from typing import TYPE_CHECKING, Any

from ifjax import mac, recipes
from ifjax._gptq import gptq
from ifjax._hadamard import hadamard, inverse_hadamard, random_signs
from ifjax._kernels import Prepacked, prepack
from ifjax._matmul import dot_general, einsum, explain_matmul, matmul, ragged_dot
from ifjax._mseden import ms_eden
from ifjax.checkpoint import load_file, open_file, save_file
from ifjax.formats import FORMATS, Candidate, Format, get_format
from ifjax.grids import Grid
from ifjax.layouts import swizzle_scales, unswizzle_scales
from ifjax.ptq import fake_quantize_params, quantize_params, trainable_mask, training_report
from ifjax.qtensor import QTensor, dequantize, device_put, fake_quantize, quantize, shardings, to_ml_dtypes
from ifjax.recipes import quantized_dot_general
from ifjax.report import Report
from ifjax.rules import Rule, default_rules, load_rules, save_rules
from ifjax.scales import Scale

if TYPE_CHECKING:
    from ifjax import optim
    from ifjax.flax import interceptors
    from ifjax.flax.calibration import Calibration, calibrate
    from ifjax.flax.interceptors import quantized
    from ifjax.flax.nnx import PackedParam, with_recipes

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Calibration",
    "Candidate",
    "Format",
    "Grid",
    "PackedParam",
    "Prepacked",
    "QTensor",
    "Report",
    "Rule",
    "Scale",
    "calibrate",
    "default_rules",
    "dequantize",
    "device_put",
    "dot_general",
    "einsum",
    "explain_matmul",
    "fake_quantize",
    "fake_quantize_params",
    "get_format",
    "gptq",
    "hadamard",
    "interceptors",
    "inverse_hadamard",
    "load_file",
    "load_rules",
    "mac",
    "matmul",
    "ms_eden",
    "open_file",
    "optim",
    "prepack",
    "quantize",
    "quantize_params",
    "quantized",
    "quantized_dot_general",
    "ragged_dot",
    "random_signs",
    "recipes",
    "save_file",
    "save_rules",
    "shardings",
    "swizzle_scales",
    "to_ml_dtypes",
    "trainable_mask",
    "training_report",
    "unswizzle_scales",
    "with_recipes",
]

_IN_FLAX = {
    "optim": "ifjax.optim",
    "interceptors": "ifjax.flax.interceptors",
    "quantized": "ifjax.flax.interceptors",
    "calibrate": "ifjax.flax.calibration",
    "Calibration": "ifjax.flax.calibration",
    "PackedParam": "ifjax.flax.nnx",
    "with_recipes": "ifjax.flax.nnx",
}


def __getattr__(name: str) -> Any:
    """What imports flax, when it is asked for."""
    if name not in _IN_FLAX:
        raise AttributeError(f"module 'ifjax' has no attribute {name!r}")
    try:
        module = importlib.import_module(_IN_FLAX[name])
    except ImportError as error:
        raise ImportError(f"ifjax.{name} needs flax and optax: pip install 'ifjax[flax]'") from error
    return module if name in ("interceptors", "optim") else getattr(module, name)
