"""Format-independent arithmetic: exact division, packing of codes, Hadamard rotation, and the kernel policy."""

from ifjax.numerics.hadamard import hadamard, inverse_hadamard, random_signs
from ifjax.numerics.kernels import kernels
from ifjax.numerics.packing import pack, unpack
from ifjax.numerics.xla import divide

__all__ = ["divide", "hadamard", "inverse_hadamard", "kernels", "pack", "random_signs", "unpack"]
