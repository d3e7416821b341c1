"""Checkpoints from file to file, tensor by tensor and piece by piece: memory does not grow with them."""

from ifjax.convert.dequantize import contents, dequantize_file
from ifjax.convert.quantize import Plan, plan, quantize_file
from ifjax.convert.verify import Verified, verify

__all__ = ["Plan", "Verified", "contents", "dequantize_file", "plan", "quantize_file", "verify"]
