"""Adaptive block-scaled number formats for JAX.

Quantize:    quantize, dequantize, fake_quantize, QTensor
Formats:     FORMATS, get_format, Format, Candidate, Grid, Scale
Multiply:    dot_general, einsum, matmul, ragged_dot, explain_matmul, prepack
Rotate:      hadamard, inverse_hadamard, random_signs
Place:       device_put, shardings
Exchange:    to_ml_dtypes, swizzle_scales, unswizzle_scales
Hardware:    mac (IF4 and NVFP4 multiply-accumulate units)
"""

from ifjax import mac
from ifjax._hadamard import hadamard, inverse_hadamard, random_signs
from ifjax._kernels import Prepacked, prepack
from ifjax._matmul import dot_general, einsum, explain_matmul, matmul, ragged_dot
from ifjax.formats import FORMATS, Candidate, Format, get_format
from ifjax.grids import Grid
from ifjax.layouts import swizzle_scales, unswizzle_scales
from ifjax.qtensor import QTensor, dequantize, device_put, fake_quantize, quantize, shardings, to_ml_dtypes
from ifjax.scales import Scale

__version__ = "0.1.0"

__all__ = [
    "FORMATS",
    "Candidate",
    "Format",
    "Grid",
    "Prepacked",
    "QTensor",
    "Scale",
    "dequantize",
    "device_put",
    "dot_general",
    "einsum",
    "explain_matmul",
    "fake_quantize",
    "get_format",
    "hadamard",
    "inverse_hadamard",
    "mac",
    "matmul",
    "prepack",
    "quantize",
    "ragged_dot",
    "random_signs",
    "shardings",
    "swizzle_scales",
    "to_ml_dtypes",
    "unswizzle_scales",
]
