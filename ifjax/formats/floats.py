"""Binary floats of few bits: their values, and rounding to them by adding a large number."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.numerics.xla import where

EXPONENT = np.int32(0x7F800000)


def bits_of(x: jax.Array) -> jax.Array:
    """Return the bits of float32 values as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def as_float(bits: jax.Array) -> jax.Array:
    """Return the float32 values with these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(bits: jax.Array) -> jax.Array:
    """Clear the sign bit; the resulting integers have the order of the magnitudes."""
    return lax.bitwise_and(bits, lax.full_like(bits, 0x7FFFFFFF))


@dataclasses.dataclass(frozen=True)
class BinaryFloat:
    """Magnitudes of a binary float with m >= 1 mantissa bits, ties to the even code.

    Adding a large number rounds. It is a number for each value, so XLA does not take it away again beforehand.
    `lowest` is the least normal value, `largest` the largest value, and `count` the number of codes, rounded up to a
    power of two.
    """

    lowest: np.float32
    largest: np.float32
    count: int
    m: int

    @classmethod
    def of(cls, magnitudes: Sequence[float], largest: float, m: int) -> Any:
        """Return the float for the ascending magnitudes of all codes; `largest` is the largest that is written.

        None if a number that is added is not a finite float32.
        """
        if largest >= 2.0 ** (103 + m):
            return None
        count = 1 << (len(magnitudes) - 1).bit_length()
        return cls(np.float32(magnitudes[1 << m]), np.float32(largest), count, m)

    def nearest(self, y):
        """Round y of either sign to the nearest value."""
        y = lax.clamp(-self.largest, y, self.largest)
        binade = as_float(lax.max(bits_of(y) & EXPONENT, self.lowest.view(np.int32)))
        large = binade * np.float32(1.5 * 2.0 ** (23 - self.m))
        return (y + large) - large

    def rounded(self, y, noise, machine=None):
        """Return (sum, value) of magnitudes y: the sum with the large number has y's code in its lowest bits.

        Noise as for `Grid.round`. The sum is rounded to a step of y's binade. Its lowest bits count steps, and its
        exponent counts binades.
        """
        top, m = self.largest, self.m
        y = jnp.minimum(y, top) if noise is None and top < np.inf else y
        binade = as_float(bits_of(jnp.maximum(y, self.lowest)) & EXPONENT)
        if noise is not None:
            # A number beyond the grid counts as in the last binade. The sum is y / step plus the noise, times the step.
            binade = jnp.minimum(binade, (top.view(np.int32) & EXPONENT).view(np.float32))
            y = jnp.minimum(y + noise * (binade * np.float32(2.0**-m)), top)
        # Adding `_lift` more steps makes the lowest bits of the sum those of the code.
        factor = 2.0 ** (23 - m) + self._lift * 2.0**-m
        if machine is not None:
            total = machine.fma(binade, factor, y)
            return total, machine.fma(binade, -factor, total)
        large = binade * np.float32(factor)
        total = y + large
        return total, total - large

    def code(self, place, shift=0):
        """Return the int32 code of what `rounded` gave, shifted left."""
        code = self.low_bits(place) & np.int32(self.count - 1)
        return code << shift if shift else code

    def low_bits(self, place):
        """Return an int32 whose lowest three bits are a code below 8; its other bits are arbitrary."""
        total = bits_of(place[0])
        # The code is the number of steps, with 2^m steps for each binade.
        total = total + lax.shift_right_logical(total, np.int32(23 - self.m))
        return total if self.count >= 8 else total & np.int32(self.count - 1)

    @property
    def _lift(self):
        """Number of steps, even, for which the sum of the lowest binade plus its exponent ends in zero bits.

        At least two, so that noise cannot move the sum for 0 below the power of two.
        """
        exponent = int(np.float32(self.lowest * 2.0 ** (23 - self.m)).view(np.int32)) >> 23
        return -(exponent << self.m) % self.count or self.count


def decode_float(index, mantissa_bits: int, unit: float):
    """Return the value of a code of a binary float whose smallest subnormal is `unit`."""
    # Place the code in the bits of a float32. For subnormal codes, subtract the implicit leading one.
    one = np.float32(unit * 2**mantissa_bits)
    exponent = one.view(np.int32) - np.int32(1 << 23)
    normal = lax.bitcast_convert_type((index << (23 - mantissa_bits)) + exponent, jnp.float32)
    return where(index < 1 << mantissa_bits, normal + normal - one, normal)


def float_mantissa_bits(magnitudes: Sequence[float]) -> int | None:
    """Return m if these are the values >= 0, in code order, of a binary float with m mantissa bits; None otherwise.

    The float has subnormals.
    """
    unit = magnitudes[1]
    if magnitudes[0] != 0 or math.frexp(unit)[0] != 0.5:  # the arithmetic works on exponent bits
        return None
    for m in range((len(magnitudes) - 1).bit_length() + 1):
        if all(value == unit * _float_units(i, m) for i, value in enumerate(magnitudes)):
            return m
    return None


def _float_units(index: int, mantissa_bits: int) -> int:
    """Return the magnitude of a code of a binary float, in units of the smallest subnormal."""
    if index < 1 << mantissa_bits:
        return index
    return (1 << mantissa_bits | index & ((1 << mantissa_bits) - 1)) << ((index >> mantissa_bits) - 1)
