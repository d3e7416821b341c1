"""Slicing and stacking of QTensors for the rewriting of programs, without decoding them."""

from typing import Any

import jax.numpy as jnp

from ifjax.arrays import QTensor
from ifjax.arrays.shaping import has_own_amax


def is_blocked(q: QTensor, axis: int) -> bool:
    """Return whether blocks lie along an axis, counted from the front."""
    return axis - q.ndim in q.blocked_axes


def layers(q: QTensor, axis: int) -> tuple[tuple[Any, Any, Any], Any, QTensor]:
    """Split q's arrays along an unblocked axis, for a scan over it; `layer` makes a QTensor of one slice.

    Returns (codes, scales, amax) with the axis in front, the amax that all layers share, and q with its blocked axis
    adjusted to the layers' rank. One of the two amaxes is None, or both if q has none.
    """
    codes, scales = (jnp.moveaxis(a, axis, 0) for a in (q.codes, q.scales))
    amax, shared = None, q.amax
    if shared is not None and has_own_amax(q, axis):
        amax, shared = jnp.moveaxis(shared, axis, 0), None
    elif shared is not None and axis < shared.ndim:
        shared = shared.squeeze(axis)
    return (codes, scales, amax), shared, q.remove_axis(axis, {})


def layer(q: QTensor, arrays: tuple[Any, Any, Any], shared: Any) -> QTensor:
    """Return the QTensor of one slice of the arrays from `layers`; q is the third result of `layers`."""
    codes, scales, amax = arrays
    return q.replaced(codes=codes, scales=scales, amax=shared if amax is None else amax)


def looked_up(q: QTensor, indices: Any, axis: int, clip: bool) -> QTensor:
    """Return entries along an unblocked axis, as lax.gather does: out of range, NaN or the nearest entry if `clip`."""
    size = q.shape[axis]
    indices = jnp.clip(indices, 0, size - 1) if clip else jnp.where(indices < 0, size, indices)
    return q.take(indices, axis)
