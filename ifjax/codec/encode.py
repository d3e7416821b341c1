"""The encoder for all formats.

    blocks -> amax -> for each candidate: header, loss -> selection -> codes

All arithmetic is float32 with one rounding per operation, in the order of the published code (arXiv 2603.28765).
`reference` is the algorithm in its simplest form. The two implementations below it compute the same bits and are laid
out for compilers.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.codec.blocks import (
    gather_squares,
    insert_axis,
    largest_divisor,
    pick,
    places,
    repeat,
    split_blocks,
    tree,
    tree_along,
    unstack,
)
from ifjax.codec.decode import scaled, times_scales
from ifjax.codec.headers import header_bytes, normalized, power_near
from ifjax.codec.joint import joint_scale
from ifjax.codec.losses import LOSSES, BlockLoss, Loss, get_loss, without_last_bit
from ifjax.codec.rounding import NEAREST, ROUNDINGS, Rounding
from ifjax.codec.search import SEARCHES, Search, best_trial, better, word_parts
from ifjax.formats import Candidate, Format, get_format
from ifjax.formats.floats import as_float, bits_of, magnitude_bits
from ifjax.numerics.distinct import distinct
from ifjax.numerics.mapped import has_mesh, mapped, unchanged
from ifjax.numerics.xla import by_platform, depending_on, divide, materialize, undivided, where


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How values are encoded. Hashable, so that it can be a static argument of jitted functions.

    Attributes:
        fmt: the format.
        rounding: rounding of elements.
        loss: the loss by which a block chooses its candidate and searched scale.
        search: scales to try besides the one given by the block's maximum; None tries no others.
        block_2d: whether square blocks over the last two axes share a header.

    Raises:
        ValueError: the settings do not fit together.
    """

    fmt: Format
    rounding: Rounding = NEAREST
    loss: Loss = LOSSES["mse"]
    search: Search | None = None
    block_2d: bool = False

    def __post_init__(self):
        if self.search is not None and self.rounding.draws:
            raise ValueError(
                "search keeps the scale with the least error, which biases stochastic rounding: use only one of them"
            )
        if self.search is not None and self.search.rounds and not self.fmt.has_tensor_scale:
            raise ValueError(
                f"search={self.search.name!r} fits the tensor's scale, and {self.fmt.name} has none: use another "
                "search, such as 'least_squares' or 'fast'"
            )
        if self.search is not None and self.search.rounds and self.block_2d:
            raise ValueError(
                f"search={self.search.name!r} sums over 1-D blocks: leave block_2d out, or use another search"
            )
        if self.block_2d and self.fmt.scale.runs:
            raise ValueError(f"{self.fmt.name} scales parts of a block, which squares cannot share: use 1-D blocks")

    @classmethod
    def of(
        cls, fmt: "str | Format | Encoding", *, rounding: str | Rounding = NEAREST, loss: Loss | None = None,
        search: str | Search | None = None, block_2d: bool = False,
    ) -> "Encoding":  # fmt: skip
        """Return an Encoding, with settings looked up by name. An Encoding is returned unchanged.

        Raises:
            ValueError: a name is unknown, settings do not fit together, or an Encoding came with other settings.
            TypeError: a setting has the wrong type.
        """
        if isinstance(fmt, Encoding):
            if (ROUNDINGS.find(rounding), loss, search, block_2d) != (NEAREST, None, None, False):
                raise ValueError("an Encoding says how values are rounded, chosen and searched: pass no other settings")
            return fmt
        return cls(
            get_format(fmt), ROUNDINGS.find(rounding), get_loss("mse" if loss is None else loss),
            None if search is None else SEARCHES.find(search), block_2d,
        )  # fmt: skip

    @property
    def headroom(self) -> float:
        """Fraction of the range that is used."""
        return self.rounding.headroom


def reference(x: jax.Array, fmt: Format, amax: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Encode one block x [B] of finite numbers by the least squared error; return int32 codes [B] and an int32 header.

    A readable statement of the algorithm, against which the encoder is tested. `amax` is the tensor's, by default x's.
    """
    peak = jnp.max(jnp.abs(x))
    amax, constant = peak if amax is None else amax, fmt.tensor_constant()
    tensor = normalized(amax, constant, 0) if fmt.has_tensor_scale else None
    power = 1 if tensor is None else tensor.power
    best: Any = None
    for candidate in fmt.candidates:
        runs = [list(jnp.max(jnp.abs(x.reshape(-1, run)), axis=1)) for run in fmt.scale.runs]
        payload = wanted_payload(candidate, bits_of(peak), runs, tensor, fmt, 1.0)
        place = jnp.arange(fmt.block)
        scale, inverse = fmt.scale.decode(payload, place), _inverse(payload, place, tensor, fmt)
        (codes,) = codes_of(x, None, inverse, power, [candidate], fmt)
        values = candidate.grid.decode(codes) + np.float32(candidate.offset)
        decoded = scaled(values, scale, candidate.step, tensor, fmt.tensor_constant())
        loss = tree(jnp.add, [e * e for e in decoded - x * power])
        header = fmt.join(fmt.selector_of(candidate), payload)
        wins = best is not None and bool((loss <= best[0] if fmt.ties == "last" else loss < best[0]) & (payload != 0))
        best = (loss, codes, header) if best is None or wins else best
    return best[1:]


def encode(
    blocks: jax.Array,
    how: Encoding,
    *,
    axis: int,
    amax: jax.Array | None = None,
    amax_axes: tuple[int, ...] = (),
    noise: Sequence[jax.Array] | None = None,
    weights: jax.Array | None = None,
    in_multiples: bool = False,
) -> tuple[jax.Array, Any, jax.Array | None]:
    """Encode blocks [..., m, B, ...] (see `split_blocks`) to codes and headers.

    Args:
        axis: the negative axis of B. With `how.block_2d` the other axis of the 2-D blocks is -3 - axis, and its length
            must be a multiple of B.
        amax: float32, in the shape that `amax_axes` implies; None takes it from the finite values. Ignored by formats
            without a tensor scale.
        amax_axes: axes of the block grid [..., m, ...] whose entries each keep their own amax.
        noise: for each candidate, float32 in [-1/2, 1/2) of the shape of `blocks`, if `how.rounding` has noise.
        weights: float32 >= 0 [m, B]: weights of the losses of values along the axis, equal for all other axes.
        in_multiples: return what `decode` without amax gives, except for the sign of zeros, and no headers.

    Returns:
        uint8 codes [..., m, B, ...] (with `in_multiples` float32 values), uint8 headers [..., m * W, ...] and amax. The
        amax is None without a tensor scale; otherwise its axes reach to the last of `amax_axes`, with length 1 where
        `amax_axes` skips an axis.
    """
    encoded = functools.partial(_encode, how=how, axis=axis, amax_axes=amax_axes, in_multiples=in_multiples)
    arguments = blocks, amax, None if noise is None else tuple(noise), weights
    if how.search is not None or not _suits_parts(how.fmt, blocks.size):
        return encoded(*arguments)
    in_parts = functools.partial(encoded, in_parts=True)
    shape, at = _with_long_axes(blocks.shape, axis, max(amax_axes, default=-1) + 1)
    if shape == blocks.shape or weights is not None or how.block_2d or has_mesh(blocks):
        return by_platform(*arguments, cpu=distinct(in_parts), default=encoded)

    def regrouped(blocks, amax, noise, weights):
        noise = noise and tuple(r.reshape(shape) for r in noise)
        codes, headers, amax = in_parts(blocks.reshape(shape), amax, noise, weights, axis=at)
        if headers is not None:
            end = blocks.ndim + axis
            headers = headers.reshape(*blocks.shape[: end - 1], -1, *blocks.shape[end + 1 :])
        return codes.reshape(blocks.shape), headers, amax

    on_cpu = functools.partial(undivided, run=distinct(regrouped), default=distinct(in_parts))
    return by_platform(*arguments, cpu=on_cpu, default=encoded)


def _with_long_axes(shape, axis, lead):
    """Return a shape for blocks [..., m, B, ...] whose loops over blocks are long and nested, and its axis of B.

    LLVM unrolls short loops, and inlines a large function only into nested ones; it vectorizes no loop that calls one.
    The first `lead` axes stay.
    """
    at = len(shape) + axis
    loops = (*shape[:at], *shape[at + 1 :])
    if lead >= at or not all(isinstance(n, int) and n for n in shape):
        return shape, axis
    before, after = math.prod(shape[lead:at]), math.prod(shape[at + 1 :])
    inner = largest_divisor(before, 1024) if after == 1 else largest_divisor(after, 1024) if before == 1 else after
    if inner == 1 or (inner <= loops[-1] and math.prod(loops[:-1]) > 1):
        return shape, axis
    if after == 1:
        return (*shape[:lead], before // inner, inner, shape[at]), -1
    return (*shape[:lead], before, shape[at], after // inner, inner), -3


def _encode(blocks, amax, noise, weights, *, how, axis, amax_axes, in_multiples, in_parts=False):
    fmt, by_elements = how.fmt, mapped if in_parts else unchanged

    def measured(blocks, amax):
        peaks, runs = block_peaks(blocks, axis, how, in_parts=in_parts)
        if not fmt.has_tensor_scale:
            return peaks, runs, None, None
        if amax is None:
            amax = amax_of(by_elements(lambda peaks: as_float(magnitude_bits(peaks)))(peaks), amax_axes)
        tensor = normalized(amax, fmt.tensor_constant(how.headroom), peaks.ndim, by_elements=by_elements)
        return peaks, runs, amax, tensor

    peaks, runs, amax, tensor = (functools.partial(materialize, measured) if in_parts else measured)(blocks, amax)
    own = None
    if how.search is not None and how.search.rounds:
        amax, own = joint(blocks, peaks, runs, amax, weights, how, axis)
        tensor = normalized(amax, fmt.tensor_constant(), peaks.ndim)
    in_stages = _encode_in_stages if own is None else functools.partial(_encode_in_stages, own=own)
    encoded = functools.partial(in_stages, how=how, axis=axis, in_parts=in_parts, in_multiples=in_multiples)
    # The one-pass form pays off only if there are several candidates: with one, nothing is chosen, and platforms
    # without stage boundaries already run the stages in one pass.
    plain = isinstance(how.loss, BlockLoss) and not (how.block_2d or how.search or fmt.scale.runs or fmt.ties == "last")
    extras = Extras(noise, _unit_weights(weights, blocks.ndim, axis, (1,)))
    plain = plain and fmt.scale.nbytes == 1 and weights is None and not in_multiples
    if len(fmt.candidates) > 1 and fmt.block in (8, 16, 32) and plain and not in_parts:
        in_one_pass = functools.partial(_encode_in_one_pass, how=how, axis=axis)
        encoded = functools.partial(by_platform, cpu=encoded, default=in_one_pass)
    codes, headers = encoded(blocks, peaks, runs, tensor, extras)
    return codes, None if in_multiples else header_bytes(headers, fmt.scale.nbytes, axis), amax


def _unit_weights(weights, ndim, axis, over):
    """Return weights [1, ..., m, B, 1, ...], scaled by a power of two so that the largest over axes `over` is near 1.

    `over` are axes of [m, B].
    """
    if weights is None:
        return None
    weights = weights * power_near(jnp.max(weights, axis=over, keepdims=True))
    return weights.reshape(*[1] * (ndim + axis - 1), *weights.shape, *[1] * (-axis - 1))


def amax_of(magnitudes: jax.Array, amax_axes: tuple[int, ...]) -> jax.Array:
    """Return the maximum of magnitudes over all axes but the nonnegative `amax_axes`, in the shape of an amax."""
    others, lead = tuple(a for a in range(magnitudes.ndim) if a not in amax_axes), max(amax_axes, default=-1) + 1
    peak = jnp.max(magnitudes, axis=others, initial=None if magnitudes.size else 0)
    return jnp.expand_dims(peak, [a for a in others if a < lead])


# --- two implementations of the encoder ------------------------------------------------------------------------------


def _encode_in_stages(
    blocks, peaks, runs, tensor, extras, how, axis, own=None, in_parts=False, in_multiples=False
):  # fmt: skip
    """Choose a trial for each block, then encode; return uint8 codes [..., m, B, ...], int32 headers [..., m, ...].

    `own` holds each candidate's payloads; None means those given by the blocks' maxima. `in_parts`: see `BlockTrials`.
    `in_multiples`: see `encode`.
    """
    fmt, by_elements = how.fmt, mapped if in_parts else unchanged

    def scales_of(word, tensor, place: Any = 0):
        header, _, rounding, multiplier = word_parts(word, fmt)
        return _scales(_Trial(fmt.split(header)[1], rounding, None), multiplier, tensor, place, how)

    def chosen(copies, peaks, runs, tensor, extras, own):
        own = wanted_payloads(peaks, runs, tensor, how, by_elements) if own is None else own
        trials = BlockTrials(copies, peaks, tensor, extras, how, axis, in_parts)
        word = choose(trials, peaks, own)
        if fmt.scale.runs:  # several factors: they differ from place to place, and are computed during encoding
            return word, None, None
        if how.search is not None or fmt.scale.nbytes == 4:
            inverse, scale = scales_of(word, tensor)
        else:
            inverse, scale = trials.scales_of_chosen(word, own)
        return word, inverse, scale if in_multiples else None

    copies = [[blocks] * _parts_of(blocks, axis)] * len(fmt.candidates) if in_parts else [[blocks]]
    word, inverse, scale = materialize(chosen, copies, peaks, runs, tensor, extras, own)

    def encoded(blocks, word, inverse, scale, tensor, noise):
        word, inverse, scale, tensor = insert_axis((word, inverse, scale, tensor), axis)
        if inverse is None:
            place = lax.broadcasted_iota(jnp.int32, blocks.shape, blocks.ndim + axis)
            inverse, scale = scales_of(word, tensor, place)
        return values_or_codes(blocks.astype(jnp.float32), word, inverse, scale, tensor, noise)

    @by_elements
    def values_or_codes(blocks, word, inverse, scale, tensor, noise):
        header, candidate, _, _ = word_parts(word, fmt)
        selector, _ = fmt.split(header)
        power = 1 if tensor is None else tensor.power
        noise = noise and pick(candidate, noise)
        arguments = blocks, noise, inverse, power, one_for_each_decoding(fmt), fmt
        if in_multiples:
            return times_scales(pick(selector, _values_of(*arguments)), selector, scale, fmt)
        return pick(selector, codes_of(*arguments)).astype(jnp.uint8)

    codes = materialize(encoded, blocks, word, inverse, scale, tensor, extras.noise)
    return codes, word_parts(word, fmt)[0]


def _encode_in_one_pass(blocks, peaks, runs, tensor, extras, how, axis):
    """Compute the codes of all candidates, then choose: the same bits as in stages, in one pass over blocks on XLA:GPU.

    XLA:GPU makes one kernel of all outputs of one shape under three conditions. No output depends on another one, so
    codes are computed before the choice. The kernel reads at most 96 arrays, so a block is not split into single
    places. No value is computed in more than 15 places, so a block is split into short runs. The outputs have the
    shape [..., m, ...], so each thread handles a block.
    """
    fmt, term, op, noise = how.fmt, how.loss.term, how.loss.over, extras.noise
    run = 8 if fmt.bits <= 4 else 4  # the codes of a run fit a 32-bit word
    xs = [x.astype(jnp.float32) for x in jnp.split(blocks, fmt.block // run, axis)]
    shifts = fmt.bits * lax.broadcasted_iota(jnp.int32, xs[0].shape, blocks.ndim + axis)
    unit, own = _loss_unit(peaks, tensor), wanted_payloads(peaks, runs, tensor, how)
    unit = None if unit is None else jnp.expand_dims(unit, axis)

    def attempt(i, candidate):
        """Return (payload, loss, header, words of codes) of candidate i."""
        payload = own[i]  # if it is NaN, codes are zero and losses NaN, so that no other candidate is chosen
        scale, inverse = fmt.scale.decode_written(payload), _inverse(payload, 0, tensor, fmt)
        divisor = fmt.tensor_constant(how.headroom)
        inverse, scale, wide = insert_axis((inverse, scale, tensor and tensor.units), axis)
        power = 1 if wide is None else wide.power
        terms, words = [], []
        for x, r in zip(xs, jnp.split(noise[i], len(xs), axis) if noise else [None] * len(xs), strict=True):
            x_scaled, decoded = decoded_place(x, r, inverse, scale, wide, divisor, candidate, fmt)
            terms.append(term(_error(x_scaled, decoded, unit)))
            (codes,) = codes_of(x, r, inverse, power, [candidate], fmt)
            words.append(tree(jnp.bitwise_or, unstack(codes << shifts, axis)))
        # Reduce over runs first, then over places. For power-of-two blocks this is the order of `tree` over all places.
        loss = tree(op, unstack(tree(op, terms), axis))
        return payload, loss, fmt.join(fmt.selector_of(candidate), payload), *words

    (_, loss, header, *words), *others = [attempt(i, c) for i, c in enumerate(fmt.candidates)]
    header, _, *words = better((header, loss, *words), others, fmt)
    # Without the barrier the pass would be repeated for each byte that is packed from the words.
    header, words = lax.optimization_barrier((header, words))
    codes = [jnp.expand_dims(word, axis) >> shifts & 2**fmt.bits - 1 for word in words]
    return jnp.concatenate(codes, axis).astype(jnp.uint8), header


def joint(blocks, peaks, runs, amax, weights, how, axis):
    """Run the joint scale search (see `Search.rounds`); return amax and each candidate's payloads.

    Arguments are those of `encode`.
    """
    fmt, power = how.fmt, power_near(amax)
    extras = Extras(weights=_unit_weights(weights, blocks.ndim, axis, (0, 1)))
    tensor = normalized(amax, fmt.tensor_constant(), peaks.ndim)

    def fit(amax, payloads):
        def of_blocks(blocks, peaks, extras, tensor, payloads):
            trials = BlockTrials([[blocks]], peaks, tensor, extras, how, axis)
            return [[where(peaks < 0, 0, a) for a in trials.fit(i, p)] for i, p in enumerate(payloads)]

        tensor = normalized(amax, fmt.tensor_constant(), peaks.ndim, power)
        return materialize(of_blocks, blocks, peaks, extras, tensor, payloads)

    return joint_scale(fit, amax, wanted_payloads(peaks, runs, tensor, how), fmt, how.search.rounds)


# --- the steps of the encoder ----------------------------------------------------------------------------------------


def block_peaks(blocks, axis, how, *, in_parts=False):
    """Return int32 bits of each block's largest finite magnitude, and for each length of runs those of the runs.

    The sign bit marks a block with a NaN or an infinity. In formats that saturate, infinity counts as a magnitude.
    """
    infinity = np.int32(0x7F800000)
    poison = infinity + 1 if how.fmt.saturates else infinity
    if in_parts and not how.fmt.scale.runs:
        bits = magnitude_bits(bits_of(blocks.astype(jnp.float32)))
        peak, top, runs = jnp.max(where(bits < poison, bits, 0), axis), jnp.max(bits, axis), []
    else:
        bits = [magnitude_bits(bits_of(x)) for x in places(blocks, axis)]
        kept = [lax.select(lax.lt(b, lax.full_like(b, poison)), b, lax.full_like(b, 0)) for b in bits]
        peak = tree(lax.max, kept)
        runs = [[tree(lax.max, kept[i : i + n]) for i in range(0, len(kept), n)] for n in how.fmt.scale.runs]
        top = tree(lax.max, bits)
    if how.block_2d:
        square, block = -3 - axis, how.fmt.block
        parts = [split_blocks(a, block, square) for a in (peak, top)]
        peaks_of = jnp.max if in_parts else lambda a, axis: tree(lax.max, unstack(a, axis))
        peak, top = (repeat(peaks_of(part, part.ndim + square), block, square) for part in parts)
    return peak | ((top >= poison).astype(jnp.int32) << 31), runs


def _reduced(op, a, axis, *, in_parts):
    return tree_along(op, a, axis) if in_parts else tree(op, unstack(a, axis))


def choose(trials: "BlockTrials", peaks, own):
    """Return the word of each block's best trial, int32 [..., m, ...] (see `ifjax.codec.search`)."""
    how, fmt = trials.how, trials.how.fmt
    if len(own) == 1 and how.search is None:
        return own[0]
    return where(peaks < 0, fmt.scale.nan, best_trial(own, trials, fmt, how.search))


def wanted_payloads(peaks, runs, tensor, how, by_elements=unchanged):
    """Return for each candidate the payloads given by the blocks' maxima; one array where they are always equal.

    They are NaN where a block has a NaN or an infinity.
    """
    known, fmt = {}, how.fmt
    for c in fmt.candidates:
        if (c.peak, c.scale_multiplier) not in known:
            payload = by_elements(functools.partial(_payload_of, c, how=how))
            known[c.peak, c.scale_multiplier] = payload(peaks, runs, tensor)
    return [known[c.peak, c.scale_multiplier] for c in fmt.candidates]


def _payload_of(candidate, peaks, runs, tensor, how):
    payload = wanted_payload(candidate, peaks, runs, tensor, how.fmt, how.headroom)
    return where(peaks < 0, how.fmt.scale.nan, payload)


def wanted_payload(candidate: Candidate, peaks, runs, tensor, fmt, headroom):
    """Return the int32 payload that maps each block's largest magnitude to the candidate's peak."""
    quantum = fmt.block_peak(candidate, headroom)

    def wanted(bits):
        peak = as_float(magnitude_bits(bits))
        if tensor is None:
            # Bounded by the smallest normal number, because platforms may flush smaller scales to zero. All smaller
            # ones have the same payload.
            scale = where(peak > 0, jnp.maximum(divide(peak, quantum), np.float32(2.0**-126)), 0)
        else:
            scale = divide(peak * tensor.power, quantum) * tensor.ratio
        return scale if candidate.scale_multiplier == 1 else scale * np.float32(candidate.scale_multiplier)

    payload = fmt.scale.encode(wanted(peaks), *[[wanted(part) for part in run] for run in runs])
    return jnp.maximum(payload, 1) if fmt.prevent_zero else payload


def _inverse(payload, place, tensor, fmt):
    """Return the factor from x * power to units of the first grid; 0 for blocks whose scale is zero or NaN."""
    if tensor is None:
        return fmt.scale.inverse(payload, place)
    return _inverse_of(fmt.scale.decode_written(payload, place), tensor)


def _inverse_of(scale, tensor):
    return _reciprocal(tensor.unit * scale)


def inverse_for(payload, rounding, multiplier, place, tensor, how):
    """Return `_inverse`, or the inverse of a multiple of the rounding scale (see `ifjax.codec.Search`)."""
    fmt = how.fmt
    inverse = None if payload is None else _inverse(payload, place, tensor, fmt)
    if multiplier is None or how.search is None or not how.search.is_decoupled:
        return inverse
    factors = jnp.asarray((1.0, *how.search.multipliers), jnp.float32)[multiplier]
    scale = fmt.scale.decode_written(rounding, place) * factors
    decoupled = _reciprocal(scale if tensor is None else tensor.unit * scale)
    return decoupled if inverse is None else where(multiplier > 0, decoupled, inverse)


def _reciprocal(scale):
    # The published code multiplies by a rounded reciprocal and never divides by the scale.
    return where(scale > 0, divide(1.0, scale), 0)


def codes_of(x, noise, inverse, power, candidates, fmt):
    """Return a list of the int32 codes of x for each candidate."""
    ys = _on_grids(x, inverse, power, candidates, fmt)
    return [c.grid.encode(y, noise) for c, y in zip(candidates, ys, strict=True)]


def _values_of(x, noise, inverse, power, candidates, fmt):
    """Return a list of the values of `codes_of` without any scale, except for the sign of zeros."""
    ys = _on_grids(x, inverse, power, candidates, fmt)
    return [_rounded(y, noise, c) for c, y in zip(candidates, ys, strict=True)]


def _on_grids(x, inverse, power, candidates, fmt):
    """Return a list of x in the units of each candidate's grid, for `Grid.encode`."""
    y = x * power * inverse
    if any(c.grid.zero == "negative" for c in candidates):
        y = keep_negative(y, x, power * inverse)
    y = where(inverse == 0, 0, y)
    return [_to_grid(y, c, fmt) for c in candidates]


def _rounded(y, noise, candidate):
    v = candidate.grid.round(y, noise)
    return v + np.float32(candidate.offset) if candidate.offset else v


def keep_negative(y, x, factor):
    """Return y = x * factor, with negative products that the platform flushed to zero replaced by a tiny negative one.

    IEEE arithmetic rounds a product to -0 only from -2^-150 on, and all numbers between that and 0 have the same code.
    """
    bits = bits_of(x)
    subnormal = -magnitude_bits(bits).astype(jnp.float32) * np.float32(2.0**-119)
    wide = where(magnitude_bits(bits) < 0x800000, subnormal, x * np.float32(2.0**30)) * factor
    return where((bits < 0) & (wide < np.float32(-(2.0**-120))), jnp.minimum(y, np.float32(-(2.0**-126))), y)


def _to_grid(y, candidate: Candidate, fmt: Format):
    factor = fmt.input_factor(candidate)
    y = y if factor == 1 else y * factor
    return y - np.float32(candidate.offset) if candidate.offset else y


def one_for_each_decoding(fmt: Format):
    """Return the first candidate of each decoding."""
    return [next(c for c in fmt.candidates if c.decoding == decoding) for decoding in fmt.decodings]


# --- the loss of a block ---------------------------------------------------------------------------------------------


class Extras(NamedTuple):
    """Optional inputs of an encoder besides the blocks [..., m, B, ...].

    Attributes:
        noise: for each candidate, noise of the shape of the blocks.
        weights: weights of losses, [1, ..., m, B, 1, ...], scaled so that the largest in each block (in the joint
            search, in the tensor) is near 1.
    """

    noise: tuple[jax.Array, ...] | None = None
    weights: jax.Array | None = None

    def of(self, i: int) -> "Extras":
        """Return the inputs for candidate i."""
        return self._replace(noise=self.noise and self.noise[i])


class _Trial(NamedTuple):
    """One way to encode blocks; all arrays are [..., m, ...].

    `payload` decodes (None: a scale of 1), and `rounding` rounds (None: the same payload). Values are multiplied by
    `unit`, a power of two, in losses (None: by the tensor's power).
    """

    payload: jax.Array | None
    rounding: jax.Array | None
    unit: jax.Array | None


@jax.jit(static_argnames=("candidate", "fmt", "varies"))  # traced once for all places
def decoded_place(x, r, inverse, scale, tensor, divisor, candidate, fmt, varies=False):
    """Return x and its decoded value, in units of `tensor`; `divisor` is K, or if it `varies` that of `divisor_of`."""
    x = x if tensor is None else x * tensor.power
    v = _rounded(_to_grid(x * inverse, candidate, fmt), r, candidate)
    return x, scaled(v, scale, candidate.step, tensor, divisor, varies=varies)


def divisor_of(scale, tensor, fmt, headroom):
    """Return K in the shape of the scales, hidden from constant folding; None without a tensor scale."""
    return None if tensor is None else depending_on(scale, np.float32(fmt.tensor_constant(headroom)))


def _loss_unit(peaks, tensor):
    """Return the power of two by which losses are scaled; None if values are already scaled by the tensor's power."""
    return None if tensor is not None else power_near(as_float(magnitude_bits(peaks)))


def _error(x, decoded, unit):
    return decoded - x if unit is None else decoded * unit - x * unit


# The most values for which one part is no slower, although its terms are written to memory; and the most places of a
# part in one pass, a power of two.
_SMALL, _PLACES = 1 << 16, 8


def _suits_parts(fmt, size):
    """Whether on a CPU losses by parts are as fast as by places.

    They are not in long blocks, and not if rounding compares with each of 16 values.
    """
    is_plain = fmt.block <= 32 and all(c.grid.magnitudes for c in fmt.candidates)
    return size <= _SMALL or len(fmt.candidates) == 1 or is_plain


def _parts_of(blocks, axis):
    """Return the number of equal parts of a block that are taken apart, a power of two: see `BlockTrials`."""
    size, count = largest_divisor(blocks.shape[axis], 32), 1
    while blocks.size > _SMALL and size % (2 * count) == 0 and size > _PLACES * count:
        count *= 2
    return count


class BlockTrials:
    """An implementation of `ifjax.codec.search.Trials` for blocks.

    Losses are computed of each place of a block, or, with `in_parts`, of equal parts: `copies` has for each candidate
    as many copies of the blocks as there are parts, and is [[blocks]] without. For XLA:CPU parts are a tenth of the
    operations, and one pass over the blocks as well, if no array is needed in more than 15 places. Hence each part of
    each candidate is read from a parameter of its own.
    """

    def __init__(self, copies, peaks, tensor, extras, how, axis, in_parts=False):
        self.copies, self.tensor, self.extras, self.how, self.axis = copies, tensor, extras, how, axis
        self.blocks, self.in_parts, self._known = copies[0][0], in_parts, {}
        self.unit = _loss_unit(peaks, tensor)

    def loss(self, i, payload, rounding, multiplier):
        loss, trial = self.how.loss, _Trial(payload, rounding, self.unit)
        if isinstance(loss, BlockLoss):
            return self._over_blocks(_WeightedLoss(loss), i, trial, multiplier)
        return self._own_loss(loss, i, trial, multiplier)

    def refitted(self, i, rounding, multiplier):
        trial, fmt = _Trial(None, rounding, self.unit), self.how.fmt
        above, below = (self._over_blocks(term, i, trial, multiplier) for term in _SUMS)
        scale = where(below > 0, divide(above, where(below > 0, below, 1)), 0)
        # If all values are zero, or the least-squares scale is not positive, the scale stays.
        return where(scale > 0, fmt.scale.encode(scale), rounding)

    def fit(self, i, payload):
        """Return (loss, sum of x d, sum of d d) of blocks x, with d their decoded values from candidate i."""
        trial = _Trial(payload, None, self.unit)
        return self.loss(i, payload, None, None), *(self._over_blocks(term, i, trial, None) for term in _SUMS)

    def refined(self, payload):
        scale = self.how.fmt.scale
        if not scale.runs:
            return payload
        run = scale.runs[-1]

        def losses(payload):
            term, trial = _WeightedLoss(self.how.loss), _Trial(payload, None, self.unit)
            terms = self._terms(term, self.blocks, self.extras.of(0), None, trial, None, self.tensor, 0)
            parts = jnp.split(terms, self.how.fmt.block // run, self.axis)
            return [tree(self.how.loss.over, unstack(part, self.axis)) for part in parts]

        return scale.refined(payload, lambda payload: materialize(losses, payload))

    def _own_loss(self, loss, i, trial, multiplier):
        """Return losses by a user's function of [..., values of a block]."""
        how, axis = self.how, self.axis
        square = -3 - axis if how.block_2d else None
        x, d = self._terms(lambda x, d, unit, weight: (x, d), *self._of_whole(i, trial, multiplier), i)
        if trial.unit is not None:
            unit = insert_axis(trial.unit, axis)
            x, d = x * unit, d * unit
        x, d = (jnp.moveaxis(a, axis, -1) for a in (x, d))
        if square is not None:
            x, d = (gather_squares(a, square - 1) for a in (x, d))
        lost = jnp.asarray(loss(x, d))
        if lost.shape != x.shape[:-1]:
            raise ValueError(
                f"loss(x, rounded) takes two arrays {x.shape}, whose last axis is the values of a block, and must "
                f"return one number for each block, {x.shape[:-1]}, got {lost.shape}: write .mean(axis=-1) or the like"
            )
        return lost if square is None else repeat(lost, how.fmt.block, square)

    def _of_whole(self, i, trial, multiplier):
        """Return the arrays that `_terms` takes for candidate i."""
        scales = None if self.how.fmt.scale.runs else self._scales(trial, multiplier, self.tensor)
        return self.blocks, self.extras.of(i), scales, trial, multiplier, self.tensor

    def _terms(self, term, blocks, extras, scales, trial, multiplier, tensor, i):
        """Return term(x, decoded, unit, weight) of whole blocks [..., m, B, ...]."""
        fmt, how, axis = self.how.fmt, self.how, self.axis
        scales, trial, tensor, units = insert_axis((scales, trial, tensor, tensor and tensor.units), axis)
        if scales is None:  # they differ from place to place
            place = lax.broadcasted_iota(jnp.int32, blocks.shape, blocks.ndim + axis)
            scales = _scales(trial, multiplier, tensor, place, how)
        inverse, scale = scales
        x, constant = blocks.astype(jnp.float32), fmt.tensor_constant(how.headroom)
        x, decoded = decoded_place(x, extras.noise, inverse, scale, units, constant, fmt.candidates[i], fmt)
        return term(x, decoded, trial.unit, extras.weights)

    def _over_blocks(self, term, i, trial, multiplier):
        """Reduce the terms of each block's values by `term.over`, in one fixed order."""
        how, fmt, axis, over = self.how, self.how.fmt, self.axis, term.over
        extras = self.extras.of(i)
        if how.block_2d:
            return self._over_squares(term, i, trial, multiplier)
        if fmt.scale.runs:
            of_blocks = functools.partial(self._terms, term, i=i)
            terms = materialize(of_blocks, *self._of_whole(i, trial, multiplier))
            return tree(over, unstack(terms, axis))

        def along(copies, extras, trial, multiplier, tensor, axis):
            part = largest_divisor(copies[0].shape[axis], 32)
            if part == copies[0].shape[axis]:
                return (self._over_parts if self.in_parts else self._over_places)(
                    term, i, copies, extras, trial, multiplier, tensor, axis
                )
            # A long block is split into parts, because unrolling all of it would take minutes to compile.
            copies, extras = jax.tree.map(lambda a: split_blocks(a, part, axis), (copies, extras))
            trial, tensor = insert_axis((trial, tensor), axis)
            parts = materialize(functools.partial(along, axis=axis), copies, extras, trial, multiplier, tensor)
            return tree(over, unstack(parts, axis))

        return along(self.copies[i if self.in_parts else 0], extras, trial, multiplier, self.tensor, axis)

    def scales_of_chosen(self, word, own):
        """Return the inverse and the scale of each block's chosen trial among those without a search."""
        if len(own) == 1:
            return self._scales(_Trial(own[0], None, None), None, self.tensor)
        _, candidate, _, _ = word_parts(word, self.how.fmt)
        each = [self._scales(_Trial(payload, None, None), None, self.tensor) for payload in own]
        same = all(payload is own[0] for payload in own)
        return each[0] if same else tuple(pick(candidate, options) for options in zip(*each, strict=True))

    def _scales(self, trial, multiplier, tensor):
        """Return the inverse and the scale of a trial, computed once for candidates that share them."""
        given = trial.payload, trial.rounding, multiplier
        if (same := tuple(map(id, given))) not in self._known:
            by_elements = mapped if self.in_parts and tensor is not None else unchanged
            self._known[same] = _scales(trial, multiplier, tensor, 0, self.how, by_elements), given
        return self._known[same][0]

    def _over_places(self, term, i, copies, extras, trial, multiplier, tensor, axis):
        fmt, how, (blocks,) = self.how.fmt, self.how, copies
        inverse, scale = self._scales(trial, multiplier, tensor)
        divisor = divisor_of(scale, tensor, fmt, how.headroom)
        others = [[None] * blocks.shape[axis] if a is None else unstack(a, axis) for a in extras]
        terms = []
        for x, r, weight in zip(places(blocks, axis), *others, strict=True):
            x, decoded = decoded_place(x, r, inverse, scale, tensor, divisor, fmt.candidates[i], fmt, varies=True)
            terms.append(term(x, decoded, trial.unit, weight))
        return tree(term.over, terms)

    def _over_parts(self, term, i, copies, extras, trial, multiplier, tensor, axis):
        fmt, how, count = self.how.fmt, self.how, len(copies)
        (inverse, scale, unit), tensor = insert_axis(
            ((*self._scales(trial, multiplier, tensor), trial.unit), tensor), axis
        )
        part = copies[0].shape[axis] // count
        xs = [lax.slice_in_dim(a, at * part, (at + 1) * part, axis=axis) for at, a in enumerate(copies)]
        others = [[None] * count if a is None else jnp.split(a, count, axis) for a in extras]

        @mapped
        def of_part(x, r, weight, inverse, scale, unit, tensor):
            divisor = divisor_of(x, tensor, fmt, how.headroom)
            x, decoded = decoded_place(x, r, inverse, scale, tensor, divisor, fmt.candidates[i], fmt, varies=True)
            return term(x, decoded, unit, weight)

        parts = zip(xs, *others, strict=True)
        terms = [of_part(x.astype(jnp.float32), r, weight, inverse, scale, unit, tensor) for x, r, weight in parts]
        return tree_along(term.over, tree(term.over, terms), axis)

    def _over_squares(self, term, i, trial, multiplier):
        fmt, axis, over = self.how.fmt, self.axis, term.over
        square = -3 - axis

        # Reduce over rows first, and over columns first, and combine both, so that transposing the 2-D block changes
        # no bit.
        def of_squares(terms):
            reduced = functools.partial(_reduced, over, in_parts=self.in_parts)
            over_rows = reduced(split_blocks(reduced(terms, axis), fmt.block, square), square)
            other = square - 1 if square < axis else square  # the same axis, in an array that still has the axis B
            over_columns = reduced(split_blocks(terms, fmt.block, other), other)
            return over(over_rows, reduced(over_columns, axis))

        terms = materialize(functools.partial(self._terms, term, i=i), *self._of_whole(i, trial, multiplier))
        return repeat(materialize(of_squares, terms), fmt.block, square)


class _WeightedLoss(NamedTuple):
    loss: BlockLoss

    def __call__(self, x, decoded, unit, weight):
        term = self.loss.term(_error(x, decoded, unit))
        return term if weight is None else without_last_bit(term * weight)

    @property
    def over(self):
        return self.loss.over


class _Term(NamedTuple):
    """A term of the least-squares scale: products of decoded values with x, or with themselves."""

    with_itself: bool

    def __call__(self, x, decoded, unit, weight):
        if unit is not None:
            x, decoded = x * unit, decoded * unit
        product = without_last_bit(decoded * (decoded if self.with_itself else x))
        return product if weight is None else without_last_bit(product * weight)

    @property
    def over(self):
        return lax.add


_SUMS = _Term(False), _Term(True)


def _scales(trial, multiplier, tensor, place, how, by_elements=unchanged):
    """Return the factor that scales x to the grid for rounding, and the scale that decodes."""
    payload, rounding, _ = trial
    if payload is None:
        scale = jnp.ones(rounding.shape, jnp.float32)
    else:
        scale = by_elements(lambda payload: how.fmt.scale.decode_written(payload, place))(payload)
    if tensor is None or multiplier is not None:
        return inverse_for(payload, rounding, multiplier, place, tensor, how), scale
    return by_elements(_inverse_of)(scale, tensor), scale
