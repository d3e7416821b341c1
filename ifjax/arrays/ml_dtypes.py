"""Conversion between QTensors and arrays of ml_dtypes types, which `jax.nn.scaled_matmul` takes."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array

from ifjax.arrays.blocking import Blocking
from ifjax.arrays.qtensor import QTensor
from ifjax.codec.blocks import merge_blocks
from ifjax.codec.headers import has_unsound
from ifjax.formats import E2M1, E4M3, E8M0, Format, get_format
from ifjax.numerics.byte_order import as_array
from ifjax.numerics.xla import divide

_SCALES = {E4M3.dtype: E4M3, E8M0.dtype: E8M0}


def is_plain_e2m1(fmt: Format) -> bool:
    """Return whether the format decodes to plain E2M1 times a scale, so that NVFP4 readers can decode it."""
    # Grids that differ only in rounding decode alike, so only the values are compared.
    decoding, *others = fmt.decodings
    return not others and decoding.grid.values == E2M1.values and (decoding.step, decoding.offset) == (1.0, 0.0)


def to_ml_dtypes(q: QTensor) -> tuple[Array, Array, Array | None]:
    """Return (elements, scales, factor) of a format whose bytes are plain NVFP4 or MXFP4, for `jax.nn.scaled_matmul`.

    Elements are float4_e2m1fn of q's shape, scales float8 [..., m, ...]. A value is element * scale * factor, where
    factor is amax / K in float32 (None for MX). A partial last block keeps its padding.

    Raises:
        ValueError: the format has other elements or scales, or stores a selector in the signs of the scales.
    """
    if not is_plain_e2m1(q.fmt) or q.fmt.scale.dtype not in _SCALES:
        raise ValueError(
            f"{q.fmt.name} is not E2M1 with plain scales, so no NVFP4 reader decodes it: quantize to nvfp4, "
            "fouroversix or mxfp4"
        )
    elements = lax.bitcast_convert_type(q.codes, jnp.float4_e2m1fn)
    elements = merge_blocks(jnp.moveaxis(elements, -1, q.axis), q.axis)
    scales = lax.bitcast_convert_type(q.scales, np.dtype(q.fmt.scale.dtype))
    return elements, scales, None if q.amax is None else divide(q.amax, q.fmt.tensor_constant(q.headroom))


def from_ml_dtypes(
    elements: ArrayLike,
    scales: ArrayLike,
    factor: ArrayLike | None = None,
    *,
    fmt: str | Format | None = None,
    axis: int = -1,
    length: int | None = None,
    dtype: DTypeLike = "float32",
    headroom: float = 1.0,
) -> QTensor:
    """Return the QTensor of arrays in the layout of `jax.nn.scaled_matmul`: the inverse of `to_ml_dtypes`.

    Works inside jit, where the signs of scales cannot be checked.

    Args:
        elements: float4_e2m1fn [..., m * block, ...].
        scales: float8_e4m3fn or float8_e8m0fnu [..., m, ...].
        factor: factor of all values, float32 of shape () or of leading axes; None for MX, or for a factor of 1.
        fmt: the format's record or name; by default nvfp4 or mxfp4, according to the dtype of the scales.
        axis: the blocked axis.
        length: number of elements along that axis that are not padding; by default all.
        dtype: dtype of the QTensor.
        headroom: headroom of the QTensor; 16/17 for unbiased stochastic rounding.

    Raises:
        TypeError: elements or scales have other dtypes.
        ValueError: the shapes do not fit the format's blocks, scales have signs, the format has no use for `factor`, or
            `factor` is negative, not finite, or 0 where values are not.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax.exchange import from_ml_dtypes, to_ml_dtypes
        >>> q = ifjax.quantize(jnp.arange(32.0), "fouroversix")
        >>> again = from_ml_dtypes(*to_ml_dtypes(q), fmt="fouroversix")
        >>> bool((again.codes == q.codes).all()), bool(again.amax == q.amax)
        (True, True)
    """
    elements, scales = jnp.asarray(elements), jnp.asarray(scales)
    if elements.dtype != jnp.float4_e2m1fn or scales.dtype not in _SCALES:
        raise TypeError(
            "needs float4_e2m1fn elements and float8_e4m3fn or float8_e8m0fnu scales, got "
            f"{elements.dtype} and {scales.dtype}"
        )
    fmt = get_format(fmt if fmt is not None else "nvfp4" if scales.dtype == E4M3.dtype else "mxfp4")
    if not is_plain_e2m1(fmt) or fmt.scale.dtype != scales.dtype:
        raise ValueError(f"{fmt.name} is not made of float4_e2m1fn and {scales.dtype}: name a format that is, or none")
    if not -elements.ndim <= axis < elements.ndim:
        raise ValueError(f"axis {axis} is out of range for shape {elements.shape}")
    axis = axis % elements.ndim - elements.ndim
    stored = elements.shape[axis]
    expected = list(elements.shape)
    expected[axis] = stored // fmt.block
    if stored % 2 or stored % fmt.block or scales.shape != tuple(expected):
        raise ValueError(
            f"{elements.shape} elements in blocks of {fmt.block} along {axis} need scales {tuple(expected)}, got "
            f"{scales.shape}: fmt=dataclasses.replace(ifjax.FORMATS[{fmt.name!r}], block=...) names another block"
        )
    length = stored if length is None else length
    if not stored - fmt.block < length <= stored:
        raise ValueError(f"length must end in the last of the blocks of {fmt.block}, got {length} of {stored}")
    byte = lax.bitcast_convert_type(scales, jnp.uint8)
    if fmt.scale == E4M3 and not isinstance(byte, Tracer) and bool((byte >= 0x80).any()):
        raise ValueError(f"scales with signs, which {fmt.name} does not have: IF4 marks integers so, others negate")
    amax = None
    if fmt.has_tensor_scale:
        amax = as_array(1.0 if factor is None else factor, jnp.float32) * fmt.tensor_constant(headroom)
        _check_amax(amax, byte)
    elif factor is not None:
        raise ValueError(f"{fmt.name} has no tensor scale: leave factor out")
    return QTensor(_packed(elements, axis), byte, amax, Blocking(fmt, axis, length, np.dtype(dtype), headroom))


def _check_amax(amax, scales):
    if isinstance(amax, Tracer) or isinstance(scales, Tracer):
        return
    if has_unsound(amax):
        raise ValueError(f"factor must be finite and not negative, and amax with it, which is {amax}")
    lost = (amax == 0).reshape(amax.shape + (1,) * (scales.ndim - amax.ndim)) & (scales != 0)
    if bool(jnp.any(lost)):
        raise ValueError("factor is 0 where scales are not, and every value would be 0: leave factor out, or give it")


@jax.jit(static_argnums=1)
def _packed(elements, axis):
    pairs = jnp.moveaxis(elements, axis, -1)
    pairs = pairs.reshape(*pairs.shape[:-1], pairs.shape[-1] // 2, 2)
    return jnp.moveaxis(lax.bitcast_convert_type(pairs, jnp.uint8), -1, axis)
