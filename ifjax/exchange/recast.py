"""The same values in another format, code for code, where that exists: MXFP4 as NVFP4."""

import math

import jax.numpy as jnp
import numpy as np

from ifjax.arrays import Blocking, QTensor
from ifjax.exchange.blocks import are_zeros
from ifjax.exchange.layouts import elements_of
from ifjax.formats import Format, TableScale, get_format


def recast(q: QTensor, fmt: str | Format = "nvfp4") -> QTensor:
    """Return a QTensor in another format with the same codes and exactly the same values.

    From a format without a tensor scale, whose block scales are powers of two, to one whose scales have a mantissa:
    with k the exponent of a block's scale, the new scale is 2^(k - m), and amax is 2^m K. For NVFP4 it exists if the
    scales of all blocks that are not zero lie within a factor of 2^17: 2^-9 to 2^8 are E4M3 numbers. The matrices of a
    stack share m if they can; else each has its own.

    Source: the cast of gpt-oss's weights in NVIDIA ModelOpt.

    Raises:
        ValueError: there is no such QTensor; the message says why.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax.exchange import recast
        >>> q = ifjax.quantize(jnp.arange(64.0).reshape(1, 64), "mxfp4")
        >>> new = recast(q)
        >>> new, bool((new.dequantize() == q.dequantize()).all())
        (QTensor(nvfp4, 1x64 float32, axis=-1, 5.000 bits a value), True)
    """
    fmt = get_format(fmt)
    _check(q.fmt, fmt)
    codes, scales = (np.moveaxis(np.asarray(a), q.axis, -1) for a in (q.codes, q.scales))
    used = ~are_zeros(scales, codes, q.fmt)
    exponents = np.where(used, np.frexp(_values(q.fmt))[1][scales] - 1.0, np.nan)
    powers = {math.frexp(v)[1] - 1: i for i, v in enumerate(_values(fmt)) if v > 0 and math.frexp(v)[0] == 0.5}
    batch, top = scales.shape[:-2], max(powers)
    for shape in dict.fromkeys(((), batch)):
        largest = _largest(exponents, shape)
        m = (largest - top).reshape(shape + (1,) * (scales.ndim - len(shape)))
        below = used & (exponents - m < min(powers))
        if not below.any():
            break
    else:
        raise ValueError(
            f"{int(below.sum())} of {int(used.sum())} blocks have a scale more than 2^{top - min(powers)} below the "
            f"largest, and {fmt.name} has no such scales: keep {q.fmt.name}, or dequantize and quantize again"
        )
    table = np.zeros(top - min(powers) + 1, np.uint8)
    for exponent, payload in powers.items():
        table[exponent - min(powers)] = payload
    index = np.where(used, exponents - m - min(powers), 0).astype(int)
    new = np.where(used, table[index], np.uint8(0)).repeat(q.fmt.block // fmt.block, -1)
    with np.errstate(over="ignore"):  # what comes of it is checked
        amax = np.ldexp(fmt.tensor_constant(), (largest - top).astype(int)).astype(np.float32)
    if not ((amax >= np.finfo(np.float32).tiny) & (amax < np.inf)).all():
        raise ValueError(f"amax would be {amax}, which is no normal float32 number: scale the weight")
    blocking = Blocking(fmt, q.axis, q.blocking.length, q.dtype, 1.0, q.block_2d, q.names)
    # Blocks that only fill up are shorter now.
    blocks = -(-q.shape[q.axis] // fmt.block)
    codes, new = codes[..., : blocks * fmt.block * fmt.bits // 8], new[..., :blocks]
    codes, new = (jnp.asarray(np.moveaxis(a, -1, q.axis)) for a in (codes, new))
    return QTensor(codes, new, jnp.asarray(amax), blocking)


def can_recast(source: Format, target: Format) -> bool:
    """Return whether tensors of one format can be recast to another, if their scales lie near enough."""
    scales = all(isinstance(f.scale, TableScale) and f.scale.nbytes == 1 for f in (source, target))
    powers = scales and all(v == 0 or math.frexp(v)[0] == 0.5 for v in _values(source)[:-1])
    plain = not source.has_selector and not source.has_tensor_scale and target.has_tensor_scale
    whole = source.block % target.block == 0 and target.block * target.bits % 8 == 0
    return elements_of(source) == elements_of(target) and powers and plain and whole


def _check(source: Format, target: Format) -> None:
    if not can_recast(source, target):
        raise ValueError(
            f"{source.name} cannot be recast to {target.name} code for code: needs the same elements, scales that are "
            "powers of two without a tensor scale, and blocks that divide them, as from mxfp4 to nvfp4"
        )


def _values(fmt: Format) -> np.ndarray:
    scale = fmt.scale
    assert isinstance(scale, TableScale)
    return np.array([*scale.values, *[np.nan] * (256 - len(scale.values))])


def _largest(exponents: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The largest exponent of the used blocks of each matrix, or of all; 0 where there are none."""
    flat = exponents.reshape(*shape, -1)
    largest = np.where(np.isnan(flat), -np.inf, flat).max(-1)
    return np.where(np.isinf(largest), 0.0, largest)
