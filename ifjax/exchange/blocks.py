"""QTensors to the `Blocks` that layouts write, and back, with the checks that both ways share."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from ifjax.arrays import Blocking, QTensor
from ifjax.arrays.qtensor import check_arrays
from ifjax.exchange.layouts import Blocks, InputFactor, Layout, Size
from ifjax.formats import E4M3, Format
from ifjax.numerics.packing import packed_length

TINY = np.finfo(np.float32).tiny


def blocks_of(q: QTensor, layout: Layout) -> Blocks:
    """Return a QTensor's arrays as a layout writes them, [..., out, ...], with its factors both ways round.

    Raises:
        ValueError: readers of the layout would decode something else.
    """
    check_arrays(q)
    check_shape(q.shape, q.axis, q.fmt, layout)
    codes, scales = (np.moveaxis(np.asarray(a), q.axis, -1) for a in (q.codes, q.scales))
    *batch, rows, _ = codes.shape
    size = Size(tuple(batch), rows, q.shape[q.axis], scales.shape[-1] // q.fmt.scale.nbytes)
    check_scales(scales, q.fmt)
    check_zero_blocks(scales, codes, q.fmt)
    amax, multiplier, divisor = _factors(q, scales, size)
    return Blocks(codes, scales, amax, multiplier, divisor, q.fmt, size)


def check_shape(shape: tuple[int, ...], axis: int, fmt: Format, layout: Layout) -> None:
    """Raise if a layout stores no tensors of this shape, blocked along `axis`."""
    if len(shape) < 2 or (len(shape) > 2 and not layout.stacks):
        raise ValueError(
            f"{layout.name} stores matrices, got shape {shape}: export stacked layers one by one (q[i]), and reshape "
            "other kernels before they are quantized"
        )
    if axis not in (-1, -2):
        raise ValueError(
            f"{layout.name} has its blocks along one of the last two axes, got axis {axis} of {shape}: move it there "
            "before the weight is quantized"
        )
    if not math.prod(shape) or shape[axis] % fmt.block:
        raise ValueError(
            f"the blocked axis {axis} of {shape} must be a multiple of {fmt.block}, because readers know no filled-up "
            "blocks: append zeros to the weight, and to the layer's inputs, before quantizing"
        )


def qtensor_of(blocks: Blocks, layout: Layout, fmt: Format, axis: int, dtype: np.dtype, headroom: float) -> QTensor:
    """Return the QTensor of what a layout has read, with its blocks along `axis`: -1 as stored, or -2.

    Raises:
        ValueError: arrays that contradict each other or the format.
    """
    length = check_stored(blocks, layout, fmt)
    codes = blocks.codes
    scales = checked_scales(codes, blocks.scales, fmt)
    checked = scales
    amax = amax_of(blocks, scales.shape[:-2], lambda: checked, fmt, headroom) if fmt.has_tensor_scale else None
    codes, scales = (jnp.asarray(np.moveaxis(a, -1, axis)) for a in (codes, scales))
    amax = None if amax is None else jnp.asarray(amax)
    return QTensor(codes, scales, amax, Blocking(fmt, axis, length, dtype, headroom))


def check_stored(blocks: Blocks, layout: Layout, fmt: Format) -> int:
    """Return how many values a row has.

    Raises:
        ValueError: codes and scales that do not belong together, or a stack where the layout has none.
    """
    codes, scales = blocks.codes, blocks.scales
    length = scales.shape[-1] // fmt.scale.nbytes * fmt.block if scales.ndim else 0
    length = length if blocks.size is None else blocks.size.columns
    whole = -(-length // fmt.block) * fmt.block
    if codes.ndim < 2 or not codes.size or codes.shape[:-1] != scales.shape[:-1] or (
        codes.shape[-1] != packed_length(whole, fmt.bits)
    ):  # fmt: skip
        sizes = " and ".join(" x ".join(map(str, a.shape)) for a in (codes, scales))
        raise ValueError(
            f"{sizes} bytes of codes and scales do not make blocks of {fmt.block}, as in {layout.algorithm}: swizzled "
            "scales have to be taken apart first"
        )
    if codes.ndim > 2 and not layout.stacks:
        raise ValueError(f"{layout.name} stores matrices, got {codes.shape}: stacks have to be taken apart first")
    return length


def checked_scales(codes: np.ndarray, scales: np.ndarray, fmt: Format) -> np.ndarray:
    """Return scales as they are kept here; codes are looked at only beside scales that leave open what is meant.

    Raises:
        ValueError: as `check_scales` and `check_zero_blocks`.
    """
    scales = zeros_for_nan(scales, codes, fmt)
    check_scales(scales, fmt)
    check_zero_blocks(scales, codes, fmt)
    return scales


def check_scales(scales: np.ndarray, fmt: Format) -> None:
    """Raise if the bytes are no scales of this format, of finite blocks. Headers of several bytes pass."""
    if fmt.scale.nbytes > 1:
        return
    if fmt.scale.bits < 8:
        above = scales >> fmt.scale.bits
        if not fmt.has_selector and above.any():
            raise ValueError(
                f"{int(above.astype(bool).sum())} of {scales.size} block scales have their sign set, which "
                f"{fmt.name}'s never have: in IF4 and MixFP4 it marks blocks of integers, which decode in two "
                "different ways, and elsewhere it negates. It cannot be decided which is meant, and as NVFP4 these "
                "blocks would change their signs: state fmt=, such as 'mixfp4', if you know it"
            )
    nan = _is_nan(scales, fmt)
    if nan.any():
        raise ValueError(f"{int(nan.sum())} of {scales.size} block scales are NaN, because the weight was not finite: "
                         "quantize it again without NaN and infinity")  # fmt: skip


def zeros_for_nan(scales: np.ndarray, codes: np.ndarray, fmt: Format) -> np.ndarray:
    """Return scales in which those that are NaN are 0, where their blocks hold zeros: 0 / 0 of the tool that wrote."""
    if fmt.scale.nbytes > 1 or fmt.block * fmt.bits % 8:
        return scales
    nan = _is_nan(scales, fmt)
    if not nan.any():
        return scales
    return np.where(nan & are_zeros(scales, codes, fmt), np.uint8(0), scales)


def _is_nan(scales: np.ndarray, fmt: Format) -> np.ndarray:
    nan = getattr(fmt.scale, "nan", None)
    payload = scales & (2**fmt.scale.bits - 1) if fmt.scale.bits < 8 else scales
    return np.zeros(scales.shape, bool) if nan is None else payload == nan


def check_zero_blocks(scales: np.ndarray, codes: np.ndarray, fmt: Format) -> None:
    """Raise if blocks with scale byte 0, on which tools disagree for powers of two, hold other values than zeros."""
    if fmt.scale.nbytes > 1 or fmt.scale.bits < 8 or (scales != 0).all():
        return
    if ((scales == 0) & ~are_zeros(scales, codes, fmt)).any():
        raise ValueError(
            "a block with scale byte 0 has codes that are not zero: that byte is 2^-127 for some readers and 0 for "
            "others, ifjax among them. Scale the weight up"
        )


def are_zeros(scales: np.ndarray, codes: np.ndarray, fmt: Format) -> np.ndarray:
    """Whether all codes of a block stand for 0, in the block's own decoding."""
    selector = scales >> fmt.scale.bits if fmt.has_selector else np.zeros(scales.shape, np.uint8)
    found = np.zeros(scales.shape, bool)
    for i, decoding in enumerate(fmt.decodings):
        table = _zero_bytes(decoding.grid.values, decoding.offset, fmt.bits)
        found |= (selector == i) & table[codes].reshape(*scales.shape, -1).all(-1)
    return found


@functools.cache
def _zero_bytes(values: tuple[float, ...], offset: float, bits: int) -> np.ndarray:
    """Whether a byte's codes all stand for 0; codes that lie in two bytes count as no zeros, but for code 0."""
    if 8 % bits:
        return np.arange(256) == 0
    codes = np.stack([np.arange(256) >> start & (2**bits - 1) for start in range(0, 8, bits)], -1)
    return (np.asarray(values, np.float32)[codes] + np.float32(offset) == 0).all(-1)


# --- factors ---------------------------------------------------------------------------------------------------------


def _factors(q: QTensor, scales: np.ndarray, size: Size) -> tuple[Any, Any, Any]:
    """amax, amax / K and K / amax, of shape () or of the batch."""
    largest = q.fmt.tensor_constant(q.headroom)
    # Without an amax a value is code * scale.
    amax = np.asarray(largest if q.amax is None else q.amax, np.float32)
    if amax.size == 1:
        amax = amax.reshape(())
    else:
        lead = len(size.batch)
        if any(n > 1 for n in amax.shape[lead:]):
            raise ValueError(
                f"the layout has one factor for a matrix, and this one has amax of shape {amax.shape}: quantize "
                "without amax_axes"
            )
        amax = amax.reshape(amax.shape[:lead] + (1,) * (lead - amax.ndim))
        amax = np.broadcast_to(amax, size.batch)
    used = scales.reshape(*(size.batch if amax.ndim else ()), -1).any(-1)
    amax = np.where((amax == 0) & ~used, largest, amax)  # any factor does for zeros, but 0 and its reciprocal are none
    with np.errstate(all="ignore"):  # what comes of it is checked
        multiplier, divisor = (amax / largest).astype(np.float32), (largest / amax).astype(np.float32)
    for factor in (multiplier, divisor):
        wrong = ~((factor >= TINY) & (factor < np.inf))
        if wrong.any():
            raise ValueError(
                f"amax {amax[wrong].flat[0]} makes the factor {factor[wrong].flat[0]}, which is no normal float32 "
                "number > 0: scale the weight"
            )
    return amax.astype(np.float32), multiplier, divisor


def needed_amax(amax: Any, fmt: Format, headroom: float, layout: Layout) -> np.float32 | None:
    """Return the amax that a tensor needs for a layout with fewer factors than it has; None if its own will do."""
    if amax is None or layout.factor == "matrix":
        return None
    used = np.unique(np.asarray(amax, np.float32))
    used = used[used != 0]  # any factor does for zeros
    if layout.factor == "none":
        largest = np.float32(fmt.tensor_constant(headroom))
        return largest if (used != largest).any() else None
    return used[-1] if used.size > 1 else None


def check_factor(amax: Any, fmt: Format, headroom: float, layout: Layout) -> None:
    """Raise if a layout has fewer factors than a tensor needs."""
    needed = needed_amax(amax, fmt, headroom, layout)
    if needed is None:
        return
    values = np.unique(np.asarray(amax, np.float32))
    again = (
        f"quantize with amax={needed:g}, or let it be quantized again: `ifjax export --common-amax`, "
        "plan_export(common_amax=True)"
    )
    if layout.factor == "stack":
        raise ValueError(
            f"{layout.name} has one factor for a stack, and this one has {values.size} different amax: {again}"
        )
    raise ValueError(
        f"{layout.name} has no factor for a tensor, and amax / K of this one is {values[-1] / needed:g}, not 1: {again}"
    )


def amax_of(
    blocks: Blocks, batch: tuple[int, ...], scales: Callable[[], np.ndarray], fmt: Format, headroom: float
) -> np.ndarray:
    """Return the amax of which `_factors` makes what is stored, or the nearest.

    Args:
        blocks: with the factor.
        batch: the stack's axes.
        scales: gives those of all matrices, which are looked at only beside a factor that is none.
        fmt, headroom: of what is read.

    Raises:
        ValueError: the factor is none of a matrix that has values.
    """
    largest = fmt.tensor_constant(headroom)
    given = {n: getattr(blocks, n) for n in ("amax", "multiplier", "divisor") if getattr(blocks, n) is not None}
    if not given:  # scales are absolute: amax = K is the factor 1
        return np.asarray(largest, np.float32)
    ((kind, stored),) = given.items()
    factor = np.asarray(stored)
    if factor.size not in (1, int(np.prod(batch))) or not jnp.issubdtype(factor.dtype, jnp.floating):
        raise ValueError(f"the factor must be one float for each matrix, got {factor.dtype} {factor.shape}")
    factor = factor.reshape(() if factor.size == 1 else batch)
    with np.errstate(over="ignore"):
        factor = factor.astype(np.float32)
    if kind == "amax":
        if not ((factor >= 0) & (factor < np.inf)).all():
            raise ValueError(f"amax must be finite and >= 0, got {factor}")
        return factor
    usable = (factor > 0) & (factor < np.inf)
    # Going back and forth once more changes nothing: of all amax with this factor, if there are any, this is one
    # (checked for each mantissa and the K of each named format).
    with np.errstate(all="ignore"):
        amax = (factor * largest if kind == "multiplier" else largest / factor).astype(np.float32)
    normal = usable & (amax >= TINY) & (amax < np.inf)
    if normal.all():
        return amax
    used = scales().reshape(*factor.shape, -1).any(-1)
    if (used & ~usable).any():
        raise ValueError(f"the factor must be finite and > 0, got {factor[used & ~usable].flat[0]}")
    if (wrong := used & ~normal).any():
        raise ValueError(
            f"the factor {factor[wrong].flat[0]} makes amax {amax[wrong].flat[0]}, which is no normal float32 number"
        )
    return np.where(normal, amax, np.float32(0)).astype(np.float32)


def input_factor(factor: InputFactor, amax: Any) -> np.ndarray:
    """Return the factor of a layer's inputs, which readers quantize to plain NVFP4, whatever the weights' format.

    Raises:
        ValueError: it is no normal float32 number > 0.
    """
    largest, amax = np.float32(6 * E4M3.values[-1]), np.float32(amax)
    with np.errstate(all="ignore"):
        value = np.float32(largest / amax if factor.reciprocal else amax / largest)
    if not TINY <= value < np.inf:
        raise ValueError(f"must be finite and > 0, got {amax}")
    return np.full(factor.shape, value, np.float32)
