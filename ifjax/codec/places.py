"""Format-independent encoder and decoder for kernels, with one array for each place (position) of a block.

An encoder also takes one array for all places, as its first axis; what belongs to a block then has a first axis of one.
The results have the bits of `encode` and `decode`. The arithmetic suits processors without division but with table
lookup. Within one tensor, the value of a code depends only on the payload of its block, so XLA computes a table of the
values beforehand, with the codec's own functions.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.codec.blocks import pick, tree
from ifjax.codec.decode import decode, grid_values, narrowed, scaled, unscaled
from ifjax.codec.encode import Encoding, codes_of, inverse_for, keep_negative
from ifjax.codec.headers import LARGE_AMAX, Units, normalized, power_near
from ifjax.codec.losses import LOSSES, BlockLoss
from ifjax.codec.place_grids import Machine, PlaceGrid, Steps, place_grid, select, with_sign
from ifjax.codec.rounding import noise_of, uniform_noise
from ifjax.codec.search import better
from ifjax.formats import Candidate, Format, Grid, TableScale
from ifjax.formats.floats import BinaryFloat, as_float, bits_of, magnitude_bits
from ifjax.numerics.xla import correct_quotient, divide

LANES = 128  # entries in a row of a table


# Maps (row of the table, int32 indices below 128) to float32 numbers. With one array for all places, it may take rows.
Lookup = Callable[[Any, jax.Array], jax.Array]


class Tensor(NamedTuple):
    """Tensor-wide numbers of a kernel; scalars are float32.

    Attributes:
        power: factor from x to the units of losses.
        amax: amax in these units.
        ratio: K / amax, or 0 if amax is 0.
        back: 1 / power.
        lookup: reads entries of the tensor's table.
    """

    power: Any
    amax: Any
    ratio: Any
    back: Any
    lookup: Lookup


class Block(NamedTuple):
    """An encoded block.

    Attributes:
        words: int32 words with the packed codes; upper bits of the last word may be unused. () if not wanted.
        header: int32.
        values: decoded values of the places, float32 numbers rounded to the codec's dtype, in arrays as those encoded.
            () if not wanted.
    """

    words: Sequence[jax.Array]
    header: jax.Array
    values: Sequence[jax.Array]


def encoder_refusal(how: Encoding) -> str | None:
    """Return why a kernel cannot encode like this place by place; None if it can."""
    if how.search is not None:
        return "it searches scales"
    if not isinstance(how.loss, BlockLoss):
        return "its loss is a function of whole blocks"
    if how.rounding.noise not in (None, uniform_noise):
        return "its noise is not the hash that kernels compute"
    return _refusal_of_range(how.fmt) or _refusal(how.fmt)


def _overflows(fmt):
    if not (fmt.has_tensor_scale and isinstance(fmt.scale, TableScale)):
        return False
    largest = max(c.grid.max * c.step + abs(c.offset) for c in fmt.candidates)
    return float(LARGE_AMAX) * fmt.scale.values[fmt.scale.top] * largest > float(np.finfo(np.float32).max)


def decoder_refusal(fmt: Format) -> str | None:
    """Return why a kernel cannot decode this format place by place; None if it can."""
    if fmt.bits <= 4:
        return _refusal(fmt)
    if not all(decoding.grid.magnitudes for decoding in fmt.decodings):
        return f"codes of {fmt.bits} bits are too many to look up, and their values are not symmetric"
    return _refusal(fmt) or _refusal_of_range(fmt)


def _refusal_of_range(fmt):
    if _overflows(fmt):
        return f"decoding overflows where amax is near {LARGE_AMAX:.0e}, and a kernel's values would not"
    return None


def _refusal(fmt):
    if fmt.scale.nbytes > 1 or fmt.scale.runs:
        return f"{fmt.scale.name} has headers of several bytes, or scales for parts of a block"
    if not isinstance(fmt.scale, TableScale) or not fmt.scale.is_arithmetic:
        return f"{fmt.scale.name} is no binary float, whose bits a kernel computes"
    if fmt.block not in (8, 16, 32):
        return f"blocks are of {fmt.block}, and kernels take 8, 16 and 32"
    return None


@dataclasses.dataclass(frozen=True)
class PlaceCodec:
    """The arithmetic of an encoding. Hashable, so that it can be a static argument of kernels.

    Attributes:
        how: the encoding.
        dtype: float32, bfloat16 or float16, to which returned values are rounded.
        in_multiples: whether `encode` returns values as multiples of the tensor's factor amax / K.
    """

    how: Encoding
    dtype: np.dtype
    in_multiples: bool = False

    @property
    def fmt(self) -> Format:
        """Record of the format."""
        return self.how.fmt

    @property
    def block(self) -> int:
        """Number of values in a block."""
        return self.fmt.block

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.fmt.bits

    @property
    def is_square(self) -> bool:
        """Whether blocks are 2-D: B blocks of B values share a header."""
        return self.how.block_2d

    @property
    def corrects_runs(self) -> bool:
        """Whether a block draws one noise, and the blocks of a run of the rotation, kept in float32, are corrected."""
        return False

    @property
    def noises(self) -> int:
        """Number of noise values that an element draws."""
        return 0 if self.how.rounding.noise is None else len(self.fmt.candidates)

    @property
    def scalars(self) -> int:
        """Number of scalars that `encode` takes."""
        return 4

    @property
    def levels(self) -> int:
        """Number of values in a block's table, among which `encode` selects."""
        return self._first_listed(len(self.fmt.candidates)) - 1

    def noise(self, index: jax.Array, k0: Any, k1: Any, low: Any = 0) -> list[jax.Array]:
        """Return the noise of elements with these indices, one array for each candidate; `low` as for `noise_of`."""
        return noise_of(index, k0, k1, self.noises, low)

    # --- once per tensor, by XLA ---

    def stored_amax(self, amax: jax.Array, machine: Machine | None = None) -> jax.Array:
        """Return the amax of QTensors whose values have this amax."""
        del machine
        return amax

    def encoder_tables(self, amax: jax.Array | None, count: int) -> tuple[jax.Array, jax.Array]:
        """Return the scalars of `Tensor` [count, 4] and a table [count, rows, 128], whose last row begins with them.

        `amax` [count] has a value for each tensor; it is None in formats without a tensor scale.
        """
        how, fmt, length = self.how, self.fmt, LANES * self.pages
        payload = np.arange(length, dtype=np.int32)
        if amax is None:
            rows = [inverse_for(jnp.broadcast_to(payload, (count, 1, length)), None, None, 0, None, how)]
            return with_scalars(rows, [jnp.ones(count, jnp.float32)] * 4)
        tensor = normalized(amax, fmt.tensor_constant(how.headroom), 3)
        # The first row holds the inverses, which have no code.
        rows = [(0, 1.0), *((code, c.step) for c in fmt.candidates for code in _listed(c))]
        codes, steps = np.array([code for code, _ in rows], np.int32), np.array([step for _, step in rows], np.float32)
        shape = count, len(rows), length
        codes, payload, peaks, steps = _full(shape, tensor.amax, codes[:, None], payload, tensor.amax, steps[:, None])
        table = [inverse_for(payload[:, :1], None, None, 0, tensor, how)]
        for i, c in enumerate(fmt.candidates):
            at = slice(self._first_listed(i), self._first_listed(i + 1))
            scale, units = fmt.scale.decode(payload[:, at]), Units(tensor.power, peaks[:, at])
            values = grid_values(codes[:, at], c.decoding)
            table.append(scaled(values, scale, steps[:, at], units, fmt.tensor_constant(how.headroom)))
        return with_scalars(table, [tensor.power, tensor.amax, tensor.ratio, divide(1, tensor.power)])

    def factor(self, amax: jax.Array, machine: Machine | None = None) -> jax.Array:
        """Return the tensor's factor amax / K, for amax of any shape."""
        constant = jnp.full_like(amax, self.fmt.tensor_constant(self.how.headroom))
        return divide(amax, constant) if machine is None else machine.quotient(amax, constant)

    def rows_of_table(
        self, amax: jax.Array, machine: Machine | None = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return the numbers of `encoder_tables` for one tensor and the rows of its table, for kernels.

        The numbers are arrays [128], the rows arrays [n, 128] with n a power of two. amax [128] is the same in all
        lanes. Rows of zeros before the last one, and the last one, are the caller's.
        """
        fmt, quotient = self.fmt, divide if machine is None else machine.quotient
        constant = fmt.tensor_constant(self.how.headroom)
        power = power_near(amax)
        peak = amax * power
        ratio = jnp.where(peak > 0, quotient(jnp.full_like(peak, constant), peak), 0)
        unit, back = (quotient(jnp.ones_like(peak), a) for a in (ratio, power))

        def row_and_payload(count):
            row, lane = (lax.broadcasted_iota(jnp.int32, (count * self.pages, LANES), axis) for axis in (0, 1))
            return (row, lane) if self.pages == 1 else (row // self.pages, lane + row % self.pages * LANES)

        scale = unit[None] * fmt.scale.decode(row_and_payload(1)[1])
        rows = [jnp.where(scale > 0, quotient(jnp.ones_like(scale), scale), 0)]
        for c in fmt.candidates:
            values = [np.float32(c.grid.values[k]) + np.float32(c.offset) for k in _listed(c)]
            if values:
                row, payload = row_and_payload(len(values))
                masks = [(row & len(values) >> i) != 0 for i in range(1, len(values).bit_length())]
                numbers = _full(row.shape, peak[None], payload, peak[None], select(masks, values), np.float32(c.step))
                at, factor, value, step = numbers
                rows.append(_scaled(value * fmt.scale.decode(at), factor, step, constant, machine))
        return [power, peak, ratio, back], rows

    def decoder_table(self, amax: jax.Array | None, count: int) -> jax.Array:
        """Return the value of each code under each decoding, rounded to the dtype: [count, rows, 128].

        For codes of more than 4 bits it begins with the `amax` and `back` of `Tensor`, and the kernel computes values.
        """
        if self.fmt.bits > 4:
            tensor = normalized(jnp.ones(count) if amax is None else amax, np.float32(1), 1)
            numbers = jnp.stack([tensor.amax, divide(1, tensor.power)], -1)[:, None]
            return jnp.pad(numbers, ((0, 0), (0, 7), (0, LANES - 2)))
        fmt, length, rows = self.fmt, LANES * self._decoder_pages, []
        codes, payload = np.arange(2**fmt.bits, dtype=np.int32)[:, None], np.arange(length, dtype=np.int32)
        shape = count, 2**fmt.bits, length
        if amax is None:
            codes, payload = (jnp.broadcast_to(a, shape) for a in (codes, payload))
        else:
            amax = amax.reshape(-1, 1, 1)
            codes, payload, amax = _full(shape, amax, codes, payload, amax)
        for i in range(len(fmt.decodings)):
            values = decode(codes, fmt.join(i, payload), fmt, amax=amax, headroom=self.how.headroom)
            rows.append(narrowed(values, self.dtype).astype(jnp.float32))
        return _as_table(rows)

    # --- for each block, in the kernel ---

    def encode(
        self, xs: Sequence[jax.Array], noise: Any, scalars: Sequence[Any], lookup: Lookup, *, wants_codes: bool,
        wants_values: bool, across: Callable[[Any, jax.Array], jax.Array] | None = None, machine: Machine | None = None,
    ) -> Block:  # fmt: skip
        """Encode a block, given its float32 places xs. `noise` holds a list for each candidate, or is None.

        xs are as many arrays as a block has places, or one [places, ...]; noise is like them.
        For 2-D blocks, `across` maps (op, a) to the reduction of a by op over the rows of a 2-D block, in the order of
        `tree`. `machine` has instructions that save others and change no bits.
        """
        power, amax, ratio, back = scalars
        tensor = Tensor(power, amax, ratio, back, lookup)
        fmt, chooses = self.fmt, len(self.fmt.candidates) > 1
        loss = cast(BlockLoss, self.how.loss)  # see `encoder_refusal`
        if machine is None:
            peak = over_places(jnp.maximum, [magnitude_bits(bits_of(x)) for x in xs])
        else:
            peak = bits_of(over_places(machine.maximum, [jnp.abs(x) for x in xs]))
        peak = peak if across is None else across(jnp.maximum, peak)
        is_poisoned = peak >= np.int32(0x7F800000 + fmt.saturates)
        unit = power_near(as_float(peak)) if chooses and not fmt.has_tensor_scale else None
        numbers = [as_float(magnitude_bits(bits_of(x))) for x in xs] if self._on_magnitudes else xs
        numbers = [x * tensor.power for x in numbers] if fmt.has_tensor_scale else numbers
        trials, known = [], {}
        for i, c in enumerate(fmt.candidates):
            if (c.peak, c.scale_multiplier) not in known:
                payload = jnp.where(is_poisoned, fmt.scale.nan, self._payload(c, peak, tensor, machine))
                inverse = _look_up(lookup, 0, payload, self.pages)
                ys = [x * inverse for x in numbers]
                if machine is not None and noise is None and self._end is not None:
                    ys = [jnp.minimum(y, self._end) for y in ys]
                known[c.peak, c.scale_multiplier] = payload, inverse, ys
            payload, inverse, ys = known[c.peak, c.scale_multiplier]
            rs = [None] * len(xs) if noise is None else noise[i]
            trial = Trial(self, i, payload, inverse, tensor, xs, ys, rs, machine)
            words = trial.words() if wants_codes else []
            wants_given = wants_values and not self.in_multiples
            values = trial.values(given=not chooses) if chooses or wants_given else []
            lost = None
            if chooses:
                terms = [loss.term(_error(x, v, unit)) for x, v in zip(numbers, values, strict=True)]
                lost = over_places(loss.over, terms)
                if across is not None:  # reduce in both orders and combine, as the encoder does
                    of_places = over_places(loss.over, [across(loss.over, t) for t in terms])
                    lost = loss.over(across(loss.over, lost), of_places)
            returned = trial.multiples() if wants_values and self.in_multiples else values
            kept = [trial.sign_mask(), *returned] if wants_values else []
            trials.append((payload, lost, fmt.join(fmt.selector_of(c), payload), *words, *kept))
        (_, lost, header, *rest), *others = trials
        header, _, *rest = better((header, lost, *rest), others, fmt)
        words, values = rest, ()
        if wants_values:
            words, mask, values = rest[: -len(xs) - 1], rest[-len(xs) - 1], rest[-len(xs) :]
            is_given = self.in_multiples or not chooses
            values = values if is_given else [self.given(v, tensor, machine) for v in values]
            values = [signed(v, x, mask) for v, x in zip(values, xs, strict=True)] if self._on_magnitudes else values
        return Block(words, jnp.where(is_poisoned, fmt.scale.nan, header), values)

    def decode(
        self, words: Sequence[jax.Array], header: jax.Array, lookup: Lookup, *, machine: Machine | None = None
    ) -> list[jax.Array]:  # fmt: skip
        """Return the values at a block's places, float32 numbers rounded to the dtype."""
        fmt, pages = self.fmt, self._decoder_pages
        selector, payload = fmt.split(header)
        if fmt.bits > 4:
            amax, back = (lookup(0, jnp.full_like(header, i)) for i in range(2))
            tensor, scale = Tensor(None, amax, None, back, lookup), fmt.scale.decode(payload)
            step = pick(selector, [jnp.full_like(scale, d.step) for d in fmt.decodings])
            numbers = [unscaled(code, selector, fmt) for code in _unpacked(words, fmt.bits, fmt.block)]
            return [self.given(self.times_amax(n * scale, step, amax, machine), tensor, machine) for n in numbers]
        rows = [range(i * 2**fmt.bits, (i + 1) * 2**fmt.bits) for i in range(len(fmt.decodings))]
        levels = [[_look_up(lookup, row * pages, payload, pages) for row in each] for each in rows]
        return self._of_levels(words, [pick(selector, options) for options in zip(*levels, strict=True)])

    def decode_by_arithmetic(
        self, words: Sequence[jax.Array], header: jax.Array, amax: jax.Array | None, machine: Machine | None = None
    ) -> list[jax.Array]:
        """Return what `decode` returns, from a scalar amax instead of a table; None leaves the tensor's factor out.

        The value of a code of up to 4 bits is computed once for each block, as in `ifjax.codec.decode.decode`.
        """
        fmt, half = self.fmt, 2 ** (self.fmt.bits - 1)
        selector, payload = fmt.split(header)
        scale, zeros, back = fmt.scale.decode(payload), jnp.zeros_like(payload), jnp.float32(1)
        step = as_float(zeros + _picked(selector, np.array([d.step for d in fmt.decodings], np.float32)))
        if amax is not None:
            # The power of two leaves numbers large enough for `over`, and overflows where that of `safe` does.
            power, back = (
                jnp.where(amax < 1, np.float32(2.0**e), jnp.where(amax >= LARGE_AMAX, np.float32(2.0**-e), 1))
                for e in (64, -64)
            )
            zeros, amax, back = _full(payload.shape, amax, zeros, amax * power, back)
        values = np.array([d.grid.values for d in fmt.decodings], np.float32)
        offsets = np.array([[d.offset] for d in fmt.decodings], np.float32)
        values = np.where(offsets == 0, values, values + offsets)  # -0 + 0 is 0
        is_symmetric = np.array_equal(values[:, half:].view(np.int32), (-values[:, :half]).view(np.int32))

        def finished(scaled):
            if amax is None:
                return self._narrowed(scaled * step, machine)
            constant, exact = fmt.tensor_constant(self.how.headroom), None if _overflows(fmt) else machine
            value = _scaled(scaled, amax, step, constant, exact) * back
            if exact is not None:  # fused products add -0 and 0 to 0
                value = as_float(bits_of(value) | bits_of(scaled) & np.int32(-(2**31)))
            # E5M3's products may overflow: see `decode`.
            return value if self.dtype == np.float32 else self._narrowed(value, machine)

        if fmt.bits > 4:
            return [finished(unscaled(code, selector, fmt) * scale) for code in _unpacked(words, fmt.bits, fmt.block)]
        options = [_picked(selector, each) for each in values.T[: half if is_symmetric else 2 * half]]
        levels = [finished(as_float(zeros + each) * scale) for each in options]
        if machine is not None and fmt.bits == 4 and self.dtype == jnp.bfloat16:
            return _looked_up(words, fmt.block, levels, machine)
        if is_symmetric:
            levels += [-level for level in levels]
        return self._of_levels(words, levels)

    def _of_levels(self, words, levels):
        """Return levels[code] for each place of a block."""
        values = []
        for place in range(self.block):
            ats = [divmod(place * self.bits + bit, 32) for bit in reversed(range(self.bits))]
            values.append(select([(words[at] & _bit(bit)) != 0 for at, bit in ats], levels))
        return values

    def given(self, value: jax.Array, tensor: Tensor, machine: Machine | None = None) -> jax.Array:
        """Convert a value from units of the loss to the tensor's units, saturated and rounded to the dtype."""
        return self._narrowed(value * tensor.back if self.fmt.has_tensor_scale else value, machine)

    def _narrowed(self, value, machine):
        """Return float32 numbers saturated and rounded to the dtype, as `narrowed`."""
        end = np.float32(jnp.finfo(self.dtype).max)
        return self.rounded(lax.clamp(-end, value, end), machine)  # as `narrowed`

    def rounded(self, value: jax.Array, machine: Machine | None = None) -> jax.Array:
        """Return float32 numbers rounded to the dtype, ties to even, with infinity beyond its range."""
        if self.dtype == np.float32:
            return value
        if machine is not None:
            return machine.rounded(value, self.dtype)
        bits = bits_of(value)
        if self.dtype == jnp.bfloat16:
            return as_float(bits + 0x7FFF + (lax.shift_right_logical(bits, np.int32(16)) & 1) & np.int32(-(2**16)))
        # The sum with 2^13 times the power of two below has 11 bits for the magnitude; below 2^-14 all steps are equal.
        magnitude = magnitude_bits(bits)
        binade = lax.clamp(np.int32(113 << 23), magnitude & np.int32(0x7F800000), np.int32(143 << 23))
        large = as_float(binade + np.int32(13 << 23))
        near = (as_float(magnitude) + large) - large
        near = jnp.where(near > np.float32(jnp.finfo(self.dtype).max), np.float32(np.inf), near)
        return as_float(bits_of(near) | bits & np.int32(-(2**31)))

    def times_amax(self, d: jax.Array, step: Any, amax: Any, machine: Machine | None) -> jax.Array:
        """Return d * amax * step / K, each operation rounded once (see `decode.scaled`); without amax, d * step."""
        if self.fmt.has_tensor_scale:
            return _scaled(d, amax, step, self.fmt.tensor_constant(self.how.headroom), machine)
        return d if not isinstance(step, jax.Array) and step == 1 else d * step

    def first_row(self, i: int) -> int:
        """Return the first row of candidate i in the encoder's table."""
        return self._first_listed(i) * self.pages

    def _first_listed(self, i):
        return 1 + sum(len(_listed(c)) for c in self.fmt.candidates[:i])

    @property
    def pages(self) -> int:
        """Number of rows that hold one number for each payload in the encoder's table."""
        return -(-(max(self.fmt.scale.top, self.fmt.scale.nan) + 1) // LANES)

    @property
    def _decoder_pages(self) -> int:
        """Number of rows that hold one number for each payload in the decoder's table, where any payload may occur."""
        return 1 if self.fmt.has_selector and self.fmt.scale.bits < 8 else 2

    def grid_of(self, c: Candidate) -> PlaceGrid | None:
        """Return the PlaceGrid that rounds to a candidate's grid, or None if there is none."""
        return place_grid(c)

    @functools.cached_property
    def _on_magnitudes(self) -> bool:
        """Whether encoding works on magnitudes and adds signs last, which needs symmetric grids and an even loss."""
        grids = [place_grid(c) for c in self.fmt.candidates]
        even = getattr(self.how.loss, "term", None) in [loss.term for loss in LOSSES.values()]
        return even and all(grid is not None and grid.is_symmetric for grid in grids)

    @functools.cached_property
    def _end(self) -> np.float32 | None:
        """A number at which scaled magnitudes may be clamped once for all candidates; None if there is none.

        In units of each candidate it rounds to the largest magnitude.
        """
        if not self._on_magnitudes:
            return None
        fmt, end = self.fmt, np.float32(self.fmt.grid.max)
        ends = [end * fmt.input_factor(c) for c in fmt.candidates]
        is_shared = all(abs(e - c.grid.max) < 1e-6 * c.grid.max for e, c in zip(ends, fmt.candidates, strict=True))
        return end if is_shared else None

    def _payload(self, c, peak, tensor, machine):
        """Return a candidate's payload for a block whose largest magnitude has the bits `peak`."""
        fmt, quantum, peak = self.fmt, self.fmt.block_peak(c, self.how.headroom), as_float(peak)
        if fmt.has_tensor_scale:
            scale = over(peak * tensor.power, quantum, machine) * tensor.ratio
        else:
            # Small peaks are scaled up, so that their quotients are normal numbers, whose last bits can be corrected.
            is_small = peak < np.float32(2.0**-60)
            scale = over(jnp.where(is_small, peak * np.float32(2.0**64), peak), quantum, machine)
            scale = jnp.where(is_small, scale * np.float32(2.0**-64), scale)
            scale = jnp.where(peak > 0, jnp.maximum(scale, np.float32(2.0**-126)), 0)
        scale = scale if c.scale_multiplier == 1 else scale * np.float32(c.scale_multiplier)
        payload = fmt.scale.encode(scale)
        return jnp.maximum(payload, 1) if fmt.prevent_zero else payload


class Trial:
    """A block as candidate i encodes it. ys are xs scaled by `inverse`, as magnitudes if the codec works on those."""

    def __init__(self, codec: PlaceCodec, i: int, payload, inverse, tensor: Tensor, xs, ys, rs, machine):
        self.codec, self.i, self.c = codec, i, codec.fmt.candidates[i]
        self.grid = codec.grid_of(self.c)
        if machine is not None and codec._on_magnitudes and codec.fmt.has_tensor_scale:
            self.grid = Steps.of(self.c.grid) or self.grid
        if machine is not None and rs[0] is None and codec._end is not None and self.grid is not None:
            self.grid = self.grid.unbounded
        self.payload, self.inverse, self.tensor, self.xs, self.machine = payload, inverse, tensor, xs, machine
        fmt = codec.fmt
        if self.grid is None:
            power = tensor.power if fmt.has_tensor_scale else 1
            self.places = [codes_of(x, r, inverse, power, [self.c], fmt)[0] for x, r in zip(xs, rs, strict=True)]
            return
        factor = fmt.input_factor(self.c)
        if self.c.grid.zero == "negative":
            power = inverse * tensor.power if fmt.has_tensor_scale else inverse
            ys = [keep_negative(y, x, power) for y, x in zip(ys, xs, strict=True)]
        if not self.grid.is_symmetric:  # code 0 may not mean 0, so blocks with a zero scale need zeros; inf * 0 is NaN
            ys = [jnp.where(inverse == 0, 0, y) for y in ys]
        ys = [jnp.abs(y) for y in ys] if self.is_signed_last else ys
        ys = ys if factor == 1 else [y * factor for y in ys]
        ys = [y - np.float32(self.c.offset) for y in ys] if self.c.offset else ys
        self.places = [self.grid.rounded(y, r, machine) for y, r in zip(ys, rs, strict=True)]

    @property
    def is_signed_last(self) -> bool:
        """Whether this grid rounds magnitudes although the codec as a whole works on signed numbers."""
        return self.grid is not None and self.grid.is_symmetric and not self.codec._on_magnitudes

    def words(self) -> list[jax.Array]:
        """Return the int32 words of the block's packed codes."""
        bits, grid, machine = self.codec.fmt.bits, self.grid, self.machine
        if grid is None:
            return _packed([functools.partial(jnp.left_shift, code) for code in _rows(self.places)], bits)
        if not grid.is_symmetric:
            return self._packed()
        if bits != 4:
            pairs = zip(self.places, self.xs, strict=True)
            codes = [with_sign(grid.code(place, 0), bits_of(x) < 0, self.c.grid) for place, x in pairs]
            words = _packed([functools.partial(jnp.left_shift, code) for code in _rows(codes)], bits)
        else:
            if machine is None:
                xs, words = _rows(self.xs), self._packed()
                signs = [_signs_of(xs[8 * i :][:8]) for i in range(len(words))]
            else:
                words = _permuted(_rows([grid.low_bits(place) for place in self.places]), 0, 7, machine)
                signs = _permuted(_rows([bits_of(x) for x in self.xs]), 3, 8, machine)
            words = [_with_signs(word, sign, self.c.grid) for word, sign in zip(words, signs, strict=True)]
        return [jnp.where(self.inverse == 0, 0, word) for word in words]

    def _packed(self):
        """Return the words of the codes of all places, without signs where the grid rounds magnitudes."""
        grid, bits = cast(PlaceGrid, self.grid), self.codec.fmt.bits
        if len(self.places) > 1:
            return _packed([functools.partial(grid.code, place) for place in self.places], bits)
        codes = _rows([grid.code(place, 0) for place in self.places])
        if bits == 4 and self.machine is not None:
            return _permuted(codes, 0, 15, self.machine)
        return _packed([functools.partial(jnp.left_shift, code) for code in codes], bits)

    def magnitudes(self) -> list[jax.Array]:
        """Return the magnitudes of the rounded numbers, in units of the first grid, without any scale."""
        grid, step = self.grid, np.float32(self.c.step)
        assert grid is not None
        if isinstance(grid, Steps):
            return [(place - grid.zero) * step for place in self.places]
        if isinstance(grid, BinaryFloat):
            return [grid.number(place) * step for place in self.places]
        levels: list[Any] = [np.float32(self.c.grid.magnitudes[code]) * step for code in grid.listed]
        return [grid.value(place, levels) for place in self.places]

    def values(self, given: bool) -> list[jax.Array]:
        """Return the decoded values, in units of the loss, or with `given` as they are returned to the caller."""
        codec, fmt, c, tensor, grid = self.codec, self.codec.fmt, self.c, self.tensor, self.grid
        finish = functools.partial(codec.given, tensor=tensor, machine=self.machine) if given else lambda value: value
        if grid is None:
            return [finish(self._decoded(grid_values(code, c.decoding))) for code in self.places]
        if isinstance(grid, Steps) and self.machine is not None and fmt.has_tensor_scale:
            scale = fmt.scale.decode(self.payload)
            zero = scale * -grid.zero
            values = [finish(self._times_amax(self.machine.fma(total, scale, zero))) for total in self.places]
        elif not grid.listed or (self.machine is not None and grid.is_computed):
            numbers = [grid.number(place, self.machine) for place in self.places]
            numbers = [number + np.float32(c.offset) for number in numbers] if c.offset else numbers
            values = [finish(self._decoded(number)) for number in numbers]
        else:
            is_early = fmt.has_tensor_scale and codec.dtype != np.float16  # products are then exact and in the range
            levels = [finish(level) for level in self._levels()] if is_early else self._levels()
            values = [grid.value(place, levels) for place in self.places]
            values = values if is_early else [finish(value) for value in values]
        if self.is_signed_last:
            mask = self.sign_mask()
            values = [signed(v, x, mask) for v, x in zip(values, self.xs, strict=True)]
        return values

    def multiples(self) -> list[jax.Array]:
        """Return the decoded values as multiples of the tensor's factor, rounded to the dtype."""
        codec, fmt, c, grid = self.codec, self.codec.fmt, self.c, self.grid
        scale, step = fmt.scale.decode(self.payload), np.float32(c.step)
        if grid is None:
            values = [grid_values(code, c.decoding) * scale for code in self.places]
        elif isinstance(grid, Steps):
            assert self.machine is not None
            zero = scale * -grid.zero
            values = [self.machine.fma(total, scale, zero) for total in self.places]
        else:
            levels = [(np.float32(c.grid.values[k]) + np.float32(c.offset)) * scale for k in _listed(c)]
            values = [grid.value(place, levels) for place in self.places]
        values = values if step == 1 else [value * step for value in values]
        if not is_exact(fmt, c, codec.dtype):
            values = [codec._narrowed(value, self.machine) for value in values]
        if self.is_signed_last:
            mask = self.sign_mask()
            values = [signed(v, x, mask) for v, x in zip(values, self.xs, strict=True)]
        return values

    def _levels(self):
        codec, fmt, c = self.codec, self.codec.fmt, self.c
        if not fmt.has_tensor_scale:
            return [self._decoded(np.float32(c.grid.values[k]) + np.float32(c.offset)) for k in _listed(c)]
        row, count, payload = codec.first_row(self.i), len(_listed(c)), self.payload
        look_up = functools.partial(_look_up, self.tensor.lookup, index=payload, pages=codec.pages)
        if len(self.xs) > 1:
            return [look_up(row + i * codec.pages) for i in range(count)]
        rows = row + lax.broadcasted_iota(jnp.int32, (count, *payload.shape[1:]), 0) * codec.pages
        return _rows([look_up(rows)])

    def sign_mask(self) -> jax.Array:
        """Return the int32 that `signed` adds to a magnitude's bits, so that the top bit tells if it may have a sign.

        Zeros have no sign if the grid has no -0, or if the block's scale is zero.
        """
        never = np.int32(2**31 - 1)
        if self.c.grid.zero == "unsigned":
            return jnp.full_like(self.payload, never)
        return jnp.where(self.inverse == 0, never, np.int32(-(2**31)))

    def _decoded(self, value):
        """Return a grid value multiplied by its scales, in units of the loss (see `decode.scaled`)."""
        return self._times_amax(value * self.codec.fmt.scale.decode(self.payload))

    def _times_amax(self, d):
        return self.codec.times_amax(d, self.c.step, self.tensor.amax, self.machine)


def _scaled(d, amax, step, constant: np.float32, machine: Machine | None):
    """Return d * amax * step / K, each operation rounded once (see `decode.scaled`)."""
    d = d * amax
    return over(d if not isinstance(step, jax.Array) and step == 1 else d * step, constant, machine)


@functools.cache
def is_exact(fmt: Format, c: Candidate, dtype: np.dtype) -> bool:
    """Return whether the dtype represents a candidate's values times every scale exactly."""
    values = np.array(c.grid.values, np.float64) + c.offset
    products = np.outer(values, np.array(cast(TableScale, fmt.scale).values)) * np.float64(c.step)
    with np.errstate(over="ignore"):  # what overflows is not exact
        return bool(np.all(products.astype(dtype).astype(np.float64) == products))


def _listed(c: Candidate) -> tuple[int, ...]:
    """Return the codes whose values are in the encoder's table."""
    grid = place_grid(c)
    return () if grid is None else grid.listed


def _full(shape, amax, *arrays):
    """Broadcast int32 and float32 arrays to a shape, hidden from XLA's simplification.

    XLA would reassociate and fold factors that are scalars or constants. It cannot, where each element depends on bits
    of amax that it does not know to be zero. Barriers would do too, but cost a GPU a launch each.
    """
    zero = (jnp.broadcast_to(bits_of(amax), shape) & np.int32(1)) >> np.int32(1)
    zeros = lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) & zero
    full = []
    for a in map(jnp.asarray, arrays):
        a = jnp.broadcast_to(a, shape)
        full.append(as_float(bits_of(a) + zeros) if a.dtype == jnp.float32 else a + zeros)
    return full


def with_scalars(rows, numbers):
    """Return the numbers as [count, 4], and the table of these rows with the numbers at the start of its last row."""
    numbers = jnp.stack([number.reshape(-1) for number in numbers], -1)
    table = _as_table(rows, jnp.pad(numbers, ((0, 0), (0, LANES - numbers.shape[1]))))
    return table[:, -1, : numbers.shape[1]], table


def _as_table(rows, *last):
    """Concatenate [count, n, length] arrays to a table of rows of 128 lanes, padded to a multiple of 8 rows.

    `last` are further rows [count, 128], which end the table.
    """
    rows = [a.reshape(len(a), -1, LANES) for a in rows]
    padding = jnp.zeros((len([*rows, *last][0]), -(sum(a.shape[1] for a in rows) + len(last)) % 8, LANES), jnp.float32)
    return jnp.concatenate([*rows, padding, *(a[:, None] for a in last)], 1)


def _look_up(lookup: Lookup, row, index, pages):
    """Return entry `index` of a table entry that spans `pages` rows of 128, beginning at `row`."""
    if pages == 1:
        return lookup(row, index)
    low = index & (LANES - 1)
    return jnp.where(index < LANES, lookup(row, low), lookup(row + 1, low))


def _picked(selector, options: np.ndarray) -> Any:
    """Return the bits of options[selector], float32 numbers, as an int32 array, or the int32 that all have."""
    bits = list(options.view(np.int32))
    return bits[0] if len(set(bits)) == 1 else pick(selector, [jnp.full_like(selector, each) for each in bits])


def _looked_up(words, block, levels, machine):
    """Return for each place of a block the level of its 4-bit code, float32 numbers rounded to bfloat16.

    The eight or 16 levels are split into planes of bytes, from which a permutation takes those of four codes at a time.
    Eight levels are those of the codes without the highest bit, a sign.
    """
    bits = [bits_of(level) for level in levels]
    pairs = [lax.shift_right_logical(a, np.int32(16)) | b for a, b in zip(bits[::2], bits[1::2], strict=True)]
    fours = list(zip(pairs[::2], pairs[1::2], strict=True))
    planes = [[machine.permute(a, b, selector) for a, b in fours] for selector in (0x6420, 0x7531)]
    values = []
    for i in range(0, block, 4):
        codes = words[i // 8] if i % 8 == 0 else lax.shift_right_logical(words[i // 8], np.int32(16))
        index = codes & np.int32(0x7777)
        ones = jnp.full_like(codes, np.uint32(0x80808080).view(np.int32))
        signs = machine.permute(ones, ones, codes & np.int32(0xFFFF))  # 0x80, or 0xFF where a code's highest bit is set
        low, high = (machine.permute(plane[0], plane[1], index) for plane in planes)
        if len(levels) == 8:
            high = high ^ signs << 7 & np.uint32(0x80808080).view(np.int32)
        else:
            mask = (signs & np.int32(0x01010101)) * np.int32(0xFF)
            low, high = (
                mask & machine.permute(plane[2], plane[3], index) | ~mask & part
                for plane, part in zip(planes, (low, high), strict=True)
            )
        for selector in (0x5140, 0x7362):
            word = machine.permute(low, high, selector)
            values += [as_float(word << 16), as_float(word & np.int32(-(2**16)))]
    return values


def over(a: jax.Array, b: np.float32, machine: Machine | None = None) -> jax.Array:
    """Return a / b, correctly rounded. The product with the reciprocal is within 1.5 units and is then corrected.

    With fused multiply-adds, two numbers represent 1 / b, with a relative error below 2^-48. That rounds correctly if b
    is an integer below 2^20 times a power of two: a / b is then at least 2^-21 units from the middle of two floats
    (Brisebarre and Muller). Otherwise a fused remainder corrects a quotient within one unit (Markstein): the product,
    if the reciprocal adds no more than half a unit to its rounding, or else the product corrected once.
    """
    exact, inverse = 1 / np.float64(b), np.float32(1 / np.float64(b))
    quotient = a * inverse
    if machine is None:
        return correct_quotient(a, jnp.full_like(a, b), quotient)
    mantissa = int(math.frexp(b)[0] * 2**24)
    if mantissa // (mantissa & -mantissa) < 2**20:
        return machine.fma(a, float(inverse), a * np.float32(exact - np.float64(inverse)))
    for _ in range(1 if abs(np.float64(inverse) * np.float64(b) - 1) <= 2.0**-25 else 2):
        quotient = machine.fma(machine.fma(quotient, -float(b), a), float(inverse), quotient)
    return quotient


def _error(x, value, unit):
    return value - x if unit is None else value * unit - x * unit


def _bit(i: int) -> np.int32:
    return np.uint32(1 << i).view(np.int32)


def over_places(op: Callable[[jax.Array, jax.Array], jax.Array], parts: Sequence[jax.Array]) -> jax.Array:
    """Reduce the places of a block by op, in the order of `tree`."""
    if len(parts) > 1:
        return tree(op, parts)
    (places,) = parts
    while len(places) > 1:
        places = op(*_halves(places))
    return places


def _rows(parts):
    """Return an array for each place of a block."""
    rows = list(parts)
    while len(parts) == 1 and len(rows[0]) > 1:
        rows = [half for row in rows for half in _halves(row)]
    return rows


def _halves(places):
    """Return the halves of an array along its first axis, a power of two. Triton splits along a last axis of two."""
    return jnp.unstack(jnp.moveaxis(places.reshape(2, -1, *places.shape[1:]), 0, -1), axis=-1)


def _packed(codes, bits: int) -> list[jax.Array]:
    """Pack codes into int32 words, the first in the lowest bits; each code is a function of its left shift."""
    words: list[list] = [[] for _ in range(-(-len(codes) * bits // 32))]
    for place, code in enumerate(codes):
        at, shift = divmod(place * bits, 32)
        words[at].append(code(shift))
        if shift + bits > 32:
            words[at + 1].append(lax.shift_right_logical(code(0), np.int32(32 - shift)))
    return [tree(jnp.bitwise_or, parts) for parts in words]


def _unpacked(words, bits: int, count: int) -> list[jax.Array]:
    """Return the codes that `_packed` packed; bits above a code's are arbitrary."""
    codes = []
    for place in range(count):
        at, shift = divmod(place * bits, 32)
        code = lax.shift_right_logical(words[at], np.int32(shift))
        codes.append(code if shift + bits <= 32 else code | words[at + 1] << 32 - shift)
    return codes


def _permuted(numbers, byte: int, mask: int, machine: Machine) -> list[jax.Array]:
    """Return int32 words with a nibble of each of the numbers, the first in the lowest bits.

    It is (byte & mask) of the number's byte, or of that byte shifted down by 4 for the byte 3.
    """
    selector = byte | byte + 4 << 4
    words = []
    for i in range(0, len(numbers), 8):
        even, odd = (
            machine.permute(machine.permute(a, b, selector), machine.permute(c, d, selector), 0x5410)
            for a, b, c, d in (numbers[i : i + 8 : 2], numbers[i + 1 : i + 8 : 2])
        )
        even, odd = (even, odd << 4) if byte == 0 else (lax.shift_right_logical(even, np.int32(4)), odd)
        masks = [np.uint32(mask * times).view(np.int32) for times in (0x01010101, 0x10101010)]
        words.append(even & masks[0] | odd & masks[1])
    return words


def _signs_of(xs):
    """Return a word whose nibbles have the signs of eight numbers in their highest bits."""
    signs = [lax.shift_right_logical(bits_of(x), np.int32(28 - 4 * i)) & _bit(4 * i + 3) for i, x in enumerate(xs)]
    return tree(jnp.bitwise_or, signs)


def _with_signs(word, signs, grid: Grid):
    """Combine a word of eight 4-bit magnitude codes with the signs of the eight numbers."""
    if grid.zero == "unsigned":
        signs = signs & (word + np.int32(0x77777777))  # bit 3 of a nibble that is not zero
    if not grid.is_twos_complement:
        return word | signs
    ones = lax.shift_right_logical(signs, np.int32(3))
    return (word ^ ((ones << 4) - ones)) + ones


def signed(magnitude: jax.Array, x: jax.Array, mask: jax.Array) -> jax.Array:
    """Return a magnitude with the sign of x, if the mask of `Trial.sign_mask` lets it have one."""
    bits = bits_of(magnitude)
    return as_float(bits | (bits + mask) & bits_of(x) & np.int32(-(2**31)))
