"""Headers of blocks: bytes in arrays, words in arithmetic; and the tensor's own scale."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ifjax.codec.blocks import as_float, bits_of, merge_blocks, split_blocks, unstack
from ifjax.numerics.xla import divide


def header_words(scales: jax.Array, nbytes: int, axis: int) -> jax.Array:
    """uint8 [..., m * W, ...] -> int32 [..., m, ...]: the headers of blocks whose bytes follow one another."""
    if nbytes == 1:
        return scales.astype(jnp.int32)
    parts = unstack(split_blocks(scales, nbytes, axis).astype(jnp.int32), axis)
    return sum((part << (8 * i) for i, part in enumerate(parts[1:], 1)), parts[0])


def header_bytes(words: jax.Array, nbytes: int, axis: int) -> jax.Array:
    """int32 [..., m, ...] -> uint8 [..., m * W, ...], lowest byte first; higher bits of the words are dropped."""
    if nbytes == 1:
        return words.astype(jnp.uint8)
    parts = [(lax.shift_right_logical(words, np.int32(8 * i)) & 0xFF).astype(jnp.uint8) for i in range(nbytes)]
    return merge_blocks(jnp.stack(parts, axis=words.ndim + 1 + axis), axis)


class TensorScale(NamedTuple):
    """The tensor-wide scale, in units in which no product of the codec overflows or is flushed to zero.

    x * power has the absolute maximum `amax`. An encoder has `ratio`, K / amax (0 where amax is), and its reciprocal.
    """

    power: jax.Array
    amax: jax.Array
    ratio: Any = None
    unit: Any = None


def is_amax(value: Any) -> bool:
    """Whether a number can be the maximum of values other than zero: finite and positive in float32, not flushed."""
    with np.errstate(over="ignore"):
        return bool(np.finfo(np.float32).tiny <= np.float32(value) < np.inf)


def power_near(amax: jax.Array) -> jax.Array:
    """The power of two that brings float32 amax to [1, 2), 2^127 (without reciprocal) to 2; 1 for zeros."""
    exponent = lax.clamp(np.int32(-126), (bits_of(amax) >> 23) - 127, np.int32(126))
    return jnp.where(amax > 0, as_float((127 - exponent) << 23), 1)


def normalized(amax: jax.Array, constant: np.float32, ndim: int, power: jax.Array | None = None) -> TensorScale:
    """The scale of an encoder: its power brings amax to [1, 2), so that losses neither underflow nor overflow, and so
    that multiplying a tensor by a power of two changes neither codes nor choices.

    `amax` is float32, of the shape of leading axes; it broadcasts against `ndim` axes. `constant` is K. `power` is
    given where a number near amax is to be in its units.
    """
    tensor = _scaled(amax, power_near(amax) if power is None else power, ndim)
    ratio = jnp.where(tensor.amax > 0, divide(constant, tensor.amax), 0)
    return tensor._replace(ratio=ratio, unit=divide(1.0, ratio))


LARGE_AMAX = np.float32(2.0**113)


def safe(amax: jax.Array, ndim: int) -> TensorScale:
    """The scale of a decoder: `power` is 1 but for tensors near the ends of float32's range.

    From LARGE_AMAX on, amax * 448 * 28 overflows; below 2^-100, a reciprocal does or is flushed. Multiplying by a
    power of two changes no other bit. Scales of E5M3 overflow from 2^108 on, as in the published vectors.
    """
    power = jnp.where(amax < np.float32(2.0**-100), np.float32(2.0**64), np.float32(1))
    return _scaled(amax, jnp.where(amax >= LARGE_AMAX, np.float32(2.0**-64), power), ndim)


def _scaled(amax, power, ndim):
    shape = amax.shape + (1,) * (ndim - amax.ndim)
    return TensorScale(power.reshape(shape), (amax * power).reshape(shape))
