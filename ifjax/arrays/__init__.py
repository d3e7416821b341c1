"""QTensor, and functions that quantize, dequantize, slice, join and shard quantized arrays."""

from ifjax.arrays.blocking import DTYPES, Blocking, packed_shapes
from ifjax.arrays.encoders import ENCODERS, Encoder, Explanation, explain_quantize
from ifjax.arrays.gptq import gptq
from ifjax.arrays.learn import learn_format
from ifjax.arrays.ms_eden import ms_eden
from ifjax.arrays.qtensor import QTensor, dequantize
from ifjax.arrays.quantize import fake_quantize, quantize
from ifjax.arrays.sharding import device_put, shardings
from ifjax.arrays.updates import concatenate, dynamic_slice, dynamic_update_slice, stack

__all__ = [
    "DTYPES", "ENCODERS", "Blocking", "Encoder", "Explanation", "QTensor", "concatenate", "dequantize", "device_put",
    "dynamic_slice", "dynamic_update_slice", "explain_quantize", "fake_quantize", "gptq", "learn_format", "ms_eden",
    "packed_shapes", "quantize", "shardings", "stack",
]  # fmt: skip
