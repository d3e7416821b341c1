"""Transposition, reshaping and expansion of quantized arrays without decoding.

Codes and scales move as bytes. Each amax stays with its entries: an axis along which entries had their own amax keeps
it.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp


def has_own_amax(q: Any, axis: int) -> bool:
    """Return whether entries along a nonnegative axis each have their own amax."""
    return q.amax is not None and axis < q.amax.ndim and q.amax.shape[axis] == q.shape[axis]


def spread_amax(q: Any, ndim: int) -> Any:
    """Return q's amax broadcast to `ndim` leading axes, with a value for each entry except along blocked axes."""
    amax = q.amax.reshape(q.amax.shape + (1,) * (ndim - q.amax.ndim))
    shape = [1 if axis - q.ndim in q.blocked_axes else n for axis, n in enumerate(q.shape[: amax.ndim])]
    return jnp.broadcast_to(amax, shape)


def transposed(q: Any, axes: Sequence[int] | None = None) -> Any:
    """Return q with its axes permuted; see `QTensor.transpose`."""
    axes = tuple(reversed(range(q.ndim))) if axes is None else tuple(operator.index(a) for a in axes)
    if sorted(a % q.ndim if -q.ndim <= a < q.ndim else -1 for a in axes) != list(range(q.ndim)):
        raise ValueError(f"axes must name each of the {q.ndim} axes of shape {q.shape} once, got {axes}")
    axes = tuple(a % q.ndim for a in axes)
    if axes == tuple(range(q.ndim)):
        return q
    if q.block_2d and axes[-2:] != (q.ndim - 2, q.ndim - 1):
        raise ValueError("blocks are squares of the last two axes, which stay where they are: q.mT swaps them")
    amax = q.amax
    if amax is not None and amax.ndim:
        amax = amax.reshape(amax.shape + (1,) * (q.ndim - amax.ndim)).transpose(axes)
        amax = amax.reshape(amax.shape[: max((i + 1 for i, a in enumerate(axes) if has_own_amax(q, a)), default=0)])
    at = axes.index(q.ndim + q.axis)
    names = q.names and tuple((*q.names, *[None] * (q.ndim - len(q.names)))[a] for a in axes)
    return q.replaced(
        codes=q.codes.transpose(axes), scales=q.scales.transpose(axes), amax=amax, axis=at - q.ndim, names=names
    )


def moved_axis(q: Any, source: int, destination: int) -> Any:
    """Return q with one axis moved to another position; see `QTensor.moveaxis`."""
    for axis in (source, destination):
        if not -q.ndim <= axis < q.ndim:
            raise ValueError(f"axis {axis} is out of range for shape {q.shape}")
    axes = [a for a in range(q.ndim) if a != source % q.ndim]
    axes.insert(destination % q.ndim, source % q.ndim)
    return transposed(q, axes)


def reshape_groups(
    old: Sequence[int], new: Sequence[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Return the smallest groups (old axes, new axes) of adjacent axes that a reshape maps to each other.

    Returns None for empty arrays.
    """
    if 0 in (*old, *new):
        return None
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1 and (j == len(new) or new[j] != 1):
            groups.append(((i,), ()))
            i += 1
        elif j < len(new) and new[j] == 1 and (i == len(old) or old[i] != 1):
            groups.append(((), (j,)))
            j += 1
        else:
            first, second, before, after = i, j, old[i], new[j]
            i, j = i + 1, j + 1
            while before != after:
                if before < after:
                    before, i = before * old[i], i + 1
                else:
                    after, j = after * new[j], j + 1
            groups.append((tuple(range(first, i)), tuple(range(second, j))))
    return groups


def reshaped(q: Any, shape: Sequence[int]) -> Any:
    """Return q in another shape, or None if that would split or merge the blocked axis."""
    groups = reshape_groups(q.shape, shape)
    if groups is None:
        return None
    at, amax = q.ndim + q.axis, q.amax
    place = next((after for before, after in groups if before == (at,)), ())
    if len(place) != 1 or (q.block_2d and tuple(shape[-2:]) != q.shape[-2:]):
        return None
    if amax is not None and amax.ndim:
        # Broadcast amax over whole groups of axes, so that every entry in a group has a value.
        lead = max(before[-1] + 1 for before, _ in groups if before and before[0] < amax.ndim)
        amax = spread_amax(q, lead)
        end = max((after[-1] + 1 for before, after in groups if after and before and before[0] < lead), default=0)
        amax = amax.reshape([1 if j == place[0] else shape[j] for j in range(end)])
    codes, scales = (
        a.reshape([a.shape[at] if j == place[0] else n for j, n in enumerate(shape)]) for a in (q.codes, q.scales)
    )
    return q.replaced(codes=codes, scales=scales, amax=amax, axis=place[0] - len(shape), names=None)


def reshape(q: Any, shape: Sequence[int]) -> Any:
    """Return q in another shape; see `QTensor.reshape`."""
    shape = [operator.index(n) for n in shape]
    if shape.count(-1) == 1:
        known = math.prod(n for n in shape if n != -1)
        shape = [q.size // known if n == -1 and known else n for n in shape]
    if any(n < 0 for n in shape) or math.prod(shape) != q.size:
        raise ValueError(f"shape {tuple(shape)} does not have the {q.size} values of shape {q.shape}")
    if tuple(shape) == q.shape:
        return q
    made = reshaped(q, shape)
    if made is None:
        raise ValueError(
            f"shape {tuple(shape)} tears or joins the axis {q.axis} of {q.shape}, along which blocks lie: reshape the "
            "other axes, or dequantize first"
        )
    return made


def expanded(q: Any, axis: int) -> Any:
    """Return q with a new axis of length 1 at the nonnegative `axis`."""
    behind = axis > q.ndim + q.axis
    if q.block_2d and axis > q.ndim - 2:
        raise ValueError("blocks are squares of the last two axes: an axis can be added in front of them only")
    amax = q.amax
    if amax is not None and axis < amax.ndim:
        amax = jnp.expand_dims(amax, axis)
    names = q.names and (*q.names[:axis], None, *q.names[axis:])
    codes, scales = (jnp.expand_dims(a, axis) for a in (q.codes, q.scales))
    return q.replaced(codes=codes, scales=scales, amax=amax, axis=q.axis - behind, names=names)
