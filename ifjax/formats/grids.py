"""Element grids: records that list the value of each code.

A `Grid` also states its tie-breaking rule and its signed-zero convention. The number of bits, the encoder and the
decoder follow from these. Grids that are symmetric about zero, as detected from their values, use faster arithmetic.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import lax

from ifjax.formats.floats import BinaryFloat, bits_of, decode_float, float_mantissa_bits
from ifjax.numerics.xla import where

Ties = Literal["even", "down", "away", "lower"]
Zero = Literal["signed", "negative", "unsigned"]
_CHOICES = {"ties": ("even", "down", "away", "lower"), "zero": ("signed", "negative", "unsigned")}


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values of an element type: code i decodes to `values[i]`. Hashable; equal by content.

    `Grid.sign_magnitude` and `Grid.twos_complement` build symmetric grids. Inputs beyond the ends saturate.

    Attributes:
        name: name used in reports and error messages.
        values: the values in code order, rounded to float32; their number is a power of two. One must be 0, because
            blocks are padded with zeros. No two may be equal, except 0 and -0.
        ties: which neighbour an input halfway between two takes: the one with the "even" code (the lower value, if
            neither or both codes are even), the one nearer to zero ("down") or farther from it ("away"), or the "lower"
            value. "lower" compares with the midpoint rounded to float32; the others with the exact midpoint.
        zero: the sign of a zero result in grids with codes for 0 and -0: "signed" copies the input's sign bit (so -0.0
            and small negative values give -0), "negative" gives -0 only for inputs < 0, "unsigned" never gives -0.
        preferred: codes that win every tie.
        unused: codes that are never written. They decode to their value.

    Raises:
        ValueError: a field is invalid; the message says what is needed.
    """

    name: str
    values: tuple[float, ...]
    ties: Ties = "even"
    zero: Zero = "unsigned"
    _: dataclasses.KW_ONLY
    preferred: tuple[int, ...] = ()
    unused: tuple[int, ...] = ()

    def __post_init__(self):
        if not isinstance(self.name, str):
            raise TypeError(f"a grid's name must be text, got {self.name!r}")
        largest = np.finfo(np.float32).max
        if not all(isinstance(v, int | float | np.floating) and abs(v) <= largest for v in self.values):
            raise ValueError(f"{self.name}: values must be finite float32 numbers, got {self.values}")
        values = tuple(float(np.float32(v)) for v in self.values)
        count = len(values)
        if not 2 <= count <= 256 or count & (count - 1):
            raise ValueError(f"{self.name}: a grid needs 2, 4, 8, ... or 256 values, one for each code, got {count}")
        object.__setattr__(self, "values", values)
        for field in ("preferred", "unused"):
            codes = tuple(getattr(self, field))
            if not all(isinstance(c, int) and 0 <= c < count for c in codes):
                raise ValueError(f"{self.name}: {field} must be codes from 0 to {count - 1}, got {codes}")
            object.__setattr__(self, field, codes)
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(f"{self.name}: {field} must be one of {choices}, got {getattr(self, field)!r}")
        used = [values[c] for c in range(count) if c not in self.unused]
        zeros = [v for v in used if v == 0]
        if len(set(used)) != len(used) - max(len(zeros) - 1, 0) or len(zeros) > 2:
            raise ValueError(f"{self.name}: two codes may not stand for one value (only 0 may have two), got {values}")
        if not zeros:
            raise ValueError(f"{self.name}: a grid needs 0, or zeros and padding become noise, got {values}")
        if self.zero != "unsigned" and self._form != "sign_magnitude":
            raise ValueError(f"{self.name}: only sign-magnitude grids have a -0: write zero='unsigned'")

    @classmethod
    def sign_magnitude(
        cls, name: str, magnitudes: Sequence[float], ties: Ties = "even", zero: Zero = "signed"
    ) -> "Grid":
        """Return the grid whose codes have a sign bit above the index of the magnitude.

        Args:
            magnitudes: magnitudes in ascending order, from 0; their number is a power of two.

        Raises:
            ValueError: the magnitudes do not ascend strictly from 0, or their number is not a power of two.
        """
        m = [float(np.float32(v)) for v in magnitudes]
        if len(m) < 2 or len(m) & (len(m) - 1):
            raise ValueError(f"{name}: a grid needs 2, 4, 8, ... magnitudes (0 included), got {len(m)}")
        if m[0] != 0 or not all(a < b for a, b in itertools.pairwise(m)):
            raise ValueError(f"{name}: magnitudes must ascend strictly from 0, got {tuple(m)}")
        return cls(name, (*m, *(-v for v in m)), ties, zero)

    @classmethod
    def twos_complement(cls, name: str, bits: int, ties: Ties = "even") -> "Grid":
        """Return the grid of integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1. The code of -2^(bits-1) is unused."""
        half = 2 ** (bits - 1)
        return cls(name, tuple(float(v) for v in [*range(half), *range(-half, 0)]), ties, unused=(half,))

    @functools.cached_property
    def max(self) -> float:
        """Largest magnitude that is written."""
        return max(abs(self.values[c]) for c in self.order)

    @property
    def bits(self) -> int:
        """Number of bits of a code, sign included."""
        return (len(self.values) - 1).bit_length()

    @functools.cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Magnitudes in code order if the grid is symmetric about zero; () for other grids."""
        return self.values[: len(self.values) // 2] if self._form != "any" else ()

    def mirrored(self) -> "Grid":
        """Return the grid of n codes whose value at code i is minus that of code n - 1 - i, with the same ties."""
        values, last = tuple(-v for v in reversed(self.values)), len(self.values) - 1
        fields = {name: tuple(last - c for c in getattr(self, name)) for name in ("preferred", "unused")}
        return dataclasses.replace(self, name=f"{self.name} mirrored", values=values, **fields)

    def replaced(self, code: int, value: float) -> "Grid":
        """Return a grid in which `code` has another value, which wins ties."""
        values = (*self.values[:code], value, *self.values[code + 1 :])
        return Grid(f"{self.name} with {value:g}", values, self.ties, preferred=(*self.preferred, code))

    @property
    def is_twos_complement(self) -> bool:
        """Whether codes of negative values are two's complements of those of positive ones."""
        return self._form == "twos_complement"

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """Codes that are written, by ascending value; for 0 and -0, only the first code."""
        codes = {self.values[c]: c for c in reversed(range(len(self.values))) if c not in self.unused}
        return tuple(codes[v] for v in sorted(codes))

    @functools.cached_property
    def ends(self) -> tuple[int, int]:
        """Codes of the smallest and the largest value that are written."""
        return self.order[0], self.order[-1]

    @functools.cached_property
    def least_positive(self) -> int:
        """Code of the smallest positive value that is written."""
        return next(code for code in self.order if self.values[code] > 0)

    @functools.cached_property
    def mantissa_bits(self) -> int | None:
        """Mantissa bits m if the magnitudes are those of a binary float with subnormals; None for other grids.

        Integers count as such a float with only subnormals.
        """
        return float_mantissa_bits(self.magnitudes) if self.magnitudes else None

    def round(self, y: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Round y to the grid, saturating. Equal to `decode(encode(y))`, except for the sign of zero, but faster.

        `noise` in [-1/2, 1/2), of y's shape, is added to y's position between the two adjacent values before rounding.
        Uniform noise makes rounding stochastic, with probabilities given by the distances.
        """
        if self._form == "any":
            return _select(self._is_above(y, noise), [self.values[c] for c in self.order])
        if floats := self.floats:
            return floats.nearest(y) if noise is None else jnp.copysign(floats.rounded(lax.abs(y), noise)[1], y)
        if self._step:
            # Rounding to nearest is symmetric, so y may keep its sign, but noise is added to magnitudes.
            n = self._steps(y if noise is None else lax.abs(y), noise)
            rounded = n if self._step == 1 else n * np.float32(self._step)
            return rounded if noise is None else jnp.copysign(rounded, y)
        return jnp.copysign(_select(self._is_above(lax.abs(y), noise), self.magnitudes), y)

    def encode(self, y: jax.Array, noise: jax.Array | None = None) -> jax.Array:
        """Return the int32 codes of y (finite float32), saturating; `noise` as in `round`."""
        if self._form == "any":
            return _select(self._is_above(y, noise), [np.int32(c) for c in self.order])
        count = len(self.magnitudes)
        if self._step and self.is_twos_complement and noise is None:
            return self._steps(y, None).astype(jnp.int32) & (2 * count - 1)
        a = lax.abs(y)
        if self.floats:
            index = self.floats.code(self.floats.rounded(a, noise))
        elif self._step:
            index = self._steps(a, noise).astype(jnp.int32)
        else:
            above = self._is_above(a, noise)
            index = sum((b.astype(jnp.int32) for b in above[1:]), above[0].astype(jnp.int32))
        if self.is_twos_complement:
            return where(bits_of(y) < 0, -index, index) & (2 * count - 1)
        if self.zero == "signed":
            return index | lax.shift_right_logical(bits_of(y), np.int32(32 - self.bits)) & count
        negative = (y < 0) if self.zero == "negative" else (bits_of(y) < 0) & (index > 0)
        return index | (negative.astype(jnp.int32) << (self.bits - 1))

    def decode(self, codes: jax.Array) -> jax.Array:
        """Return the float32 values of integer codes. Bits above those of the code are ignored.

        Uses element-wise arithmetic only, so that Pallas kernels can call it.
        """
        codes = codes.astype(jnp.int32)
        if self._form == "any":
            codes = codes & (len(self.values) - 1)
            return _select([codes >= i for i in range(1, len(self.values))], self.values)
        if self.is_twos_complement:
            above = np.int32(32 - self.bits)
            return (codes << above >> above).astype(jnp.float32)
        count, m = len(self.magnitudes), self.mantissa_bits
        negative = (codes & count) != 0
        index = codes & (count - 1)
        if m is None:
            magnitude = _select([index >= i for i in range(1, count)], self.magnitudes)
        elif count <= 2 << m:  # all steps are equal: an integer grid
            magnitude = index.astype(jnp.float32)
            magnitude = magnitude if self.magnitudes[1] == 1 else magnitude * np.float32(self.magnitudes[1])
        else:
            magnitude = decode_float(index, m, self.magnitudes[1])
        return where(negative, -magnitude, magnitude)

    @functools.cached_property
    def _form(self) -> Literal["sign_magnitude", "twos_complement", "any"]:
        v, half = self.values, len(self.values) // 2
        ascends = v[0] == 0 and all(a < b for a, b in itertools.pairwise(v[:half]))
        if self.preferred or self.ties == "lower" or not ascends:
            return "any"
        if not self.unused and all(v[half + i] == -v[i] for i in range(half)):
            return "sign_magnitude"
        integers = all(v[i] == i and v[half + i] == i - half for i in range(half))
        return "twos_complement" if self.unused == (half,) and integers else "any"

    @functools.cached_property
    def edges(self) -> tuple[np.float32, ...]:
        """For each pair of neighbours, in ascending order, the largest float32 that is rounded to the lower one.

        Neighbours are magnitudes if the grid is symmetric, otherwise the values that are written (see `order`).
        """
        edges = []
        for lower, upper in itertools.pairwise(self._neighbours):
            exact = (self.values[lower] + self.values[upper]) / 2
            middle = np.float32(exact)
            goes_up = self._tie_goes_up(lower, upper)
            if float(middle) != exact and self.ties != "lower":
                goes_up = float(middle) > exact  # the exact midpoint is not a float32, so there are no ties
            edges.append(np.nextafter(middle, np.float32(-np.inf)) if goes_up else middle)
        return tuple(edges)

    @property
    def _rounded_bits(self) -> int:
        """Number of mantissa bits if rounding to that many bits rounds to this grid; 0 otherwise."""
        # Half-to-even on multiples of the step is half-to-even on codes only if each binade starts at an even code,
        # that is, for m >= 1.
        return (self.mantissa_bits or 0) if self.ties == "even" else 0

    @functools.cached_property
    def floats(self) -> BinaryFloat | None:
        """The binary float, of several binades, to whose values rounding half to even is rounding to this grid."""
        m = self._rounded_bits
        return BinaryFloat.of(self.magnitudes, self.max, m) if m and len(self.magnitudes) > 2 << m else None

    @functools.cached_property
    def _step(self) -> float:
        """The difference of all neighbours if they are equally far apart and ties go to even; 0 otherwise."""
        return self.magnitudes[1] if self._rounded_bits and len(self.magnitudes) <= 2 << self._rounded_bits else 0

    def _steps(self, y, noise):
        """Return how many steps, as a float, y is from 0 after rounding."""
        n, most = y if self._step == 1 else y * np.float32(1 / self._step), np.float32(self.max / self._step)
        n = lax.round(n if noise is None else n + noise, lax.RoundingMethod.TO_NEAREST_EVEN)
        return lax.clamp(-most, n, most)

    def position(self, y: jax.Array) -> jax.Array:
        """Return how many steps y lies above the smallest value, fractional between two neighbours (see `edges`)."""
        steps = [(self.values[a], self.values[b]) for a, b in itertools.pairwise(self._neighbours)]
        gaps = [(lower, np.float32(1 / (upper - lower))) for lower, upper in steps]
        return sum((jnp.clip((y - np.float32(lower)) * inverse, 0, 1) for lower, inverse in gaps), jnp.zeros_like(y))

    def _is_above(self, y, noise):
        """Return for each neighbour but the last (see `edges`), in ascending order, whether y rounds above it."""
        if noise is None:
            return [y > edge for edge in self.edges]
        position = self.position(y) + noise
        return [position > i + 0.5 for i in range(len(self.edges))]

    @property
    def _neighbours(self) -> tuple[int, ...]:
        return tuple(range(len(self.magnitudes))) or self.order

    def _tie_goes_up(self, lower: int, upper: int) -> bool:
        """Return whether a tie between two codes takes the one with the larger value."""
        for code, answer in ((lower, False), (upper, True)):
            if code in self.preferred:
                return answer
        if self.ties == "even":
            return upper % 2 == 0 and lower % 2 == 1
        if self.ties == "lower":
            return False
        farther = abs(self.values[upper]) > abs(self.values[lower])
        return farther if self.ties == "away" else not farther


def _select(above, values):
    """Return values[i + 1] for the last i where `above[i]` is true, or values[0] if there is none."""
    kind = jnp.int32 if isinstance(values[0], np.integer) else jnp.float32
    picked = jnp.full(above[0].shape, values[0], kind)
    for is_above, value in zip(above, values[1:], strict=True):
        picked = where(is_above, kind(value), picked)
    return picked


def _ml_dtypes_magnitudes(dtype, count: int) -> tuple[float, ...]:
    return tuple(np.arange(count, dtype=np.uint8).view(dtype).astype(np.float64).tolist())


# Conventions of the reference code of arXiv 2603.28765: E2M0 breaks ties towards zero; INT4 is two's complement, INT3
# and INT6 are sign-magnitude; float grids have -0, integer grids do not.
E2M0 = Grid.sign_magnitude("E2M0", (0.0, 1.0, 2.0, 4.0), ties="down", zero="negative")
E2M1 = Grid.sign_magnitude("E2M1", _ml_dtypes_magnitudes(ml_dtypes.float4_e2m1fn, 8))
E2M3 = Grid.sign_magnitude("E2M3", _ml_dtypes_magnitudes(ml_dtypes.float6_e2m3fn, 32))
E3M2 = Grid.sign_magnitude("E3M2", _ml_dtypes_magnitudes(ml_dtypes.float6_e3m2fn, 32))
INT3 = Grid.sign_magnitude("INT3", range(4), zero="unsigned")
INT4 = Grid.twos_complement("INT4", 4)
INT6 = Grid.sign_magnitude("INT6", range(32), zero="unsigned")
INT4_SIGNED = Grid.sign_magnitude("INT4 sign-magnitude", range(8), zero="unsigned")
# HiFloat4's elements: multiples of 1/4.
S1P2 = Grid.sign_magnitude("S1P2", [c / 4 for c in range(8)], ties="away")
# Quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E).
NF4 = Grid(
    "NF4",
    (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ), "lower",
)  # fmt: skip
# Learned on normal numbers with zero fixed at code 8 (see `ifjax.learn_format`). Each is used with its mirror image.
SPLIT87 = Grid(
    "Split87",
    (
        -0.9928, -0.8343, -0.6614, -0.5155, -0.3897, -0.2776, -0.1751, -0.0817, 0.0, 0.1094, 0.2172, 0.3290, 0.4501,
        0.5864, 0.7490, 0.9814,
    ), "lower",
)  # fmt: skip
QUAD_A = Grid(
    "Quad A",
    (
        -0.9962, -0.8533, -0.7027, -0.5509, -0.4203, -0.3039, -0.1960, -0.0944, 0.0, 0.1183, 0.2325, 0.3530, 0.4813,
        0.6276, 0.8046, 0.9854,
    ), "lower",
)  # fmt: skip
QUAD_B = Grid(
    "Quad B",
    (
        -0.9862, -0.7422, -0.5777, -0.4503, -0.3424, -0.2463, -0.1554, -0.0709, 0.0, 0.0860, 0.1789, 0.2796, 0.3892,
        0.5097, 0.6521, 0.9878,
    ), "lower",
)  # fmt: skip
# Learned on 2^20 normal numbers under UE2M3 scales: `learn_format(x, grids=4, scale=UE2M3, prevent_zero=True)`.
OCTET = tuple(
    Grid(f"Octet {i}", values, "lower")
    for i, values in enumerate(
        (
            (-0.9982, -0.868, -0.7183, -0.5983, -0.4735, -0.35, -0.2313, -0.1166, 0.0, 0.1354, 0.2598, 0.3855, 0.5189,
             0.6624, 0.8163, 0.9875),
            (-0.9992, -0.8719, -0.7007, -0.548, -0.4274, -0.3116, -0.201, -0.095, 0.0, 0.1074, 0.2148, 0.3286, 0.456,
             0.5988, 0.7566, 0.9791),
            (-0.9922, -0.8137, -0.63, -0.4892, -0.3701, -0.263, -0.1636, -0.073, 0.0, 0.0854, 0.1854, 0.2934, 0.4122,
             0.5607, 0.7645, 0.988),
            (-0.9931, -0.6879, -0.5514, -0.4433, -0.3388, -0.2412, -0.1502, -0.0669, 0.0, 0.0934, 0.1895, 0.2862,
             0.3881, 0.5013, 0.6343, 0.9919),
        ), 1,
    )
)  # fmt: skip
