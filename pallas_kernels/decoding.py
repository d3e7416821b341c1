"""What a kernel is told about a 4-bit format: a table, a factor and the kind of scale, as one record."""

import dataclasses
import math
from typing import Literal


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
