"""Files of packed arrays: safetensors checkpoints and Orbax checkpoints."""

from ifjax.files.checkpoint import Checkpoint, open_file, save_file
from ifjax.files.load import load_file
from ifjax.files.names import NameRule
from ifjax.files.orbax import describe, load_orbax, rebuild, save_orbax
from ifjax.files.safetensors import FileError, StoredTensor, read_header

__all__ = [
    "Checkpoint", "FileError", "NameRule", "StoredTensor", "describe", "load_file", "load_orbax", "open_file",
    "read_header", "rebuild", "save_file", "save_orbax",
]  # fmt: skip
