"""Checkpoints from file to file, tensor by tensor and piece by piece: memory does not grow with them."""

from ifjax.convert.dequantize import contents, dequantize_file
from ifjax.convert.incoming import held, plan_import
from ifjax.convert.outgoing import plan_export
from ifjax.convert.quantize import Plan, plan, quantize_file
from ifjax.convert.transfer import Transfer
from ifjax.convert.verify import Verified, verify

__all__ = [
    "Plan", "Transfer", "Verified", "contents", "dequantize_file", "held", "plan", "plan_export", "plan_import",
    "quantize_file", "verify",
]  # fmt: skip
