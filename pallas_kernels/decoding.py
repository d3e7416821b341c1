"""Records that describe a 4-bit format to a kernel: sign and magnitude, or tables of sixteen arbitrary values."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The decoding of a sign-magnitude nibble and its block's scale byte to a weight.

        weight = +-magnitudes[mode][nibble & 7] * multipliers[mode] * scale(byte)

    Bit 3 of the nibble is the sign. With two modes, bit 7 of the scale byte selects the mode and the other bits are the
    scale. With one mode there is no selector, and bit 7 of an E4M3 byte is the scale's sign. A NaN byte (E4M3 0x7F,
    0xFF; E8M0 0xFF) turns the whole block into NaN. E8M0 byte 0 turns it into zeros.

    Multipliers are small integers, so that magnitude * multiplier * E4M3 scale is exact in float16. The caller divides
    the product once by their common denominator (IF4: 7 for multipliers 7 and 6, steps 1 and 6/7), in the same factor
    as the tensor scale.

    Attributes:
        magnitudes: for each mode, the eight magnitudes of codes 0 to 7, ascending from 0; each has at most three
            significant bits, so that it fits the upper byte of a float16.
        multipliers: for each mode, an integer.
        scale: "e4m3" (4 exponent bits, bias 7, no infinity) or "e8m0" (a power of two, bias 127).
        block: number of consecutive weights along K that share a scale byte: 8, 16 or 32.
    """

    magnitudes: tuple[tuple[float, ...], ...]
    multipliers: tuple[int, ...]
    scale: Literal["e4m3", "e8m0"]
    block: int

    def __post_init__(self):
        if len(self.magnitudes) not in (1, 2) or len(self.multipliers) != len(self.magnitudes):
            raise ValueError(f"one or two modes, each with a multiplier: got {self.magnitudes}, {self.multipliers}")
        if len(self.magnitudes) == 2 and self.scale != "e4m3":
            raise ValueError(f"two modes need a scale with a free bit, which {self.scale} lacks")
        for row in self.magnitudes:
            if len(row) != 8 or row[0] != 0 or sorted(set(row)) != list(row):
                raise ValueError(f"eight magnitudes, ascending from 0: got {row}")
            if any(math.frexp(m)[0] * 8 % 1 for m in row):
                raise ValueError(f"magnitudes of three significant bits: got {row}")


@dataclasses.dataclass(frozen=True)
class TableDecoding:
    """The decoding of a nibble and its block's scale byte to a weight by a table of sixteen arbitrary values.

        weight = values[byte >> bits][nibble] * scale(byte & 2^bits - 1)

    The scale is an unsigned binary float with subnormals. The byte's bits above the scale select the mode.

    Attributes:
        values: for each mode, the sixteen values of the nibbles.
        exponent, mantissa: number of exponent and mantissa bits of the scale.
        bias: exponent bias of the scale.
        nan: the scale bits that turn the whole block into NaN; None if there are none.
        block: number of consecutive weights along K that share a scale byte: 8, 16 or 32.
    """

    values: tuple[tuple[float, ...], ...]
    exponent: int
    mantissa: int
    bias: int
    nan: int | None
    block: int

    def __post_init__(self):
        if any(len(row) != 16 or not all(map(math.isfinite, row)) for row in self.values):
            raise ValueError(f"sixteen finite values for each mode: got {self.values}")
        if not 0 < len(self.values) <= 2 ** (8 - self.bits):
            raise ValueError(f"{len(self.values)} modes beside a scale of {self.bits} bits: a byte has eight")

    @property
    def bits(self) -> int:
        """The number of bits of the scale."""
        return self.exponent + self.mantissa

    def scales(self, byte: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return float32 scales and int32 modes of int32 bytes, by operations that all kernels support."""
        low = byte & (2**self.bits - 1)
        normal = lax.bitcast_convert_type((low << (23 - self.mantissa)) + ((127 - self.bias) << 23), jnp.float32)
        scale = jnp.minimum(normal, 2 * normal - 2.0 ** (1 - self.bias))  # decodes subnormals
        return scale if self.nan is None else jnp.where(low == self.nan, jnp.nan, scale), byte >> self.bits

    @property
    def largest(self) -> float:
        """The largest scale."""
        top = 2**self.bits - (1 if self.nan is None else 2)
        return (1 + (top & 2**self.mantissa - 1) / 2**self.mantissa) * 2.0 ** ((top >> self.mantissa) - self.bias)

    @property
    def unit_at_top(self) -> float:
        """The spacing of scales in the top binade."""
        return 2.0 ** (2**self.exponent - 1 - self.bias - self.mantissa)
