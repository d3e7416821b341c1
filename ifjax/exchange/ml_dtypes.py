"""Arrays of ml_dtypes, as jax.nn.scaled_matmul takes them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from ifjax.arrays.qtensor import QTensor
from ifjax.exchange.layouts import _E4M3, _E8M0, _is_plain_e2m1
from ifjax.formats import Format, get_format


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
    """The QTensor of the arrays that `jax.nn.scaled_matmul` takes: the inverse of `ifjax.to_ml_dtypes`.

    Works inside jit, where signs of scales cannot be checked.

    Args:
        elements: float4_e2m1fn [..., m * block, ...].
        scales: float8_e4m3fn or float8_e8m0fnu [..., m, ...].
        factor: what all is multiplied by, float32 of shape () or of leading axes; None for MX, and for 1.
        fmt: the format's record or name: nvfp4 or mxfp4 unless stated.
        axis: of the blocks.
        length: how many of the elements along it count; all, unless stated.
        dtype: what the QTensor stands for.
        headroom: of the QTensor; 16/17 for what was rounded without bias.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not make the format's blocks; scales with signs.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax.exchange import from_ml_dtypes
        >>> q = ifjax.quantize(jnp.arange(32.0), "fouroversix")
        >>> again = from_ml_dtypes(*ifjax.to_ml_dtypes(q), fmt="fouroversix")
        >>> bool((again.codes == q.codes).all()), bool(again.amax == q.amax)
        (True, True)
    """
    elements, scales = jnp.asarray(elements), jnp.asarray(scales)
    if elements.dtype != jnp.float4_e2m1fn or scales.dtype not in (_E4M3, _E8M0):
        raise TypeError(
            "needs float4_e2m1fn elements and float8_e4m3fn or float8_e8m0fnu scales, got "
            f"{elements.dtype} and {scales.dtype}"
        )
    fmt = get_format(fmt if fmt is not None else "nvfp4" if scales.dtype == _E4M3 else "mxfp4")
    if not _is_plain_e2m1(fmt) or fmt.scale.dtype != scales.dtype:
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
    if fmt.scale.dtype == _E4M3 and not isinstance(byte, Tracer) and bool((byte >= 0x80).any()):
        raise ValueError(f"scales with signs, which {fmt.name} does not have: IF4 marks integers so, others negate")
    _, largest = fmt.constants(headroom)
    if fmt.scale.largest is None:
        if factor is not None:
            raise ValueError(f"{fmt.name} has no tensor scale: leave factor out")
        amax = None
    else:
        amax = jnp.asarray(1.0 if factor is None else factor, jnp.float32) * largest
    return QTensor(_packed(elements, axis), scales, amax, fmt, headroom, axis, length, np.dtype(dtype), False)


@jax.jit(static_argnums=1)
def _packed(elements, axis):
    pairs = jnp.moveaxis(elements, axis, -1)
    pairs = pairs.reshape(*pairs.shape[:-1], pairs.shape[-1] // 2, 2)
    return jnp.moveaxis(lax.bitcast_convert_type(pairs, jnp.uint8), -1, axis)
