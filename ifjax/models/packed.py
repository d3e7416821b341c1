"""Rearranging QTensors as a program rearranges the arrays that they stand for, without decoding them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from ifjax.arrays import QTensor


def is_blocked(q: QTensor, axis: int) -> bool:
    """Whether blocks lie along an axis, counted from the front."""
    return axis - q.ndim in q.blocked_axes


def reshaped(q: QTensor, groups: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: Sequence[int]) -> Any:
    """q in another shape, of which `groups` tells where its axes go; None if blocks or amax values do not allow it."""
    at, amax = q.ndim + q.axis, q.amax
    place = next((after for before, after in groups if before == (at,)), ())
    if len(place) != 1 or q.block_2d:
        return None
    if amax is not None and amax.ndim:
        first = [(before, after) for before, after in groups if before and before[0] < amax.ndim]
        if any(axis >= amax.ndim for before, _ in first for axis in before):
            return None
        amax = jnp.broadcast_to(amax, q.shape[: amax.ndim])
        amax = amax.reshape([shape[axis] for _, after in first for axis in after])
        new = sum(not before for before, after in groups if after and after[0] < amax.ndim)
        if new:
            return None
    codes, scales = (
        a.reshape([a.shape[at] if axis == place[0] else n for axis, n in enumerate(shape)]) for a in (q.codes, q.scales)
    )
    return q.replaced(codes=codes, scales=scales, amax=amax, axis=place[0] - len(shape), names=None)


def sliced(q: QTensor, axis: int, start: Any, size: int) -> QTensor:
    """`size` entries along an unblocked axis from `start` on, which may be traced."""

    def cut(a):
        return lax.dynamic_slice_in_dim(a, start, size, axis)

    amax = q.amax
    if amax is not None and axis < amax.ndim and amax.shape[axis] > 1:
        amax = cut(amax)
    return q.replaced(codes=cut(q.codes), scales=cut(q.scales), amax=amax)


def layers(q: QTensor, axis: int) -> tuple[tuple[Any, Any, Any], Any, QTensor]:
    """q's arrays taken apart along an unblocked axis: stacked ones with it in front, the amax that all share, and q
    with `blocking` as a layer needs it. `layer` puts one together again.
    """
    codes, scales = (jnp.moveaxis(a, axis, 0) for a in (q.codes, q.scales))
    amax, shared = q.amax, None
    if amax is not None and axis < amax.ndim:
        own = amax.shape[axis] > 1 or q.shape[axis] == 1
        amax, shared = (jnp.moveaxis(amax, axis, 0), None) if own else (None, amax.squeeze(axis))
    else:
        amax, shared = None, amax
    return (codes, scales, amax), shared, q.remove_axis(axis, {})


def layer(q: QTensor, arrays: tuple[Any, Any, Any], shared: Any) -> QTensor:
    """One of the layers that `layers` made."""
    codes, scales, amax = arrays
    return q.replaced(codes=codes, scales=scales, amax=shared if amax is None else amax)


def looked_up(q: QTensor, indices: Any, axis: int, clip: bool) -> QTensor:
    """Entries along an unblocked axis, as by lax.gather: what is out of range is NaN, or the nearest entry."""
    size = q.shape[axis]
    indices = jnp.clip(indices, 0, size - 1) if clip else jnp.where(indices < 0, size, indices)
    return q.take(indices, axis)
