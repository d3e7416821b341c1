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

from ifjax.arrays.gptq import gptq
from ifjax.arrays.ms_eden import ms_eden
from ifjax.arrays.qtensor import QTensor, dequantize, device_put, shardings, to_ml_dtypes
from ifjax.arrays.quantize import fake_quantize, quantize
from ifjax.exchange.swizzle import swizzle_scales, unswizzle_scales
from ifjax.files.checkpoint import load_file, open_file, save_file
from ifjax.formats import FORMATS, Candidate, Format, get_format
from ifjax.formats.grids import Grid
from ifjax.formats.scales import Scale
from ifjax.measure import mac
from ifjax.models.ptq import fake_quantize_params, quantize_params, trainable_mask, training_report
from ifjax.models.report import Report
from ifjax.models.rule_files import load_rules, save_rules
from ifjax.models.rules import Rule, default_rules
from ifjax.numerics.hadamard import hadamard, inverse_hadamard, random_signs
from ifjax.products.dot_general import dot_general
from ifjax.products.einsum import einsum, matmul
from ifjax.products.kernels import Prepacked, prepack
from ifjax.products.plan import explain_matmul
from ifjax.products.ragged import ragged_dot
from ifjax.training import recipes
from ifjax.training.product import quantized_dot_general

if TYPE_CHECKING:
    from ifjax.models.flax import interceptors
    from ifjax.models.flax.calibration import Calibration, calibrate
    from ifjax.models.flax.interceptors import quantized
    from ifjax.models.flax.nnx import PackedParam, with_recipes
    from ifjax.training import optim

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
    "optim": "ifjax.training.optim",
    "interceptors": "ifjax.models.flax.interceptors",
    "quantized": "ifjax.models.flax.interceptors",
    "calibrate": "ifjax.models.flax.calibration",
    "Calibration": "ifjax.models.flax.calibration",
    "PackedParam": "ifjax.models.flax.nnx",
    "with_recipes": "ifjax.models.flax.nnx",
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
