"""MS-EDEN for kernels, with one array for each place of a block, with the bits of `ifjax.arrays.ms_eden`."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.codec.eden import EDEN_LARGEST_SCALE, eden_constant, eden_peak, eden_units
from ifjax.codec.encode import Encoding
from ifjax.codec.headers import power_near
from ifjax.codec.losses import without_last_bit
from ifjax.codec.place_grids import FloatsAway, Machine, PlaceGrid
from ifjax.codec.places import (
    Block,
    Lookup,
    PlaceCodec,
    Tensor,
    Trial,
    encoder_refusal,
    is_exact,
    over,
    over_places,
    signed,
    with_scalars,
)
from ifjax.formats import Candidate, Format, TableScale
from ifjax.formats.floats import as_float, bits_of, magnitude_bits
from ifjax.numerics.xla import correct_quotient


class EdenCodec(PlaceCodec):
    """The arithmetic of MS-EDEN, with the bits of `ifjax.arrays.ms_eden`, for runs of a rotation.

    The first grid of `how.fmt` breaks ties away from zero; see `EdenCodec.of`.
    """

    @classmethod
    def of(cls, fmt: Format, dtype: np.dtype) -> "EdenCodec":
        """Return the codec of a format that `ms_eden` takes."""
        first, *others = fmt.candidates
        first = dataclasses.replace(first, grid=dataclasses.replace(first.grid, ties="away"))
        return cls(Encoding(dataclasses.replace(fmt, candidates=(first, *others))), dtype)

    @property
    def corrects_runs(self) -> bool:
        return True

    def grid_of(self, c: Candidate) -> PlaceGrid | None:
        return FloatsAway.of_grid(c.grid) or super().grid_of(c)

    @property
    def noises(self) -> int:
        return 1

    @property
    def scalars(self) -> int:
        return 2

    @property
    def refusal(self) -> str | None:
        """Why a kernel cannot encode like this; None if it can."""
        if self.block & (self.block - 1) or not self._on_magnitudes:
            return "its blocks are no power of two, or its grids are not symmetric"
        return encoder_refusal(self.how)

    def encoder_tables(self, amax: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array]:
        """Return the scalars (power, unit) [count, 2], and a table [count, 8, 128] whose last row begins with them."""
        assert amax is not None
        del count
        return with_scalars([], list(eden_units(amax, self.fmt)))

    def factor(self, amax: jax.Array, machine: Machine | None = None) -> jax.Array:
        return self.stored_amax(amax, machine) * np.float32(1 / eden_constant(self.fmt))  # a power of two

    def stored_amax(self, amax: jax.Array, machine: Machine | None = None) -> jax.Array:
        (power, unit), _ = self.rows_of_table(amax, machine)
        inverse = as_float(np.int32(254 << 23) - bits_of(power))  # of a power of two
        return unit * np.float32(eden_constant(self.fmt)) * inverse

    def rows_of_table(
        self, amax: jax.Array, machine: Machine | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return [power, unit] for one tensor, arrays [128], and no rows."""
        power = power_near(amax)
        scaled = over(over(amax * power, EDEN_LARGEST_SCALE, machine), eden_peak(self.fmt), machine)
        return [power, jnp.where(amax * power > 0, scaled, 1)], []

    def encode(
        self, xs: Sequence[jax.Array], noise: Any, scalars: Sequence[Any], lookup: Lookup, *, wants_codes: bool,
        wants_values: bool, across: Callable[[Any, jax.Array], jax.Array] | None = None, machine: Machine | None = None,
    ) -> Block:  # fmt: skip
        """Encode a block, given its rotated places xs as for `PlaceCodec.encode`; `noise` is one number for it.

        Values are multiples of the tensor's factor.
        `across` maps (op, a) to the reduction of a by op over the blocks of a run; None for runs of one block.
        """
        (power, unit), fmt, scale_of = scalars, self.fmt, cast(TableScale, self.fmt.scale)
        if machine is None:
            peak = as_float(over_places(jnp.maximum, [magnitude_bits(bits_of(x)) for x in xs]))
        else:
            peak = over_places(machine.maximum, [jnp.abs(x) for x in xs])
        is_poisoned = bits_of(peak) >= np.int32(0x7F800000)
        wanted = _quotient(over(peak * power, eden_peak(fmt), machine), unit, machine)
        byte = scale_of.encode(wanted)
        scale = jnp.where(byte == 0, 1, scale_of.decode(byte))
        ys = _quotients([jnp.abs(x) * power for x in xs], scale * unit, machine)
        ends = ys if machine is None or self._end is None else [jnp.minimum(y, self._end) for y in ys]
        trials = []
        for i, c in enumerate(fmt.candidates):
            kept = jnp.where(is_poisoned, 0, unit)  # a poisoned block has codes of 0
            trial = Trial(self, i, byte, kept, Tensor(power, 1, 1, 1, lookup), xs, ends, [None] * len(xs), machine)
            qs = trial.magnitudes()
            lost = self._sum([(y - q, y - q) for y, q in zip(ys, qs, strict=True)])
            words = trial.words() if wants_codes else []
            trials.append((lost, fmt.selector_of(c), *qs, *words, *([trial.sign_mask()] if wants_values else [])))
        (lost, selector, *best), *others = trials
        for other_lost, other_selector, *other in others:
            wins = other_lost < lost
            lost, selector = jnp.where(wins, other_lost, lost), jnp.where(wins, other_selector, selector)
            best = [jnp.where(wins, a, b) for a, b in zip(other, best, strict=True)]
        qs, words = best[: len(xs)], best[len(xs) :]
        above, below = (self._sum(list(zip(ys, a, strict=True))) for a in (ys, qs))
        if across is not None:
            above, below = across(jnp.add, above), across(jnp.add, below)
        factor = jnp.where(below == 0, 1, _quotient(above, below, machine))
        payload = self._stochastic(scale * factor, noise + np.float32(0.5))
        header, values = jnp.where(is_poisoned, fmt.scale.nan, fmt.join(selector, payload)), ()
        if wants_values:
            *words, mask = words
            scale = jnp.where(is_poisoned, np.float32(np.nan), scale_of.decode(payload))
            values = [signed(q, x, mask) * scale for q, x in zip(qs, xs, strict=True)]
            if not all(is_exact(fmt, c, self.dtype) for c in fmt.candidates):
                values = [self.rounded(value, machine) for value in values]
        return Block(words, header, values)

    @staticmethod
    def _sum(pairs):
        return over_places(jnp.add, [without_last_bit(a * b) for a, b in pairs])

    def _stochastic(self, value, noise):
        """Return the payload of the scale above or below `value`. Their difference is a power of two."""
        scale = cast(TableScale, self.fmt.scale)
        nearest = scale.encode(value)
        lower = jnp.where(scale.decode(nearest) > value, nearest - 1, nearest)
        upper = jnp.minimum(lower + 1, scale.top)
        down = scale.decode(lower)
        return jnp.where(noise * (scale.decode(upper) - down) < value - down, upper, lower)


def _quotient(a, b, machine):
    """Return a / b, correctly rounded."""
    b = jnp.broadcast_to(b, a.shape)
    return correct_quotient(a, b, a / b) if machine is None else machine.quotient(a, b)


def _quotients(numbers, b, machine):
    """Return a / b for each number a, correctly rounded.

    The product with the correctly rounded reciprocal is the nearest float or one beside it: it is off by less than one
    unit before it is rounded. With a fused remainder two steps make of it the nearest one (Markstein).
    """
    inverse, quotients = _quotient(jnp.ones_like(b), b, machine), []
    if machine is None:
        return [correct_quotient(a, b, a * inverse) for a in numbers]
    for a in numbers:
        quotient = a * inverse
        for _ in range(2):
            quotient = machine.fma(machine.fma(quotient, -b, a), inverse, quotient)
        quotients.append(quotient)
    return quotients
