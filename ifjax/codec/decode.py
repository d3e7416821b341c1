"""The one decoder, for every format."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.codec.blocks import _pick
from ifjax.formats import Format
from ifjax.numerics.xla import divide


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


def _scale_value(byte, fmt):
    return fmt.scale.decode(byte & 0x7F if fmt.has_flag else byte)
