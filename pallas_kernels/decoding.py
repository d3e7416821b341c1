"""What a kernel is told about a 4-bit format, as a record: sign and magnitude, or tables of any sixteen values."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How a sign-magnitude nibble and its block's scale byte make a weight.

        weight = +-magnitudes[mode][nibble & 7] * multipliers[mode] * scale(byte)

    Bit 3 of the nibble is the sign. With two modes, bit 7 of the scale byte is the mode and the scale is the rest;
    with one mode there is nothing to mark, and bit 7 of an E4M3 byte is the scale's sign. A byte that means NaN
    (E4M3 0x7F, 0xFF; E8M0 0xFF) makes NaN of the whole block; E8M0 byte 0 makes it zero.

    Multipliers are small integers, so that magnitude * multiplier * E4M3 scale is exact in float16: what they have in
    common (IF4: 7 and 6 for steps of 1 and 6/7) is the caller's to divide by, once, together with the tensor's factor.

    Attributes:
        magnitudes: for each mode, the eight magnitudes that codes 0..7 stand for, ascending from 0; each with at most
            three significant bits, so that the upper byte of a float16 holds it.
        multipliers: for each mode, an integer.
        scale: "e4m3" (4 exponent bits, bias 7, no infinity) or "e8m0" (a power of two, bias 127).
        block: consecutive weights along K that share a byte: 8, 16 or 32.
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
    """How a nibble and its block's scale byte make a weight by a table of any sixteen values.

        weight = values[byte >> bits][nibble] * scale(byte & 2^bits - 1)

    The scale is an unsigned binary float with subnormal numbers; the bits of the byte above its own are the mode.

    Attributes:
        values: for each mode, the sixteen numbers that nibbles stand for.
        exponent, mantissa: bits of the scale.
        bias: of its exponent.
        nan: the scale that makes NaN of the whole block; None if none does.
        block: consecutive weights along K that share a byte: 8, 16 or 32.
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
        """Of the scale."""
        return self.exponent + self.mantissa

    def scales(self, byte: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The float32 scales and the modes of int32 bytes, by operations that all kernels have."""
        low = byte & (2**self.bits - 1)
        normal = lax.bitcast_convert_type((low << (23 - self.mantissa)) + ((127 - self.bias) << 23), jnp.float32)
        scale = jnp.minimum(normal, 2 * normal - 2.0 ** (1 - self.bias))  # subnormal ones
        return scale if self.nan is None else jnp.where(low == self.nan, jnp.nan, scale), byte >> self.bits

    @property
    def largest(self) -> float:
        """The largest scale."""
        top = 2**self.bits - (1 if self.nan is None else 2)
        return (1 + (top & 2**self.mantissa - 1) / 2**self.mantissa) * 2.0 ** ((top >> self.mantissa) - self.bias)

    @property
    def unit_at_top(self) -> float:
        """What the largest scale is less than the one after it."""
        return 2.0 ** (2**self.exponent - 1 - self.bias - self.mantissa)
