"""The one decoder, for every format: what codes and headers stand for."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ifjax.codec.blocks import pick
from ifjax.codec.headers import TensorScale, safe
from ifjax.formats import Decoding, Format
from ifjax.numerics.xla import divide

FLOAT32_END = np.finfo(np.float32).max


def decode(
    codes: jax.Array, headers: jax.Array, fmt: Format, *, place: Any = 0, amax: jax.Array | None = None,
    headroom: float = 1.0,
) -> jax.Array:  # fmt: skip
    """float32 values of integer codes: ((v * s) * amax) * step / K, each operation rounded once.

    NaN where the header means NaN. Values without a tensor scale saturate at float32's end.

    Args:
        codes: integers.
        headers: int32, broadcast against the codes.
        place: of each code in its block: an integer or int32 that broadcasts against the codes. Only scales with
            several factors a block look at it.
        amax: float32 of the shape of the leading axes that keep their own; None without a tensor scale.
        headroom: see `Format.tensor_constant`.
    """
    selector, payload = fmt.split(headers)
    values = unscaled(codes, selector, fmt)
    step = pick(selector, [jnp.float32(d.step) for d in fmt.decodings])
    tensor = None if amax is None else safe(amax, codes.ndim)
    divisor = None if tensor is None else fmt.tensor_constant(headroom) * tensor.power
    values = scaled(values, fmt.scale.decode(payload, place), step, tensor, divisor)
    # With a tensor scale values are no larger than amax, but E5M3's products overflow on the way, as published.
    return values if tensor is not None else lax.clamp(-FLOAT32_END, values, FLOAT32_END)


def narrowed(values: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Decoded float32 values in a type, in which those beyond its largest finite value saturate, as in grids."""
    end = float(jnp.finfo(dtype).max)
    if end < FLOAT32_END:
        values = lax.clamp(np.float32(-end), values, np.float32(end))
    return values.astype(dtype)


def unscaled(codes: jax.Array, selector: Any, fmt: Format) -> jax.Array:
    """float32 values of integer codes in units of their decoding's step; the selector broadcasts against them."""
    return pick(selector, [grid_values(codes, decoding) for decoding in fmt.decodings])


def block_scale(headers: jax.Array, fmt: Format) -> jax.Array:
    """float32: what the `unscaled` values of blocks with these headers are multiplied by, amax / K aside.

    For scales with one factor a block.
    """
    selector, payload = fmt.split(headers)
    return fmt.scale.decode(payload) * pick(selector, [jnp.float32(d.step) for d in fmt.decodings])


def grid_values(codes: jax.Array, decoding: Decoding) -> jax.Array:
    """float32 values of integer codes by one decoding, in units of its step."""
    values = decoding.grid.decode(codes)
    return values + np.float32(decoding.offset) if decoding.offset else values


def scaled(
    values: jax.Array, scale: jax.Array, step: Any, tensor: TensorScale | None, divisor: Any, *, varies: bool = False
) -> jax.Array:
    """((values * scale) * amax) * step / divisor, each operation rounded once; in units of `tensor`.

    `varies`: see `ifjax.numerics.xla.divide`.
    """
    d = values * scale
    d = d if tensor is None else d * tensor.amax
    # A step of 1 is left out, not multiplied by, only where that is known beforehand.
    d = d if isinstance(step, float) and step == 1 else d * step
    return d if tensor is None else divide(d, divisor, varies=varies)
