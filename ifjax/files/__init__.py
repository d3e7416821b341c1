"""Files of packed arrays: checkpoints, Orbax's folders, and conversion from file to file."""

from ifjax.files.checkpoint import Checkpoint, load_file, open_file, save_file
from ifjax.files.convert import Plan, contents, dequantize_file, plan, quantize_file
from ifjax.files.orbax import describe, load_orbax, rebuild, save_orbax
from ifjax.files.safetensors import FileError, StoredTensor, read_header
from ifjax.files.verify import Verified, verify

__all__ = [
    "Checkpoint", "FileError", "Plan", "StoredTensor", "Verified", "contents", "dequantize_file", "describe",
    "load_file", "load_orbax", "open_file", "plan", "quantize_file", "read_header", "rebuild", "save_file",
    "save_orbax", "verify",
]  # fmt: skip
