"""Conversion of block headers between bytes and int32 words, and the tensor scale."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from ifjax.codec.blocks import merge_blocks, split_blocks, unstack
from ifjax.formats.floats import as_float, bits_of
from ifjax.numerics.mapped import unchanged
from ifjax.numerics.xla import divide, where


def header_words(scales: jax.Array, nbytes: int, axis: int) -> jax.Array:
    """Join header bytes, lowest first, to words: uint8 [..., m * W, ...] -> int32 [..., m, ...]."""
    if nbytes == 1:
        return scales.astype(jnp.int32)
    parts = unstack(split_blocks(scales, nbytes, axis).astype(jnp.int32), axis)
    return sum((part << (8 * i) for i, part in enumerate(parts[1:], 1)), parts[0])


def header_bytes(words: jax.Array, nbytes: int, axis: int) -> jax.Array:
    """Split words into header bytes, lowest first: int32 [..., m, ...] -> uint8 [..., m * W, ...].

    Bits above the W bytes are dropped.
    """
    if nbytes == 1:
        return words.astype(jnp.uint8)
    parts = [(lax.shift_right_logical(words, np.int32(8 * i)) & 0xFF).astype(jnp.uint8) for i in range(nbytes)]
    return merge_blocks(jnp.stack(parts, axis=words.ndim + 1 + axis), axis)


class Units(NamedTuple):
    """Units in which no product of the codec overflows or is flushed to zero.

    Values of a tensor are multiplied by `power`, a power of two; `amax` is then the absolute maximum.
    """

    power: jax.Array
    amax: jax.Array


class TensorScale(NamedTuple):
    """The tensor scale of an encoder, and the power of its `Units`.

    `given` is the tensor's amax as it came, and `ratio` is K / amax (0 where amax is 0). What follows from these by one
    operation is computed where it is needed: an array of its own is a kernel of its own on a CPU.
    """

    power: jax.Array
    given: jax.Array
    ratio: jax.Array

    @property
    def amax(self) -> jax.Array:
        """Absolute maximum of x * power."""
        return self.given * self.power

    @property
    def units(self) -> Units:
        """The units, whose amax is computed here."""
        return Units(self.power, self.amax)

    @property
    def unit(self) -> jax.Array:
        """Reciprocal of the ratio."""
        return divide(1.0, self.ratio)


def is_amax(value: Any) -> bool:
    """Whether a number can be the maximum of values other than zero: finite and positive in float32, not flushed."""
    with np.errstate(over="ignore"):
        return bool(np.finfo(np.float32).tiny <= np.float32(value) < np.inf)


def has_unsound(values: Any) -> bool:
    """Return whether maxima or weights that are known hold a negative, infinite or NaN one; False while tracing."""
    return not isinstance(values, Tracer) and not bool(jnp.all((values >= 0) & (values < jnp.inf)))


def power_near(amax: jax.Array) -> jax.Array:
    """Return the power of two that scales float32 amax to [1, 2); 1 for amax 0.

    2^127 and above are scaled to [2, 4), because the reciprocal of 2^127 is not a normal number.
    """
    exponent = lax.clamp(np.int32(1), bits_of(amax) >> 23, np.int32(253))
    return where(amax > 0, as_float((254 - exponent) << 23), 1)


def normalized(
    amax: jax.Array, constant: np.float32, ndim: int, power: jax.Array | None = None, *,
    by_elements: Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]] = unchanged,
) -> TensorScale:  # fmt: skip
    """Return the tensor scale for an encoder, whose power scales amax to [1, 2).

    Losses then neither underflow nor overflow, and multiplying a tensor by a power of two changes neither codes nor
    choices. `amax` is float32 over leading axes, and broadcasts against `ndim` axes. `constant` is K. A given `power`
    replaces that of amax. `by_elements`: see `ifjax.numerics.mapped`.
    """

    @by_elements
    def ratio(amax, power):
        peak = amax * power
        return where(peak > 0, divide(constant, peak), 0)

    amax = _with_axes(amax, ndim)
    power = by_elements(power_near)(amax) if power is None else _with_axes(power, ndim)
    return TensorScale(power, amax, ratio(amax, power))


LARGE_AMAX = np.float32(2.0**113)


def safe(amax: jax.Array, ndim: int) -> Units:
    """Return the units of a decoder, whose power is 1 except for amax near the ends of float32's range.

    From LARGE_AMAX on, amax * 448 * 28 overflows; below 2^-100, a reciprocal overflows or is flushed to zero.
    Multiplying by a power of two changes no other bits. With E5M3 scales, values overflow from 2^108 on, as in the
    published vectors.
    """
    power = where(amax < np.float32(2.0**-100), np.float32(2.0**64), np.float32(1))
    power = where(amax >= LARGE_AMAX, np.float32(2.0**-64), power)
    return Units(_with_axes(power, ndim), _with_axes(amax * power, ndim))


def _with_axes(a, ndim):
    return a.reshape(a.shape + (1,) * (ndim - a.ndim))
