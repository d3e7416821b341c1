"""Rounding to small grids by comparisons and selections, for processors that have neither lookup tables nor FMA.

Values are selected from `levels`, numbers that the caller has computed for the codes in a grid's `listed`. If the grid
is symmetric, it rounds magnitudes, and the caller handles the signs.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.formats import Candidate, Grid
from ifjax.formats.floats import EXPONENT, BinaryFloat, as_float, bits_of


class Machine(Protocol):
    """Instructions that some processors have for what takes others several."""

    def fma(self, a: jax.Array, b: Any, c: jax.Array) -> jax.Array:
        """Return a * b + c, rounded once. `b` is an array or a Python number."""
        ...

    def maximum(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return the larger of two floats, NaN if one is."""
        ...

    def quotient(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return a / b, correctly rounded."""
        ...

    def bfloat16(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Return the int32 of two floats rounded to bfloat16, a in the upper half."""
        ...

    def permute(self, a: jax.Array, b: jax.Array, selector: Any) -> jax.Array:
        """Return the int32 of four bytes of b and a, 7 to 0, whose numbers are the selector's hexadecimal digits.

        A digit is the byte's number, plus 8 to repeat the byte's highest bit. The selector is an int or an int32 array
        of four digits.
        """
        ...

    def rounded(self, a: jax.Array, dtype: np.dtype) -> jax.Array:
        """Return float32 numbers rounded to a float type of 16 bits, ties to even."""
        ...


class PlaceGrid(Protocol):
    """Interface for rounding one number to a grid. A `place` is the grid's own representation of a rounded number."""

    @property
    def listed(self) -> tuple[int, ...]:
        """Codes whose values are the levels; () if the grid has a `number` instead of a `value`."""
        ...

    @property
    def is_computed(self) -> bool:
        """Whether to a `Machine` the `number` of a place is cheaper than a choice among the levels."""
        ...

    @property
    def is_symmetric(self) -> bool:
        """Whether the grid rounds magnitudes to codes without a sign."""
        ...

    @property
    def unbounded(self) -> "PlaceGrid":
        """The grid for numbers of which none, nor its nearest value, lies beyond the grid, when no noise is added."""
        ...

    def rounded(self, y: jax.Array, noise: jax.Array | None, machine: "Machine | None" = None) -> Any:
        """Round y to a place; noise as for `Grid.round`."""
        ...

    def code(self, place: Any, shift: int) -> jax.Array:
        """Return the int32 code of a place, shifted left."""
        ...

    def low_bits(self, place: Any) -> jax.Array:
        """Return an int32 whose lowest three bits are a code below 8; its other bits are arbitrary."""
        ...

    def value(self, place: Any, levels: Sequence[jax.Array]) -> jax.Array:
        """Return the value of a place, given the levels."""
        ...

    def number(self, place: Any, machine: "Machine | None" = None) -> jax.Array:
        """Return the place as a float32 number of the grid."""
        ...


def place_grid(c: Candidate) -> PlaceGrid | None:
    """Return the PlaceGrid for a candidate's grid, or None if there is none.

    There is none for grids of more than 16 values that are not those of an integer or a binary float, and none for few
    magnitudes where only negative numbers give -0 and that are neither.
    """
    grid = c.grid
    if not grid.magnitudes:
        return _Sorted(grid) if len(grid.values) <= 16 else None
    computed, is_short = _floats(grid) or Steps.of(grid), len(grid.magnitudes) <= 8
    if grid.zero == "negative" or (c.offset and not is_short):
        return computed and _WithSign(grid, computed)
    if c.offset:
        return _Signed(grid)
    return _floats(grid) or (_Magnitudes(grid) if is_short else computed)


def _floats(grid: Grid) -> "_Floats | None":
    return grid.floats and _Floats(**vars(grid.floats))


@dataclasses.dataclass(frozen=True)
class _Floats(BinaryFloat):
    """Magnitudes of a binary float.

    The levels are the values of the lowest normal binade; all other values are these times a power of two.
    """

    is_symmetric = True

    @property
    def listed(self):
        return tuple(range(1 << self.m, 2 << self.m))

    @property
    def is_computed(self):
        return self.m > 1

    @property
    def unbounded(self):
        """The grid for numbers of which none rounds to a value beyond it, when no noise is added."""
        return dataclasses.replace(self, largest=np.float32(np.inf))

    def number(self, place, machine=None):
        return place[1]

    def value(self, place, levels):
        bits = bits_of(place[1])
        masks = [(bits & np.int32(1 << (22 - i))) != 0 for i in range(self.m)]
        power = as_float(bits & EXPONENT)
        power = power if self.lowest == 1 else power * (1 / self.lowest)
        return select(masks, levels) * power


class FloatsAway(_Floats):
    """Magnitudes of a binary float with one mantissa bit, ties away from zero, to which no noise is added.

    A place is ((bits of a normal number, whether the value is normal, whether it is not zero), value).
    """

    @classmethod
    def of_grid(cls, grid: Grid) -> "FloatsAway | None":
        """Return the grid that rounds to a grid's magnitudes, or None if they are not of this kind."""
        floats = dataclasses.replace(grid, ties="even").floats if grid.ties == "away" else None
        return cls(**vars(floats)) if floats and floats.m == 1 else None

    def rounded(self, y, noise, machine=None):
        """Round y >= 0 to a place: add half a step of its binade and cut off what is below a step."""
        assert noise is None
        y = jnp.minimum(y, self.largest) if self.largest < np.inf else y
        step = np.float32(self.lowest / 2)  # of subnormal numbers, which are 0 and this step
        bits = bits_of(jnp.maximum(y, self.lowest)) + np.int32(1 << 21) & np.int32(-(1 << 22))
        is_normal, is_positive = y >= step * np.float32(1.5), y >= step * np.float32(0.5)
        value = jnp.where(is_normal, as_float(bits), jnp.where(is_positive, step, np.float32(0)))
        return (bits, is_normal, is_positive), value

    def code(self, place, shift=0):
        (bits, is_normal, is_positive), _ = place
        at = lax.shift_right_logical(bits, np.int32(22 - shift)) if shift <= 22 else bits << shift - 22
        code = at - _int32((int(self.lowest.view(np.int32)) >> 22) - 2 << shift)
        return jnp.where(is_normal, code, jnp.where(is_positive, _int32(1 << shift), 0))

    def low_bits(self, place):
        return self.code(place)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Magnitudes that are multiples of a step. A place is the magnitude plus `zero`.

    Attributes:
        step: the difference of two magnitudes, a power of two.
        largest: the largest magnitude.
        count: the number of magnitudes, a power of two.
    """

    step: np.float32
    largest: np.float32
    count: int
    is_computed = is_symmetric = True
    listed = ()

    @classmethod
    def of(cls, grid: Grid) -> "Steps | None":
        """Return the grid that rounds to a grid's magnitudes, or None if they are not of this kind."""
        ends = grid.magnitudes
        if len(ends) < 2 or grid.ties != "even" or math.frexp(ends[1])[0] != 0.5:
            return None
        is_taken = ends == tuple(i * ends[1] for i in range(len(ends)))
        return cls(np.float32(ends[1]), np.float32(ends[-1]), len(ends)) if is_taken else None

    @property
    def zero(self) -> np.float32:
        """A number of two bits, to which one adds in steps of the grid, and which noise keeps in its binade."""
        return np.float32(1.5 * 2.0**23 * self.step)

    @property
    def unbounded(self):
        """The grid for numbers of which none rounds to a value beyond it, when no noise is added."""
        return dataclasses.replace(self, largest=np.float32(np.inf))

    def rounded(self, y: jax.Array, noise: jax.Array | None, machine: Machine | None = None) -> jax.Array:
        """Round y >= 0 to a place; noise as for `Grid.round`."""
        del machine
        y = y if noise is None else y + noise * self.step
        return (jnp.minimum(y, self.largest) if self.largest < np.inf else y) + self.zero

    def code(self, place: jax.Array, shift: int) -> jax.Array:
        """Return the int32 code of a place, shifted left."""
        code = bits_of(place) & np.int32(self.count - 1)
        return code << shift if shift else code

    def low_bits(self, place: jax.Array) -> jax.Array:
        """Return an int32 whose lowest bits are the code of a place."""
        return bits_of(place)

    def number(self, place: jax.Array, machine: Machine | None = None) -> jax.Array:
        """Return the magnitude."""
        if machine is None:  # XLA would add `zero` and its negative
            return self.code(place, 0).astype(jnp.float32) * self.step
        return machine.fma(place, 1.0, jnp.full_like(place, -self.zero))

    def value(self, place: jax.Array, levels: Sequence[jax.Array]) -> jax.Array:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _WithSign:
    """Magnitudes of a float or integer with signs, which are not the inputs' signs. A place is (sign, place)."""

    grid: Grid
    magnitudes: PlaceGrid
    is_computed, is_symmetric = True, False
    listed = ()

    @property
    def unbounded(self):
        return self

    def rounded(self, y, noise, machine=None):
        is_negative = y < 0 if self.grid.zero == "negative" else bits_of(y) < 0
        return is_negative, self.magnitudes.rounded(jnp.abs(y), noise, machine)

    def code(self, place, shift):
        code = with_sign(self.magnitudes.code(place[1], 0), place[0], self.grid)
        return code << shift if shift else code

    def low_bits(self, place):
        return self.code(place, 0)

    def value(self, place, levels):
        raise NotImplementedError

    def number(self, place, machine=None):
        magnitude = self.magnitudes.number(place[1], machine)
        is_negative = place[0] if self.grid.zero != "unsigned" else place[0] & (magnitude > 0)
        return jnp.where(is_negative, -magnitude, magnitude)


@dataclasses.dataclass(frozen=True)
class _Searched:
    """A grid rounded by binary search. A place is the bits of an index into an ascending list, highest first."""

    grid: Grid
    is_computed = False

    @property
    def listed(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def unbounded(self):
        return self

    def _search(self, y, edges) -> list[jax.Array]:
        depth = len(edges).bit_length()
        edges = [*edges, *[np.float32(np.inf)] * (2**depth - 1 - len(edges))]
        masks = []
        for level in range(depth):
            half = 2 ** (depth - 1 - level)
            masks.append(y > select(masks, edges[half - 1 :: 2 * half]))
        return masks

    def code(self, place, shift) -> jax.Array:
        raise NotImplementedError

    def low_bits(self, place):
        return self.code(place, 0)

    def value(self, place, levels):
        return select(place, levels)

    def number(self, place, machine=None) -> jax.Array:
        raise NotImplementedError


class _Magnitudes(_Searched):
    """A symmetric grid of at most eight arbitrary magnitudes."""

    is_symmetric = True

    @property
    def listed(self):
        return tuple(range(len(self.grid.magnitudes)))

    def rounded(self, y, noise, machine=None):
        if noise is None:
            return self._search(y, self.grid.edges)
        if self.grid.mantissa_bits and self.grid.ties == "even":  # all steps are equal, as the grid has one binade
            return self._search(y + noise * np.float32(self.grid.magnitudes[1]), self.grid.edges)
        return self._search(self.grid.position(y) + noise, _halves(self.grid))

    def code(self, place, shift):
        bits = [jnp.where(mask, _int32(1 << i + shift), 0) for i, mask in enumerate(reversed(place))]
        return functools.reduce(jnp.bitwise_or, bits)


class _Signed(_Magnitudes):
    """Magnitudes with signs, for candidates with an offset, whose values are not symmetric about zero."""

    is_symmetric = False

    @property
    def listed(self):
        count = len(self.grid.magnitudes)
        negative = [-k % (2 * count) if self.grid.is_twos_complement else count | k for k in range(count)]
        negative[0] = 0 if self.grid.zero == "unsigned" else negative[0]
        return (*range(count), *negative)

    def rounded(self, y, noise, machine=None):
        magnitude, floats = jnp.abs(y), _floats(self.grid)
        if noise is not None and floats:
            (_, magnitude), noise = floats.rounded(magnitude, noise), None
        return [bits_of(y) < 0, *super().rounded(magnitude, noise)]

    def code(self, place, shift):
        return select(place, [_int32(code << shift) for code in self.listed])


class _Sorted(_Searched):
    """At most 16 arbitrary values, with codes in any order."""

    is_symmetric = False

    @property
    def listed(self):
        count = 1 << (len(self.grid.order) - 1).bit_length()
        return self.grid.order + self.grid.order[-1:] * (count - len(self.grid.order))

    def rounded(self, y, noise, machine=None):
        if noise is None:
            return self._search(y, self.grid.edges)
        return self._search(self.grid.position(y) + noise, _halves(self.grid))

    def code(self, place, shift):
        return select(place, [_int32(code << shift) for code in self.listed])


def _halves(grid: Grid) -> list[np.float32]:
    return [np.float32(i + 0.5) for i in range(len(grid.edges))]


def _int32(word: int) -> np.int32:
    return np.uint32(word % 2**32).view(np.int32)


def with_sign(code: jax.Array, is_negative: jax.Array, grid: Grid) -> jax.Array:
    """Return the code of a symmetric grid, given the code of the magnitude and whether the sign is negative."""
    count = len(grid.magnitudes)
    if grid.is_twos_complement:
        return jnp.where(is_negative, -code, code) & (2 * count - 1)
    is_negative = is_negative & (code > 0) if grid.zero == "unsigned" else is_negative
    return jnp.where(is_negative, code | count, code)


def select(masks: Sequence[jax.Array], options: Sequence[Any]) -> Any:
    """Return options[index], where the boolean masks are the bits of the index, highest first."""
    for mask in reversed(masks):
        options = [jnp.where(mask, high, low) for low, high in zip(options[::2], options[1::2], strict=True)]
    return options[0]
