"""Indexing of quantized arrays along unblocked axes."""

import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from ifjax.arrays.shaping import has_own_amax
from ifjax.numerics.byte_order import as_array


def take(q: Any, indices: ArrayLike, axis: int) -> Any:
    """Return entries of a QTensor along an unblocked axis; see `QTensor.take`."""
    axis, indices = unblocked(q, axis), as_array(indices)
    nan = np.frombuffer(int(q.fmt.scale.nan).to_bytes(q.fmt.scale.nbytes, "little"), np.uint8)

    def pick(a, fill):
        return jnp.take(a, indices, axis=axis, mode="fill", fill_value=fill)

    amax = q.amax
    if amax is not None and axis < amax.ndim:
        shared = (*amax.shape[:axis], *[1] * jnp.ndim(indices), *amax.shape[axis + 1 :])
        amax = pick(amax, 0) if has_own_amax(q, axis) else amax.reshape(shared)
    scales = pick(q.scales, int(nan[0]))
    if len(nan) > 1:  # the bytes of a NaN header differ, so one fill value is not enough
        missing = (indices < -q.shape[axis]) | (indices >= q.shape[axis])
        missing = missing.reshape((1,) * axis + missing.shape + (1,) * (scales.ndim - axis - missing.ndim))
        place = jnp.arange(scales.shape[q.axis]) % len(nan)
        place = place.reshape((-1,) + (1,) * (-q.axis - 1))
        scales = jnp.where(missing, jnp.asarray(nan)[place], scales)
    return _picked(q, axis, pick(q.codes, 0), scales, amax)


def index(q: Any, entries: Any) -> Any:
    """Return q[entries]: integers, slices and at most one integer array or traced integer, along unblocked axes."""
    entries = without_ellipsis(q, entries)
    if sum(_is_index_array(entry) for entry in entries) > 1:
        raise IndexError("at most one index array: take one axis after the other")
    for axis, entry in reversed(list(enumerate(entries))):
        q = _index(q, axis, entry)
    return q


def without_ellipsis(q: Any, entries: Any) -> tuple[Any, ...]:
    """Return the entries of an index with an ellipsis expanded to slices. There may be fewer entries than axes.

    Raises:
        IndexError: the index has several ellipses, or more entries than q has axes.
    """
    entries = entries if isinstance(entries, tuple) else (entries,)
    dots = [i for i, entry in enumerate(entries) if entry is Ellipsis]
    if len(dots) > 1:
        raise IndexError("an index can have one ellipsis at most")
    for at in dots:
        entries = (*entries[:at], *[slice(None)] * (q.ndim - len(entries) + 1), *entries[at + 1 :])
    if len(entries) > q.ndim:
        raise IndexError(f"{len(entries)} indices for a QTensor of {q.ndim} axes")
    return entries


def unblocked(q: Any, axis: int) -> int:
    """Return the axis as a nonnegative number.

    Raises:
        ValueError: the axis is out of range, or is blocked.
    """
    if not -q.ndim <= axis < q.ndim:
        raise ValueError(f"axis {axis} is out of range for shape {q.shape}")
    axis %= q.ndim
    if axis - q.ndim in q.blocked_axes:
        raise ValueError(
            f"axis {axis} of shape {q.shape} is blocked ({q.fmt.name}, axis={q.axis}"
            f"{', 2-D' if q.block_2d else ''}): only other axes can be indexed; dequantize first"
        )
    return axis


def _index(q, axis, entry):
    if isinstance(entry, slice):
        if entry == slice(None):
            return q
        axis = unblocked(q, axis)
    elif _is_integer(entry):
        axis = unblocked(q, axis)
        if not -q.shape[axis] <= operator.index(entry) < q.shape[axis]:
            raise IndexError(f"index {entry} is out of range for axis {axis} of shape {q.shape}")
    elif _is_index_array(entry):
        return take(q, entry, axis)
    else:
        raise TypeError(f"QTensor indices are integers, slices and integer arrays, got {entry!r}")
    at = (slice(None),) * axis + (entry,)
    amax = q.amax
    if amax is not None and axis < amax.ndim:
        if has_own_amax(q, axis):
            amax = amax[at]
        elif not isinstance(entry, slice):
            amax = amax.squeeze(axis)
    return _picked(q, axis, q.codes[at], q.scales[at], amax)


def _picked(q, axis, codes, scales, amax):
    """Return q with the arrays that indexing `axis` gave. `axis` may have become any number of axes."""
    moved = q.ndim - codes.ndim if axis > q.ndim + q.axis else 0
    names, new = q.names, codes.ndim - q.ndim + 1
    if names is not None and new != 1:
        names = (*names[:axis], *[None] * new, *names[axis + 1 :])
    return q.replaced(codes=codes, scales=scales, amax=amax, axis=q.axis + moved, names=names)


def _is_integer(entry):
    return hasattr(entry, "__index__") and not isinstance(entry, bool | Tracer) and np.ndim(entry) == 0


def _is_index_array(entry):
    return hasattr(entry, "dtype") and jnp.issubdtype(entry.dtype, jnp.integer) and not _is_integer(entry)
