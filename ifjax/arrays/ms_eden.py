"""MS-EDEN: unbiased quantization with the noise in the block scales instead of the elements.

    rotate -> block scales, with headroom -> round to nearest -> correct the scales -> round the scales stochastically

Rounding elements to nearest shrinks a vector. EDEN's factor |y|^2 / <y, q> undoes the shrinkage along the vector, and
a random rotation makes the mean of the remaining error zero. The factor is multiplied into the block scales, and
stochastic rounding of the scales keeps their mean. Source: Quartet II (arXiv 2601.22813) for NVFP4; the IF4 variant
follows the published code of IF4 (arXiv 2603.28765).
"""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ifjax.arrays.blocking import Blocking
from ifjax.arrays.encoders import (
    Rotated,
    by_kernel_or_xla,
    encode_runs_by_kernel,
    encoder_for,
    refusal_of_runs,
    work_of,
)
from ifjax.arrays.qtensor import QTensor
from ifjax.arrays.quantize import Multiples
from ifjax.codec import ROUNDINGS, Rounding
from ifjax.codec.blocks import merge_blocks, split_blocks
from ifjax.codec.decode import narrowed
from ifjax.codec.eden import eden_constant, eden_peak, eden_units
from ifjax.codec.eden_places import EdenCodec
from ifjax.codec.headers import has_unsound
from ifjax.codec.rounding import uniform_noise
from ifjax.formats import E4M3, Candidate, Format, get_format
from ifjax.formats.floats import as_float, bits_of, magnitude_bits
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.devices import device_kind
from ifjax.numerics.hadamard import SIZES, hadamard, random_signs, signs_of
from ifjax.numerics.packing import pack
from ifjax.numerics.proofs import by_both, difference, fault_of, numbers_to_check
from ifjax.numerics.xla import divide, materialize, opaque

# A given amax counts as at most this, so that the QTensor's, less than twice as large, is finite. No rotated value is
# larger than 2^126, because the sum of a run is finite.
_LARGEST_AMAX = np.finfo(np.float32).max / 2


def ms_eden(
    x: ArrayLike,
    fmt: str | Format = "nvfp4",
    *,
    key: jax.Array | None = None,
    axis: int = -1,
    size: int = 16,
    signs: Literal["fixed"] | ArrayLike | None = None,
    noise: ArrayLike | None = None,
    amax: ArrayLike | None = None,
) -> jax.Array:
    """Rotate x by `hadamard(x, axis=axis, size=size, signs=signs)` and round the result to `fmt` by MS-EDEN.

    The result stays rotated: multiply it by an operand with the same rotation. Its mean over keys and random signs is
    the rotated x, to within 0.05% (measured). Over keys alone, with one rotation, the component of the rounding error
    across the vector remains.

    Args:
        x: floats [..., n, ...], n a multiple of `size`. The arithmetic is float32 from the rotation on.
        fmt: a format with E4M3 scales whose candidates share one scale, such as nvfp4, if4 or nvint4.
        key: key for the stochastic rounding of the scales.
        axis: the axis of rotation and blocks; the contraction axis of a product.
        size: size of the rotation, and of the vectors that are corrected as a whole: 16 in the code of IF4, 128 in
            Quartet II.
        signs: as for `hadamard`. The published code of IF4 applies its sixteen signs after the Hadamard matrix instead
            of before it, where they only change signs of the result: to reproduce it, pass None and multiply.
        noise: alternative to `key`: numbers in [0, 1), one for each block, [..., n / block, ...].
        amax: amax of the rotated x; by default, and for 0, its largest finite magnitude, in float32. Above 1.7e38 it
            counts as 1.7e38.

    Returns:
        The rounded values, in x's shape and dtype.

    Raises:
        TypeError: x is not a float array.
        ValueError: the format does not fit, neither or both of key and noise are given, amax is negative or not
            finite, or `hadamard` rejects its arguments.

    Example:
        >>> import jax
        >>> import ifjax
        >>> from ifjax.arrays.ms_eden import ms_eden
        >>> g = jax.random.normal(jax.random.key(0), (64, 256))
        >>> signs = ifjax.random_signs(jax.random.key(1), 128)
        >>> error = ms_eden(g, size=128, signs=signs, key=jax.random.key(2)) - ifjax.hadamard(g, size=128, signs=signs)
        >>> print(f"{(error**2).mean():.4f}")
        0.0096
    """
    x = as_array(x)
    q = ms_eden_packed(x, fmt, key=key, axis=axis, size=size, signs=signs, noise=noise, amax=amax)
    return q.dequantize(np.float32).astype(x.dtype)


def ms_eden_packed(
    x: ArrayLike,
    fmt: str | Format = "nvfp4",
    *,
    key: jax.Array | None = None,
    axis: int = -1,
    size: int = 16,
    signs: Literal["fixed"] | ArrayLike | None = None,
    noise: ArrayLike | None = None,
    amax: ArrayLike | None = None,
) -> QTensor:
    """Return the values of `ms_eden` as a QTensor in `packed_format(fmt)`; arguments and errors are those of `ms_eden`.

    The key may be given as its `seeds`. The QTensor's `amax` is not the array's, but the number to which K maps the
    factor of all values.
    """
    x, fmt = as_array(x), check_format(fmt, size)
    codes, scales, end = _rounded(x, fmt, key, axis, size, signs, noise, amax, in_multiples=False)
    axis = axis % x.ndim - x.ndim
    written, headroom = _packed(fmt)
    return QTensor(codes, scales, end, Blocking(written, axis, x.shape[axis], x.dtype, headroom))


def ms_eden_operand(
    x: jax.Array, fmt: str | Format, *, key: jax.Array, axis: int, size: int, signs: Any, amax: Any = None,
    in_multiples: bool = False,
) -> QTensor | Multiples:  # fmt: skip
    """Return `ms_eden_packed`, or its values without the tensor's factor, which nothing packs and unpacks."""
    if not in_multiples:
        return ms_eden_packed(x, fmt, key=key, axis=axis, size=size, signs=signs, amax=amax)
    values, factor = _rounded(x, check_format(fmt, size), key, axis, size, signs, None, amax, in_multiples=True)
    return Multiples(values, factor)


def _rounded(x, fmt, key, axis, size, signs, noise, amax, in_multiples) -> Any:
    """Return packed codes, scale bytes and amax of the QTensor, or values without the tensor's factor, and the factor.

    Arguments and errors are those of `ms_eden`; x is an array and fmt a record that `check_format` returned.
    """
    if (key is None) == (noise is None):
        raise ValueError("ms_eden needs key=, for example key=jax.random.key(0), or noise=, and not both")
    amax = None if amax is None else as_array(amax, jnp.float32)
    if amax is not None and has_unsound(amax):
        raise ValueError(f"amax must be finite and not negative, got {amax}")
    amax = None if amax is None else jnp.minimum(amax, np.float32(_LARGEST_AMAX))
    place = {"fmt": fmt, "axis": axis, "size": size, "in_multiples": in_multiples}
    encoder = encoder_for(device_kind())
    if encoder is None or key is None or _refusal(encoder, x, **place):
        return _by_xla(x, key, amax, signs, noise, **place)
    return _by_plan(x, key, amax, jnp.asarray(signs_of(signs, size), jnp.float32), encoder=encoder, **place)


def _by_xla(x, key, amax, signs, noise=None, *, fmt, axis, size, in_multiples):
    is_narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    z = hadamard(x.astype(jnp.float32) if is_narrow else x, axis=axis, size=size, signs=signs)
    axis = axis % x.ndim - x.ndim
    groups = split_blocks(z.astype(jnp.float32), fmt.block, axis)
    shape = tuple(n for i, n in enumerate(groups.shape) if i != groups.ndim + axis)
    if key is not None:
        noise = uniform_noise(key, shape, 1)[0] + np.float32(0.5)
    noise = as_array(noise, jnp.float32)
    if noise.shape != shape:
        raise ValueError(f"noise must have one number for each block, shape {shape}, got {noise.shape}")
    place = {"fmt": fmt, "axis": axis, "size": size}
    found = _encoded(groups, jnp.expand_dims(noise, axis), amax, in_multiples=in_multiples, **place)
    return (narrowed(found[0], x.dtype), found[1]) if in_multiples else found


def _refusal(encoder, x, *, fmt, axis, size, in_multiples):
    """Return why a kernel cannot take x; None if it can, and proved so."""
    if not -x.ndim <= axis < x.ndim or x.shape[axis] % size:
        return "the axis"
    axis, codec = axis % x.ndim - x.ndim, EdenCodec.of(fmt, np.dtype(x.dtype))
    reason = refusal_of_runs(encoder, x, codec, axis, size)
    return reason or _fault(encoder, codec, x.dtype, fmt, max(axis, -2), size, in_multiples)


def _fault(encoder, codec, dtype, fmt, axis, size, in_multiples):
    """Check the kernel on this machine's device; return what is wrong with it, or None."""

    def prove():
        def run():
            x, signs = jnp.asarray(numbers_to_check((128, 512))).astype(dtype), random_signs(jax.random.key(1), size)
            place = {"axis": axis, "size": size, "signs": signs, "in_multiples": in_multiples}
            return ms_eden_operand(x, fmt, key=jax.random.key(0), **place)

        return difference(*by_both(run))

    does = "ms_eden, multiply" if in_multiples else "ms_eden"
    return fault_of(work_of(encoder, does, codec.how, dtype, axis, Rotated(size, None)), encoder, prove)


@jax.jit(static_argnames=("encoder", "fmt", "axis", "size", "in_multiples"))
def _by_plan(x, key, amax, signs, *, encoder, fmt, axis, size, in_multiples):
    """Return `_by_xla`, by a kernel on the platform that it compiles for."""
    axis, codec = axis % x.ndim - x.ndim, EdenCodec.of(fmt, np.dtype(x.dtype))

    def by_kernel(*data):
        wants = {"wants_codes": not in_multiples, "wants_values": in_multiples}
        arrays, stored, factor = encode_runs_by_kernel(*data, encoder=encoder, codec=codec, axis=axis, **wants)
        return *arrays, factor if in_multiples else stored

    by_xla = functools.partial(_by_xla, fmt=fmt, axis=axis, size=size, in_multiples=in_multiples)
    return opaque(functools.partial(by_kernel_or_xla, encoder, by_kernel, by_xla), x, key, amax, signs)


@functools.lru_cache
def packed_format(fmt: Format) -> Format:
    """Return the format whose codes and headers MS-EDEN writes: `fmt`, if the steps of all its candidates are 1.

    MS-EDEN multiplies by the step before the scale and a decoder after it, which rounds differently. So the values of
    the grids include the step here, and codes and selectors are those of `fmt`.
    """

    def of(candidate):
        grid, step = candidate.grid, np.float32(candidate.step)
        values = tuple(float(np.float32(v) * step) for v in grid.values)
        return Candidate(dataclasses.replace(grid, name=f"{grid.name} x {step:.3g}", values=values))

    candidates = tuple(c if c.step == 1 else of(c) for c in fmt.candidates)
    if candidates == fmt.candidates:
        return fmt
    return dataclasses.replace(fmt, name=f"{fmt.name}_mseden", candidates=candidates)


def _packed(fmt):
    """Return the format and the headroom of `ms_eden_packed`."""
    headroom = eden_constant(fmt) / (fmt.tensor_peak * (fmt.grid.max if fmt.peak is None else fmt.peak))
    return packed_format(fmt), headroom


def check_format(fmt: str | Format, size: int) -> Format:
    """Return the format's record, if MS-EDEN supports it with vectors of `size`.

    Raises:
        ValueError: MS-EDEN does not support it; the message says why.
    """
    fmt = get_format(fmt)
    if fmt.scale != E4M3 or not fmt.has_tensor_scale:
        raise ValueError(f"MS-EDEN corrects E4M3 scales, and {fmt.name} has {fmt.scale.name}: use nvfp4 or if4")
    if any(c.scale_multiplier != 1 or c.peak is not None or c.offset for c in fmt.candidates):
        raise ValueError(
            f"MS-EDEN gives a block one scale, and {fmt.name} chooses between two: use nvfp4, as the published "
            "recipes do for backward passes beside a fouroversix forward pass"
        )
    if size not in SIZES or size % fmt.block:
        raise ValueError(f"size must be one of {SIZES} and a multiple of {fmt.name}'s block {fmt.block}, got {size}")
    return fmt


@jax.jit(static_argnames=("fmt", "axis", "size", "in_multiples"))
def _encoded(z, noise, amax, *, fmt, axis, size, in_multiples):
    """Return what `_rounded` does of blocks z [..., m, B, ...], values as float32; noise is [..., m, 1, ...]."""
    # Not all programs for CPUs pass NaN through a maximum of floats, as a maximum of their bits does.
    peaks = as_float(jnp.max(magnitude_bits(bits_of(z)), axis, keepdims=True, initial=0))
    own = jnp.max(jnp.where(jnp.isfinite(peaks), peaks, 0), initial=0)
    amax = own if amax is None else jnp.where(amax > 0, amax, own)  # an amax of 0 has seen no values
    power, unit = eden_units(amax, fmt)
    byte = fmt.scale.encode(divide(divide(peaks * power, eden_peak(fmt)), unit))
    scale = jnp.where(byte == 0, 1, fmt.scale.decode(byte))
    y = divide(z * power, scale * unit)

    # Losses are in units of y, not of x. The first grid breaks ties away from zero, the others as their records say.
    trials = []
    for i, c in enumerate(fmt.candidates):
        grid = c.grid if i else dataclasses.replace(c.grid, ties="away")
        scaled = y * fmt.input_factor(c)
        q = grid.round(scaled)
        if c.step != 1:  # the sign keeps compilers from contracting the product and the difference below
            q = jnp.copysign(jnp.abs(q) * np.float32(c.step), y)
        if in_multiples and grid.zero == "unsigned":  # no code has the sign of a zero
            q = jnp.where(q == 0, 0, q)
        trials.append((grid.encode(scaled), q, _sum(_product(y - q, y - q), axis)))
    (codes, q, loss), *others = trials
    selector = 0
    for c, (other_codes, other, other_loss) in zip(fmt.candidates[1:], others, strict=True):
        wins = other_loss < loss
        codes, q, loss = (jnp.where(wins, a, b) for a, b in ((other_codes, codes), (other, q), (other_loss, loss)))
        selector = jnp.where(wins, fmt.selector_of(c), selector)

    # Each vector of the rotation has one factor; it holds size / B blocks.
    def of_vectors(a):
        runs = split_blocks(jnp.squeeze(_sum(a, axis), axis), size // fmt.block, axis)
        return jnp.broadcast_to(_sum(runs, axis), runs.shape)

    above, below = of_vectors(_product(y, y)), of_vectors(_product(y, q))
    factor = jnp.where(below == 0, 1, divide(above, below))
    factor = jnp.expand_dims(merge_blocks(factor, axis), axis)
    payload = jnp.where(jnp.isfinite(peaks), _stochastic(scale * factor, noise, fmt.scale), fmt.scale.nan)
    end = _end(power, unit, fmt)
    if in_multiples:
        values = q * materialize(fmt.scale.decode, payload)
        return merge_blocks(values, axis), divide(end, np.float32(eden_constant(fmt)))
    header = jnp.squeeze(jnp.where(jnp.isfinite(peaks), fmt.join(selector, payload), fmt.scale.nan), axis)
    codes = jnp.where(jnp.isfinite(peaks), codes, 0)
    codes = pack(merge_blocks(codes.astype(jnp.uint8), axis), fmt.bits, axis)
    return codes, header.astype(jnp.uint8), end


def _end(power, unit, fmt):
    """Return the amax of the QTensor, of which the factor of all values is the part 1 / K."""
    inverse = as_float(np.int32(254 << 23) - bits_of(power))  # of a power of two
    return unit * np.float32(eden_constant(fmt)) * inverse


def _stochastic(value, noise, scale):
    """Return the payload of the scale above or below `value`, with the probabilities that keep the mean."""
    nearest = scale.encode(value)
    lower = jnp.where(scale.decode(nearest) > value, nearest - 1, nearest)
    upper = jnp.minimum(lower + 1, scale.top)
    down, up = scale.decode(lower), scale.decode(upper)
    return jnp.where(noise < divide(value - down, up - down), upper, lower)


def _product(a, b):
    # Clearing the last bit keeps compilers from contracting this product and the following sum to a fused
    # multiply-add, which would happen in some programs and not in others.
    return as_float(bits_of(a * b) & ~1)


def _sum(a, axis):
    """Return the sum along an axis whose length is a power of two, in one fixed order, with that axis kept."""
    while a.shape[axis] > 1:
        a, b = jnp.split(a, 2, axis)
        a = a + b
    return a


# The rounding record that training recipes use for operands.
MS_EDEN = ROUNDINGS.register(
    Rounding("ms_eden", operand=ms_eden_operand, packed=_packed, check=check_format, takes_seeds=True)
)
