"""Element grids: the values that one code can stand for, as records.

A `Grid` states its magnitudes, how it writes the sign, how it breaks ties and what becomes of zero's sign. The
number of bits, the encoder and the decoder follow from these.
"""

import dataclasses
import functools
import itertools
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Grid:
    """A symmetric set of values: code i stands for `magnitudes[i]`, a sign stands above it.

    Attributes:
        name: what reports call it.
        magnitudes: ascending from 0, a power of two of them, in code order; rounded to float32. The two's complement
            code that is left over, -2^(bits-1), is never written.
        sign: "bit" puts a sign bit above the magnitude; "twos_complement" negates the code.
        ties: a value halfway between two codes takes the "even" code, or the one nearer to zero ("down") or
            farther from it ("away").
        zero: where the result is zero its sign is "signed" (that of the input's sign bit, so -0.0 and small negative
            values give the code of -0), "negative" (only for inputs < 0) or "unsigned" (never: one code of zero).
    """

    name: str
    magnitudes: tuple[float, ...]
    sign: Literal["bit", "twos_complement"] = "bit"
    ties: Literal["even", "down", "away"] = "even"
    zero: Literal["signed", "negative", "unsigned"] = "signed"

    def __post_init__(self):
        if not all(abs(v) <= np.finfo(np.float32).max for v in self.magnitudes):
            raise ValueError(f"{self.name}: magnitudes must be finite float32 numbers, got {self.magnitudes}")
        m = tuple(float(np.float32(v)) for v in self.magnitudes)
        object.__setattr__(self, "magnitudes", m)
        if len(m) < 2 or len(m) & (len(m) - 1):
            raise ValueError(f"{self.name}: a grid needs 2, 4, 8, ... magnitudes (0 included), got {len(m)}")
        if m[0] != 0 or any(b <= a for a, b in itertools.pairwise(m)):
            raise ValueError(f"{self.name}: magnitudes must ascend strictly from 0, got {m}")
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{self.name}: {field} must be one of {choices}, got {getattr(self, field)!r}")
        if self.sign == "twos_complement" and self.zero != "unsigned":
            raise ValueError(f"{self.name}: two's complement has one zero: write zero='unsigned'")

    @property
    def max(self) -> float:
        """The largest magnitude."""
        return self.magnitudes[-1]

    @property
    def bits(self) -> int:
        """Bits of a code, sign included."""
        return len(self.magnitudes).bit_length()

    @functools.cached_property
    def mantissa_bits(self) -> int | None:
        """m if the magnitudes are those of a binary float with m mantissa bits and subnormals; None for others.

        Integers are such a float of which only the subnormals are used.
        """
        count, unit = len(self.magnitudes), self.magnitudes[1]
        if np.frexp(unit)[0] != 0.5:  # the arithmetic works on exponent bits
            return None
        for m in range(self.bits):
            if self.magnitudes == tuple(unit * _float_units(i, m) for i in range(count)):
                return m
        return None

    def round(self, y: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """The grid's value for each y, saturating, the sign of zero aside; `decode(encode(y))` in fewer operations.

        `noise` in [-1/2, 1/2), of y's shape, is added to y's position between the two adjacent values before it is
        rounded: uniform noise makes rounding stochastic, with probability by distance.
        """
        a = jnp.abs(y)
        if m := self._mantissa_to_round:
            step, _, n = nearest_multiple(a, m, self.magnitudes[1], self.max, noise)
            magnitude = jnp.minimum(n * step, np.float32(self.max))
        else:
            magnitude = self._select(self._is_above(a, noise))
        return jnp.copysign(magnitude, y)

    def encode(self, y: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """int32 codes of y (finite float32), saturating; `noise` as in `round`."""
        a = jnp.abs(y)
        top = len(self.magnitudes) - 1
        if m := self._mantissa_to_round:
            _, binade, n = nearest_multiple(a, m, self.magnitudes[1], self.max, noise)
            # Rounding up out of a binade carries into the next one by itself. The float is bounded before its
            # conversion, which is undefined for large values.
            n = jnp.minimum(n, np.float32(2 ** (m + 1))).astype(jnp.int32)
            index = jnp.minimum(n + (binade << m), top)
        else:
            above = self._is_above(a, noise)
            index = sum((b.astype(jnp.int32) for b in above[1:]), above[0].astype(jnp.int32))
        if self.sign == "twos_complement":
            return jnp.where(_sign_bit(y), -index, index) & (2**self.bits - 1)
        negative = (y < 0) if self.zero == "negative" else _sign_bit(y)
        if self.zero == "unsigned":
            negative &= index > 0
        return index | (negative.astype(jnp.int32) << (self.bits - 1))

    def decode(self, codes: jax.Array) -> jax.Array:
        """float32 values of integer codes, by element-wise arithmetic alone, so that a Pallas kernel can call it.

        Bits above the code's own are ignored. The unused code of a two's complement grid reads as -2^(bits-1).
        """
        codes = codes.astype(jnp.int32)
        count, m = len(self.magnitudes), self.mantissa_bits
        negative = (codes & count) != 0
        index = codes & (count - 1)
        if self.sign == "twos_complement":
            index = jnp.where(negative, count - index, index)
        if m is None:
            magnitude = self._select([index >= i for i in range(1, count)])
        elif count <= 2 << m:  # one binade: an integer grid
            magnitude = index.astype(jnp.float32) * np.float32(self.magnitudes[1])
        else:
            # The code's bits as those of a float32; where the code is subnormal, its leading one is taken off again.
            one = np.float32(self.magnitudes[1 << m])
            exponent = one.view(np.int32) - np.int32(1 << 23)
            normal = lax.bitcast_convert_type((index << (23 - m)) + exponent, jnp.float32)
            magnitude = jnp.where(index < 1 << m, normal + normal - one, normal)
        return jnp.where(negative, -magnitude, magnitude)

    @property
    def _mantissa_to_round(self) -> int:
        """Mantissa bits, if rounding to them rounds to this grid; else 0."""
        # Half-to-even on a multiple is half-to-even on the code only if each binade starts at an even code (m >= 1).
        return (self.mantissa_bits or 0) if self.ties == "even" else 0

    def _is_above(self, a, noise):
        """For each code but the last: is a's code larger?"""
        m = self.magnitudes
        if noise is not None:
            gaps = [(lower, np.float32(1 / (upper - lower))) for lower, upper in itertools.pairwise(m)]
            position = sum(jnp.clip((a - np.float32(lower)) * inverse, 0, 1) for lower, inverse in gaps) + noise
            return [position > i + 0.5 for i in range(len(gaps))]
        above = []
        for i, (lower, upper) in enumerate(itertools.pairwise(m)):
            middle = np.float32((lower + upper) / 2)
            tie_goes_up = self.ties == "away" or (self.ties == "even" and i % 2 == 1)
            rounded_by = float(middle) - (lower + upper) / 2
            if rounded_by:  # no float32 is a tie: ask on which side of the true middle the rounded one lies
                tie_goes_up = rounded_by > 0
            above.append(a >= middle if tie_goes_up else a > middle)
        return above

    def _select(self, above):
        magnitude = jnp.zeros(above[0].shape, jnp.float32)
        for is_above, value in zip(above, self.magnitudes[1:], strict=True):
            magnitude = jnp.where(is_above, np.float32(value), magnitude)
        return magnitude


def nearest_multiple(a, mantissa_bits: int, unit: float, largest: float, noise=None):
    """Round a >= 0 to `mantissa_bits` after the leading one, or to multiples of `unit` where that is coarser.

    Returns (step, binade, n): the result is n * step, where step = unit * 2^binade (binade 0 holds the subnormals
    too, that of `largest` all that is larger) and n is a float. Half to even; `noise` is added before rounding.
    Every operation but the rounding itself is exact.
    """
    lowest = np.float32(unit * 2**mantissa_bits).view(np.int32)
    highest = np.float32(largest).view(np.int32)
    shift = np.int32(mantissa_bits << 23)
    bits = lax.bitcast_convert_type(a, jnp.int32)
    exponent = jnp.clip(bits, lowest, highest) & np.int32(0xFF << 23)
    step = lax.bitcast_convert_type(exponent - shift, jnp.float32)
    inverse = lax.bitcast_convert_type(np.int32(254 << 23) - (exponent - shift), jnp.float32)
    n = a * inverse
    n = jnp.round(n if noise is None else n + noise)
    return step, (exponent - (lowest & np.int32(0xFF << 23))) >> 23, n


def _float_units(index: int, mantissa_bits: int) -> int:
    """The magnitude with this code of a float with subnormals, in units of the smallest."""
    if index < 1 << mantissa_bits:
        return index
    return (1 << mantissa_bits | index & ((1 << mantissa_bits) - 1)) << ((index >> mantissa_bits) - 1)


def _sign_bit(y):
    return lax.bitcast_convert_type(y, jnp.int32) < 0


_CHOICES = {
    "sign": ("bit", "twos_complement"),
    "ties": ("even", "down", "away"),
    "zero": ("signed", "negative", "unsigned"),
}


def _ml_dtypes_magnitudes(dtype, count: int) -> tuple[float, ...]:
    return tuple(np.arange(count, dtype=np.uint8).view(dtype).astype(np.float64).tolist())


def _integers(bits: int) -> tuple[float, ...]:
    return tuple(float(i) for i in range(2 ** (bits - 1)))


# FORMATS that look alike differ here: E2M0 breaks ties towards zero; INT4 is two's complement, INT3 and INT6 are
# sign-magnitude; float grids keep -0, integer grids do not (arXiv 2603.28765, reference code).
E2M0 = Grid("E2M0", (0.0, 1.0, 2.0, 4.0), ties="down", zero="negative")
E2M1 = Grid("E2M1", _ml_dtypes_magnitudes(ml_dtypes.float4_e2m1fn, 8))
E2M3 = Grid("E2M3", _ml_dtypes_magnitudes(ml_dtypes.float6_e2m3fn, 32))
E3M2 = Grid("E3M2", _ml_dtypes_magnitudes(ml_dtypes.float6_e3m2fn, 32))
INT3 = Grid("INT3", _integers(3), zero="unsigned")
INT4 = Grid("INT4", _integers(4), sign="twos_complement", zero="unsigned")
INT6 = Grid("INT6", _integers(6), zero="unsigned")
