"""The one encoder and the one decoder, for every format.

x is seen as blocks: with the block axis at `axis` (negative), [..., n, ...] becomes [..., m, B, ...], where B keeps
that negative index, and what belongs to a block has the shape [..., m, ...]. No axis is moved or merged with another,
so leading axes keep their sharding, and axis=-2 needs no transposition.

    blocks -> amax -> for each candidate: scale byte, loss -> selection -> codes

All arithmetic is float32, one rounding an operation, in the order of the published code (arXiv 2603.28765).
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.codec.blocks import _as_float, _bits, _magnitude, _pick, _places, _repeat, _tree, _unstack, split_blocks
from ifjax.codec.decode import _scale_value, tensor_scale
from ifjax.codec.losses import LOSSES, Loss, _block_loss, _decoded, _inverse, _to_grid
from ifjax.codec.search import _trials
from ifjax.formats import Candidate, Format
from ifjax.numerics.xla import divide, stage


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


def _decoding(candidate: Candidate):
    return candidate.grid, candidate.step


def _one_for_each_decoding(fmt: Format):
    return [next(c for c in fmt.candidates if _decoding(c) == decoding) for decoding in fmt.decodings]
