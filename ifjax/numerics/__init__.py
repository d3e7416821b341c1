"""Arithmetic below formats: exact division, packing of codes, Hadamard rotation."""

from ifjax.numerics.hadamard import hadamard, inverse_hadamard, random_signs
from ifjax.numerics.packing import pack, unpack
from ifjax.numerics.xla import divide

__all__ = ["divide", "hadamard", "inverse_hadamard", "pack", "random_signs", "unpack"]
