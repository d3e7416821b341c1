"""The decoder for all formats: values from codes and headers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ifjax.codec.blocks import pick
from ifjax.codec.headers import TensorScale, Units, safe
from ifjax.formats import Decoding, Format
from ifjax.numerics.mapped import mapped
from ifjax.numerics.xla import by_platform, divide

FLOAT32_END = float(np.finfo(np.float32).max)


def decode(
    codes: jax.Array, headers: jax.Array, fmt: Format, *, place: Any = 0, amax: jax.Array | None = None,
    headroom: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Return float32 values of integer codes: ((v * s) * amax) * step / K, each operation rounded once.

    Values are NaN where the header is NaN. Without a tensor scale they saturate at float32's largest finite value.

    Args:
        codes: integers.
        headers: int32, broadcast against the codes.
        place: position of each code in its block, an integer or int32 that broadcasts against the codes. Only scales
            with several factors in a block use it.
        amax: float32 over leading axes; None without a tensor scale.
        headroom: see `Format.tensor_constant`.
    """
    if amax is not None:
        amax = amax.reshape(amax.shape + (1,) * (max(codes.ndim, headers.ndim) - amax.ndim))
    return _decode(codes, headers, place if fmt.scale.runs else 0, amax, fmt, headroom)


@jax.jit(static_argnums=(4, 5))
def _decode(codes, headers, place, amax, fmt, headroom):
    def decoded(codes, headers, amax):
        selector, payload = fmt.split(headers)
        values, scale = unscaled(codes, selector, fmt), scale_of(payload, fmt, place)
        return times_scales(values, selector, scale, fmt, amax=amax, headroom=headroom)

    if fmt.scale.runs:  # headers are long, and a map would decode them for each value
        return decoded(codes, headers, amax)
    return by_platform(codes, headers, amax, cpu=mapped(decoded), default=decoded)


def times_scales(
    values: jax.Array, selector: jax.Array, scale: jax.Array, fmt: Format, *, amax: jax.Array | None = None,
    headroom: float = 1.0,
) -> jax.Array:  # fmt: skip
    """Return `decode` of codes, given their `unscaled` values and the selectors and scales of their headers."""
    steps = [d.step for d in fmt.decodings]
    step = 1.0 if set(steps) == {1} else pick(selector, [jnp.float32(s) for s in steps])
    tensor = None if amax is None else safe(amax, values.ndim)
    divisor = None if tensor is None else fmt.tensor_constant(headroom) * tensor.power
    values = scaled(values, scale, step, tensor, divisor)
    # With a tensor scale values are no larger than amax, but E5M3's products overflow on the way, as published.
    if tensor is not None or fmt.largest <= FLOAT32_END:
        return values
    return lax.clamp(np.float32(-FLOAT32_END), values, np.float32(FLOAT32_END))


def scale_of(payload: jax.Array, fmt: Format, place: Any = 0) -> jax.Array:
    """Return the float32 scales of payloads from `fmt.split`."""
    return (fmt.scale.decode_written if fmt.has_selector else fmt.scale.decode)(payload, place)


def narrowed(values: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Convert decoded float32 values to `dtype`, saturating at its largest finite value."""
    end = float(jnp.finfo(dtype).max)
    if end < FLOAT32_END:
        values = lax.clamp(np.float32(-end), values, np.float32(end))
    return values.astype(dtype)


def unscaled(codes: jax.Array, selector: Any, fmt: Format) -> jax.Array:
    """Return float32 values of codes in units of their decoding's step; `selector` broadcasts against the codes."""
    return pick(selector, [grid_values(codes, decoding) for decoding in fmt.decodings])


def block_scale(headers: jax.Array, fmt: Format) -> jax.Array:
    """Return the float32 factor of the `unscaled` values of blocks with these headers, without amax / K.

    For scales with one factor per block.
    """
    selector, payload = fmt.split(headers)
    return scale_of(payload, fmt) * pick(selector, [jnp.float32(d.step) for d in fmt.decodings])


def grid_values(codes: jax.Array, decoding: Decoding) -> jax.Array:
    """Return float32 values of integer codes for one decoding, in units of its step."""
    values = decoding.grid.decode(codes)
    return values + np.float32(decoding.offset) if decoding.offset else values


def scaled(
    values: jax.Array, scale: jax.Array, step: Any, tensor: TensorScale | Units | None, divisor: Any, *,
    varies: bool = False,
) -> jax.Array:  # fmt: skip
    """Return ((values * scale) * amax) * step / divisor, each operation rounded once, in units of `tensor`.

    `varies`: see `ifjax.numerics.xla.divide`.
    """
    d = values * scale
    d = d if tensor is None else d * tensor.amax
    # The multiplication is skipped only for a step that is statically 1.
    d = d if isinstance(step, float) and step == 1 else d * step
    return d if tensor is None else divide(d, divisor, varies=varies)
