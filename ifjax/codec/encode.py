"""The one encoder and the one decoder, for every format.

x is seen as blocks: with the block axis at `axis` (negative), [..., n, ...] becomes [..., m, B, ...], where B keeps
that negative index, and what belongs to a block has the shape [..., m, ...]. No axis is moved or merged with another,
so leading axes keep their sharding, and axis=-2 needs no transposition.

    blocks -> amax -> for each candidate: scale byte, loss -> selection -> codes

All arithmetic is float32, one rounding an operation, in the order of the published code (arXiv 2603.28765).
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.formats import Candidate, Format
from ifjax.numerics.xla import divide, stage

Loss = str | Callable[[jax.Array, jax.Array], jax.Array]


class TensorScale(NamedTuple):
    """The tensor-wide scale, in units in which no product of the codec overflows or is flushed to zero.

    x * power has the absolute maximum `amax`; power is 1 but for tensors near the ends of float32's range.
    """

    power: jax.Array
    amax: jax.Array


def tensor_scale(amax: jax.Array, ndim: int) -> TensorScale:
    """For amax float32 of the shape of the leading axes that keep their own; broadcasts against `ndim` axes."""
    # From 2^113 on, amax * 448 * 28 overflows; below 2^-100, a reciprocal does or is flushed. Multiplying by a power of
    # two changes no other bit.
    power = jnp.where(amax < np.float32(2.0**-100), np.float32(2.0**64), np.float32(1))
    power = jnp.where(amax >= np.float32(2.0**113), np.float32(2.0**-64), power)
    shape = amax.shape + (1,) * (ndim - amax.ndim)
    return TensorScale(power.reshape(shape), (amax * power).reshape(shape))


def encode(
    blocks: jax.Array,
    fmt: Format,
    *,
    axis: int,
    lead: int = 0,
    amax: jax.Array | None = None,
    loss: Loss = "mse",
    headroom: float = 1.0,
    square: int | None = None,
    noise: Sequence[jax.Array] | None = None,
    search: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Encode blocks [..., m, B, ...] (see `split_blocks`) to codes and scale bytes.

    Args:
        axis: the negative axis of B.
        lead: how many leading axes keep an amax of their own.
        amax: float32 [leading axes]; taken from the finite values if None. Ignored by formats without a tensor scale.
        loss: "mse", "mae", "abs_max" or a function of (x, decoded x), both [..., B], to losses [...].
        headroom: see `Format.constants`.
        square: the other axis (negative, its length a multiple of B) over which B x B values share scale and choice.
        noise: for each candidate, float32 in [-1/2, 1/2) of the shape of `blocks`: rounds stochastically.
        search: "fast" or "exhaustive": the scales to try besides the block maximum's own.

    Returns:
        uint8 codes [..., m, B, ...], uint8 scale bytes [..., m, ...] and amax (None without a tensor scale).
    """
    peaks = _peaks(blocks, axis, square)
    tensor = None
    if fmt.scale.largest is not None:
        if amax is None:
            amax = jnp.max(_as_float(_magnitude(peaks)), axis=tuple(range(lead, peaks.ndim)), initial=0)
        tensor = tensor_scale(amax, peaks.ndim)

    settings = {"fmt": fmt, "axis": axis, "loss": loss, "headroom": headroom}
    encoded = functools.partial(_encode_in_stages, **settings, square=square, search=search)
    # With one candidate nothing is chosen, and stages without boundaries are one pass already.
    if len(fmt.candidates) > 1 and fmt.block in (8, 16, 32) and not (callable(loss) or square or search):
        in_one_pass = functools.partial(_encode_in_one_pass, **settings)
        encoded = functools.partial(lax.platform_dependent, cpu=encoded, default=in_one_pass)
    codes, byte = encoded(blocks, peaks, tensor, noise)
    return codes, byte, amax


def decode(codes, scales, fmt: Format, *, amax: jax.Array | None = None, headroom: float = 1.0):
    """float32 values of integer codes and of the scale bytes that apply to them (broadcast against the codes).

    Values are ((v * s) * amax) * step / K, each operation rounded once; NaN where the scale byte means NaN.
    """
    flag = scales >> 7
    values = unscaled(codes, flag, fmt)
    step = _pick(flag, [jnp.float32(step) for _, step in fmt.decodings])
    _, largest = fmt.constants(headroom)
    tensor = None if amax is None else tensor_scale(amax, codes.ndim)
    divisor = None if tensor is None else largest * tensor.power
    return _value(values, _scale_value(scales, fmt), step, tensor, divisor)


def unscaled(codes, flag, fmt: Format):
    """float32 values of integer codes in units of their decoding's step; flag 0 or 1 broadcasts against them."""
    return _pick(flag, [grid.decode(codes) for grid, _ in fmt.decodings])


def block_scale(scales, fmt: Format):
    """float32: what the `unscaled` values of blocks with these scale bytes are to be multiplied by, amax / K aside."""
    return _scale_value(scales, fmt) * _pick(scales >> 7, [jnp.float32(step) for _, step in fmt.decodings])


def _value(values, scale, step, tensor, divisor):
    d = values * scale
    d = d if tensor is None else d * tensor.amax
    # A step of 1 is left out, not multiplied by, only where that is known beforehand.
    d = d if isinstance(step, float) and step == 1 else d * step
    return d if tensor is None else divide(d, divisor)


# --- the two arrangements of the encoder -----------------------------------------------------------------------------


def _encode_in_stages(blocks, peaks, tensor, noise, fmt, axis, loss, headroom, square, search):
    """uint8 codes [..., m, B, ...] and uint8 scale bytes [..., m, ...]: the choice, then the codes of what it took."""

    def choose(blocks, peaks, tensor, noise):
        return _choose(blocks, peaks, tensor, noise, fmt, axis, loss, headroom, square, search)

    word = stage(choose, blocks, peaks, tensor, noise)
    byte = word & 0xFF

    def inverse_of(byte, tensor):
        return _inverse(_scale_value(byte, fmt), tensor, fmt, headroom)

    inverse = stage(inverse_of, byte, tensor)

    def codes_of(blocks, word, inverse, tensor, noise):
        word, inverse = jnp.expand_dims(word, axis), jnp.expand_dims(inverse, axis)
        power = 1 if tensor is None else jnp.expand_dims(tensor.power, axis)
        noise = noise and _pick(word >> 8, noise)
        codes = _codes(blocks.astype(jnp.float32), noise, inverse, power, _one_for_each_decoding(fmt), fmt)
        return _pick((word & 0x80) >> 7, codes).astype(jnp.uint8)

    return stage(codes_of, blocks, word, inverse, tensor, noise), byte.astype(jnp.uint8)


def _encode_in_one_pass(blocks, peaks, tensor, noise, fmt, axis, loss, headroom):
    """The same bits: the codes of all candidates, then the choice. XLA:GPU compiles it to one pass over the blocks.

    It makes one kernel of all that leads to arrays of one shape, as long as no result needs another one (so codes come
    before the choice), it reads at most 96 arrays (so a block is not taken place by place) and computes nothing at
    more than 15 places (so runs of the block are short). The shape is [..., m, ...]: a thread has a block.
    """
    run, (term, op) = 8 if fmt.bits <= 4 else 4, LOSSES[loss]  # a run's codes leave in a word of 32 bits
    xs = [x.astype(jnp.float32) for x in jnp.split(blocks, fmt.block // run, axis)]
    shifts = fmt.bits * lax.broadcasted_iota(jnp.int32, xs[0].shape, blocks.ndim + axis)
    bytes_ = _bytes_for_peak(_as_float(_magnitude(peaks)), tensor, fmt, headroom)

    def attempt(i, byte):
        """(byte, loss, words of codes) of candidate i."""
        candidate, scale = fmt.candidates[i], fmt.scale.decode(byte)
        inverse = _inverse(scale, tensor, fmt, headroom)
        inverse, scale, wide = jax.tree.map(lambda a: jnp.expand_dims(a, axis), (inverse, scale, tensor))
        power = 1 if wide is None else wide.power
        terms, words = [], []
        for x, r in zip(xs, jnp.split(noise[i], len(xs), axis) if noise else [None] * len(xs), strict=True):
            scaled, decoded = _decoded(x, r, inverse, scale, wide, candidate, fmt, headroom)
            terms.append(term(decoded - scaled))
            (codes,) = _codes(x, r, inverse, power, [candidate], fmt)
            words.append(_tree(jnp.bitwise_or, _unstack(codes << shifts, axis)))
        # Runs first, then places: in blocks of a power of two the order of `_tree` over all places.
        return byte, _tree(op, _unstack(_tree(op, terms), axis)), *words

    # The byte of NaN makes zeros of the codes, and NaN of the losses, so that no other candidate is taken.
    trials = [attempt(i, jnp.where(peaks < 0, fmt.scale.nan, byte)) for i, byte in enumerate(bytes_)]
    word, _, *words = _better(trials[0], trials[1:], fmt, first=1)
    # Else the pass would be repeated for each byte that is packed from the words.
    byte, words = lax.optimization_barrier(((word & 0xFF).astype(jnp.uint8), words))
    codes = [jnp.expand_dims(word, axis) >> shifts & 2**fmt.bits - 1 for word in words]
    return jnp.concatenate(codes, axis).astype(jnp.uint8), byte


# --- the steps of the encoder ----------------------------------------------------------------------------------------


def _peaks(blocks, axis, square):
    """int32 bits of each block's largest finite magnitude; the sign bit marks a block with a NaN or infinity."""
    infinity = np.int32(0x7F800000)
    bits = [_magnitude(_bits(x)) for x in _places(blocks, axis)]
    peak = _tree(jnp.maximum, [jnp.where(b < infinity, b, 0) for b in bits])
    poisoned = (_tree(jnp.maximum, bits) >= infinity).astype(jnp.int32)
    if square is not None:
        runs = [_unstack(split_blocks(a, len(bits), square), square) for a in (peak, poisoned)]
        peak, poisoned = (_repeat(_tree(jnp.maximum, run), len(bits), square) for run in runs)
    return peak | (poisoned << 31)


def _choose(blocks, peaks, tensor, noise, fmt, axis, loss, headroom, square, search):
    """int32 [..., m, ...]: the scale byte of the best candidate, flag included, and the candidate's index << 8."""
    bytes_ = _bytes_for_peak(_as_float(_magnitude(peaks)), tensor, fmt, headroom)
    if len(fmt.candidates) == 1 and search is None:
        return jnp.where(peaks < 0, fmt.scale.nan, bytes_[0])

    def loss_of(i, byte):
        return _block_loss(blocks, noise and noise[i], byte, tensor, fmt, i, axis, loss, headroom, square)

    trials = [(byte, loss_of(i, byte)) for i, byte in enumerate(bytes_)]
    best = trials[0]
    if search is not None:
        relative, window = _trials(search, fmt)

        def try_next(state, code):
            # Compares what the last step computed: XLA would compute a loss again for each of its two readers here.
            best, trials = state
            best = _better(best, trials, fmt)
            codes = [byte + code if relative else jnp.full_like(byte, code) for byte in bytes_]
            codes = [jnp.clip(code, 1, fmt.scale.top) for code in codes]
            return (best, [(byte, loss_of(i, byte)) for i, byte in enumerate(codes)]), None

        (best, trials), _ = lax.scan(try_next, (best, trials), window)
    word, _ = _better(best, trials, fmt)
    return jnp.where(peaks < 0, fmt.scale.nan, word)


def _better(best, trials, fmt, first=0):
    """The best of (word, loss, ...) and of the (byte, loss, ...) of the candidates from `first` on."""
    for i, (byte, loss, *rest) in enumerate(trials, first):
        flag = 0x80 if fmt.decodings.index(_decoding(fmt.candidates[i])) else 0
        # Strictly less: the earlier candidate keeps a tie, and against a NaN. A zero scale never takes another.
        wins = (loss < best[1]) & (byte > 0)
        trial = (byte | (i << 8 | flag), loss, *rest)
        best = tuple(jnp.where(wins, new, old) for new, old in zip(trial, best, strict=True))
    return best


def _bytes_for_peak(peak, tensor, fmt, headroom):
    """For each candidate the int32 scale byte, without flag, that maps each block's largest magnitude to its place."""
    quantum, largest = fmt.constants(headroom)
    if tensor is None:
        # Not below the smallest normal number, which a platform may flush: it has the byte of all that are smaller.
        scale = jnp.where(peak > 0, jnp.maximum(divide(peak, quantum), np.float32(2.0**-126)), 0)
    else:
        scale = divide(peak * tensor.power, quantum) * divide(largest, tensor.amax)
        scale = jnp.where(tensor.amax > 0, scale, 0)
    stretches = [np.float32(candidate.stretch) for candidate in fmt.candidates]
    return [fmt.scale.encode(scale if stretch == 1 else scale * stretch) for stretch in stretches]


def _trials(search, fmt):
    """(whether relative to the block maximum's own scale byte, int32 bytes to try)."""
    if search == "exhaustive":
        return False, np.arange(1, fmt.scale.top + 1, dtype=np.int32)
    # Measured on normal data, blocks of 16: -3..+6 finds all that the exhaustive search does for IF4 and NVFP4, -2..+2
    # does not. Smaller scales clip the maximum, larger ones trade its error for the others'.
    return True, np.array([-3, -2, -1, 1, 2, 3, 4, 5, 6], np.int32)


def _inverse(scale_value, tensor, fmt, headroom):
    """What takes x to units of the first grid; 0 for blocks whose scale is zero or NaN.

    A rounded reciprocal, because the published code multiplies by one; it never divides by the scale.
    """
    if tensor is not None:
        _, largest = fmt.constants(headroom)
        scale_value = divide(1.0, divide(largest, tensor.amax)) * scale_value
    return jnp.where(scale_value > 0, divide(1.0, scale_value), 0)


def _codes(x, noise, inverse, power, candidates, fmt):
    """int32 codes of x from each of the candidates."""
    y = x * power * inverse
    if any(c.grid.zero == "negative" for c in candidates):
        y = _keep_negative(y, x, power * inverse)
    y = jnp.where(inverse == 0, 0, y)
    return [c.grid.encode(_to_grid(y, c, fmt), noise) for c in candidates]


def _keep_negative(y, x, factor):
    """y = x * factor, but where a negative product was flushed to zero, as platforms do, a tiny negative number.

    IEEE arithmetic rounds it to -0 only from -2^-150 on, and every number between that and zero has the same code.
    """
    bits = _bits(x)
    subnormal = -_magnitude(bits).astype(jnp.float32) * np.float32(2.0**-119)
    wide = jnp.where(_magnitude(bits) < 0x800000, subnormal, x * np.float32(2.0**30)) * factor
    return jnp.where((bits < 0) & (wide < np.float32(-(2.0**-120))), jnp.minimum(y, np.float32(-(2.0**-126))), y)


def _scale_value(byte, fmt):
    return fmt.scale.decode(byte & 0x7F if fmt.has_flag else byte)


def _to_grid(y, candidate: Candidate, fmt: Format):
    factor = fmt.input_factor(candidate)
    return y if factor == 1 else y * factor


def _decoding(candidate: Candidate):
    return candidate.grid, candidate.step


def _one_for_each_decoding(fmt: Format):
    return [next(c for c in fmt.candidates if _decoding(c) == decoding) for decoding in fmt.decodings]


# --- losses ----------------------------------------------------------------------------------------------------------


def _squared(e):
    # The last bit is cleared so that compilers cannot contract the square and the sum to a fused multiply-add: they do
    # so in some programs and not in others, and the choice of a block would depend on what surrounds it.
    return _as_float(_bits(e * e) & ~1)


@jax.jit(static_argnames=("candidate", "fmt", "headroom"))  # traced once for all places
def _decoded(x, r, inverse, scale, tensor, candidate, fmt, headroom):
    """x and what it decodes to, in units of `tensor`."""
    x = x if tensor is None else x * tensor.power
    v = candidate.grid.round(_to_grid(x * inverse, candidate, fmt), r)
    return x, _value(v, scale, candidate.step, tensor, fmt.constants(headroom)[1])


LOSSES = {"mse": (_squared, jnp.add), "mae": (jnp.abs, jnp.add), "abs_max": (jnp.abs, jnp.maximum)}


def _block_loss(blocks, noise, byte, tensor, fmt, i, axis, loss, headroom, square) -> jax.Array:
    """The loss [..., m, ...] of each block if candidate i encodes it with these scale bytes."""

    def decoded(blocks, noise, byte, tensor, axis):
        """x and what it decodes to, in units of `tensor`: a pair of arrays for each place along `axis`."""
        scale = fmt.scale.decode(byte)
        inverse = _inverse(scale, tensor, fmt, headroom)
        rs = [None] * blocks.shape[axis] if noise is None else _unstack(noise, axis)
        return [
            _decoded(x, r, inverse, scale, tensor, fmt.candidates[i], fmt, headroom)
            for x, r in zip(_places(blocks, axis), rs, strict=True)
        ]

    if callable(loss):
        xs, ds = zip(*decoded(blocks, noise, byte, tensor, axis), strict=True)
        x, d = jnp.stack(xs, -1), jnp.stack(ds, -1)
        if square is None:
            return jnp.asarray(loss(x, d))
        return _repeat(loss(_gather_squares(x, square - 1), _gather_squares(d, square - 1)), fmt.block, square)

    term, op = LOSSES[loss]

    def along(axis, blocks, noise, byte, tensor):
        part = _largest_divisor(blocks.shape[axis], 32)
        if part == blocks.shape[axis]:
            return _tree(op, [term(d - x) for x, d in decoded(blocks, noise, byte, tensor, axis)])
        # A long block in parts: unrolled as a whole it would take minutes to compile.
        blocks, noise = jax.tree.map(lambda a: split_blocks(a, part, axis), (blocks, noise))
        byte, tensor = _insert_axis(byte, tensor, axis)
        parts = stage(functools.partial(along, axis), blocks, noise, byte, tensor)
        return _tree(op, _unstack(parts, axis))

    if square is None:
        return along(axis, blocks, noise, byte, tensor)
    # Summed over rows first and over columns first, and both added: transposing the square changes no bit.
    over_rows = stage(functools.partial(along, axis), blocks, noise, byte, tensor)
    over_rows = _tree(op, _unstack(split_blocks(over_rows, fmt.block, square), square))
    other = square - 1 if square < axis else square  # the same axis, where the array has B too
    blocks, noise = jax.tree.map(lambda a: split_blocks(a, fmt.block, other), (blocks, noise))
    byte = lax.index_in_dim(split_blocks(byte, fmt.block, square), 0, square, keepdims=False)
    byte, tensor = _insert_axis(byte, tensor, axis)
    over_columns = stage(functools.partial(along, other), blocks, noise, byte, tensor)
    over_columns = _tree(op, _unstack(over_columns, axis))
    return _repeat(op(over_rows, over_columns), fmt.block, square)


def _insert_axis(byte, tensor, axis):
    """Scale bytes with a new axis at `axis`, and the tensor's scale, which has entries along leading axes only."""
    return jnp.expand_dims(byte, axis), jax.tree.map(lambda a: jnp.expand_dims(a, -1), tensor)


def _largest_divisor(n, limit):
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def _gather_squares(a, other):
    """[..., R, ..., B] -> [..., R / B, ..., B * B]"""
    a = jnp.moveaxis(split_blocks(a, a.shape[-1], other), other, -2)
    return a.reshape(*a.shape[:-2], -1)


def _repeat(a, count, axis) -> jax.Array:
    """Each entry along `axis`, `count` times."""
    at = a.ndim + axis + 1
    shape = (*a.shape[:at], count, *a.shape[at:])
    return merge_blocks(jnp.broadcast_to(jnp.expand_dims(a, at), shape), axis)


# --- blocks ----------------------------------------------------------------------------------------------------------


def split_blocks(x, block: int, axis: int):
    """[..., n, ...] -> [..., m, B, ...], filled up with zeros."""
    count = -(-x.shape[axis] // block)
    x = pad_axis(x, count * block, axis)
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], count, block, *x.shape[at + 1 :])


def merge_blocks(blocks, axis: int):
    """[..., m, B, ...] -> [..., m * B, ...]"""
    at = blocks.ndim + axis
    return blocks.reshape(*blocks.shape[: at - 1], blocks.shape[at - 1] * blocks.shape[at], *blocks.shape[at + 1 :])


def pad_axis(x, length: int, axis: int):
    """x with zeros appended along the negative `axis` up to `length`."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == x.ndim + axis else 0) for i in range(x.ndim)]) if missing else x


def _unstack(a, axis):
    return [lax.index_in_dim(a, i, axis, keepdims=False) for i in range(a.shape[axis])]


def _places(blocks, axis):
    """float32 arrays [..., m, ...], one for each place in the block."""
    if blocks.dtype != jnp.bfloat16:
        return [x.astype(jnp.float32) for x in _unstack(blocks, axis)]
    # XLA:CPU slices bfloat16 by way of a float32 copy of the whole array, and copies what more than 15 slices of one
    # fusion read. So bfloat16 is widened from its bits, and every other place reads them under another type.
    views = [lax.bitcast_convert_type(blocks, dtype) for dtype in (jnp.uint16, jnp.int16)]
    bits = [lax.index_in_dim(views[i % 2], i, axis, keepdims=False) for i in range(blocks.shape[axis])]
    return [_as_float(b.astype(jnp.int32) << 16) for b in bits]


def _tree(op, parts: Sequence[jax.Array]) -> jax.Array:
    """op over the parts in one fixed, balanced order: the same bits in whatever program it is compiled into."""
    parts = list(parts)
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [op(a, b) for a, b in zip(parts[:half], parts[half:], strict=False)] + parts[len(parts) - half : half]
    return parts[0]


def _pick(index, options):
    """options[index], element-wise."""
    picked = options[0]
    for i, option in enumerate(options[1:], 1):
        picked = jnp.where(index == i, option, picked)
    return picked


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _as_float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _magnitude(bits):
    return bits & 0x7FFFFFFF
