"""Adaptive block-scaled number formats for JAX.

Quantize:    quantize, dequantize, fake_quantize, explain_quantize, kernels, QTensor
Rearrange:   dynamic_slice, dynamic_update_slice, concatenate, stack (QTensor also has array methods)
Formats:     FORMATS, get_format, learn_format, Format, Candidate, Grid, Scale, TableScale
Multiply:    dot_general, einsum, matmul, ragged_dot, explain_matmul, prepack
Models:      quantize_params, fake_quantize_params, calibrate, quantized, trace_products, Site, gptq, trainable_mask
             fold_params, Report, plan_formats, FormatPlan, Rule, default_rules, load_rules, save_rules
Serve:       PackedCache, pack_cache
Training:    quantized_dot_general, recipes, ms_eden, training_report, optim, lora, partition, combine
Flax:        interceptors, PackedParam, with_recipes (import flax on first use)
Rotate:      hadamard, inverse_hadamard, random_signs
Place:       device_put, shardings
Store:       save_file, load_file, open_file (safetensors), convert (file to file), checkpoint (including Orbax)
Exchange:    exchange (layouts of other tools)
Look:        analysis (errors), evaluate (compare a model with its packed version), plots (imports matplotlib)
Hardware:    mac (IF4 and NVFP4 multiply-accumulate units)

Subpackages, from the lowest layer to the highest: numerics, formats, codec, arrays, products, training, models, files,
exchange, convert, measure, cli.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ifjax.arrays import (
    QTensor,
    concatenate,
    dequantize,
    device_put,
    dynamic_slice,
    dynamic_update_slice,
    explain_quantize,
    fake_quantize,
    gptq,
    learn_format,
    ms_eden,
    quantize,
    shardings,
    stack,
)
from ifjax.files import NameRule, load_file, open_file, save_file
from ifjax.formats import FORMATS, Candidate, Format, Grid, Scale, TableScale, get_format
from ifjax.models import (
    FormatPlan,
    Report,
    Rule,
    Site,
    combine,
    default_rules,
    fake_quantize_params,
    fold_params,
    load_rules,
    pack_cache,
    partition,
    plan_formats,
    quantize_params,
    quantized,
    save_rules,
    trace_products,
    trainable_mask,
    training_report,
)
from ifjax.numerics import hadamard, inverse_hadamard, kernels, random_signs
from ifjax.products import PackedCache, Prepacked, dot_general, einsum, explain_matmul, matmul, prepack, ragged_dot
from ifjax.training import quantized_dot_general
from ifjax.version import __version__

if TYPE_CHECKING:
    from ifjax import convert, exchange
    from ifjax import measure as analysis
    from ifjax import training as recipes
    from ifjax.files import checkpoint
    from ifjax.measure import evaluate, mac, plots
    from ifjax.models import lora
    from ifjax.models.calibration import Calibration, calibrate
    from ifjax.models.flax import interceptors
    from ifjax.models.flax.nnx import PackedParam, with_recipes
    from ifjax.training import optim

__all__ = [
    "FORMATS",
    "Calibration",
    "Candidate",
    "Format",
    "FormatPlan",
    "Grid",
    "NameRule",
    "PackedCache",
    "PackedParam",
    "Prepacked",
    "QTensor",
    "Report",
    "Rule",
    "Scale",
    "Site",
    "TableScale",
    "__version__",
    "analysis",
    "calibrate",
    "checkpoint",
    "combine",
    "concatenate",
    "convert",
    "default_rules",
    "dequantize",
    "device_put",
    "dot_general",
    "dynamic_slice",
    "dynamic_update_slice",
    "einsum",
    "evaluate",
    "exchange",
    "explain_matmul",
    "explain_quantize",
    "fake_quantize",
    "fake_quantize_params",
    "fold_params",
    "get_format",
    "gptq",
    "hadamard",
    "interceptors",
    "inverse_hadamard",
    "kernels",
    "learn_format",
    "load_file",
    "load_rules",
    "lora",
    "mac",
    "matmul",
    "ms_eden",
    "open_file",
    "optim",
    "pack_cache",
    "partition",
    "plan_formats",
    "plots",
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
    "stack",
    "trace_products",
    "trainable_mask",
    "training_report",
    "with_recipes",
]

# Modules that are imported on first access, each with the pip extra that it needs.
_LAZY_MODULES = {
    "analysis": ("ifjax.measure", None),
    "checkpoint": ("ifjax.files", None),
    "convert": ("ifjax.convert", None),
    "exchange": ("ifjax.exchange", None),
    "interceptors": ("ifjax.models.flax.interceptors", "flax"),
    "lora": ("ifjax.models.lora", None),
    "mac": ("ifjax.measure.mac", None),
    "optim": ("ifjax.training.optim", "flax"),
    "plots": ("ifjax.measure.plots", None),
    "recipes": ("ifjax.training", None),
}
_LAZY_NAMES = {
    "Calibration": "ifjax.models.calibration",
    "PackedParam": "ifjax.models.flax.nnx",
    "calibrate": "ifjax.models.calibration",
    "evaluate": "ifjax.measure.evaluation",
    "with_recipes": "ifjax.models.flax.nnx",
}


def __getattr__(name: str) -> Any:
    """Import a lazy name on first access, so that `import ifjax` is fast and works without extras."""
    if name not in _LAZY_MODULES and name not in _LAZY_NAMES:
        raise AttributeError(f"module 'ifjax' has no attribute {name!r}")
    module, extra = _LAZY_MODULES.get(name) or (_LAZY_NAMES[name], "flax")
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        if extra is None:
            raise
        raise ImportError(f"ifjax.{name} needs flax and optax: pip install 'ifjax[{extra}]'") from error
    return imported if name in _LAZY_MODULES else getattr(imported, name)
