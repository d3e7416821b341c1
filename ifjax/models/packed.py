"""Rearranging QTensors as a program rearranges the arrays that they stand for, without decoding them."""

from typing import Any

import jax.numpy as jnp

from ifjax.arrays import QTensor


def is_blocked(q: QTensor, axis: int) -> bool:
    """Whether blocks lie along an axis, counted from the front."""
    return axis - q.ndim in q.blocked_axes


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
