"""Slicing, updating and joining of quantized arrays, for example for a key-value cache.

A written value is encoded with the array's own settings. Entries that each have their own amax (`amax_axes`) get a new
one. An amax that is shared with entries that are not overwritten cannot change; the caller must then pass
`keep_amax=True`.
"""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from ifjax.arrays.indexing import unblocked, without_ellipsis
from ifjax.arrays.qtensor import QTensor
from ifjax.arrays.quantize import quantize
from ifjax.arrays.shaping import expanded, has_own_amax, spread_amax
from ifjax.codec import Encoding, Loss, Rounding, Search
from ifjax.numerics.packing import group_of, packed_length


def dynamic_slice(q: QTensor, start: Sequence[Any], sizes: Sequence[int]) -> QTensor:
    """Return a slice of a QTensor as a QTensor, like `jax.lax.dynamic_slice`.

    Args:
        q: a QTensor of any rank.
        start: a start index for each axis. It may be traced, except for a partial slice of a blocked axis. It is
            clamped, as by `jax.lax`, so that the slice lies inside q.
        sizes: length of the slice along each axis. Along a blocked axis the slice is the whole axis, or whole blocks.

    Raises:
        ValueError: the slice begins or ends inside a block, is too long, or has another rank than q.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> q = ifjax.quantize(jnp.ones((8, 64)), "if4")
        >>> ifjax.dynamic_slice(q, (jnp.int32(2), 0), (3, 64)).shape
        (3, 64)
    """
    sizes = tuple(operator.index(n) for n in sizes)
    place = _Place.of(q, start, sizes)
    amax = q.amax
    if amax is not None and amax.ndim:
        amax = lax.dynamic_slice(amax, *place.of_amax(q, sizes))
    codes = lax.dynamic_slice(q.codes, place.codes, place.code_sizes)
    scales = lax.dynamic_slice(q.scales, place.scales, place.scale_sizes)
    return q.replaced(codes=codes, scales=scales, amax=amax, length=sizes[q.axis])


def dynamic_update_slice(
    q: QTensor,
    x: ArrayLike | QTensor,
    start: Sequence[Any],
    *,
    keep_amax: bool = False,
    loss: Loss | None = None,
    search: str | Search | None = None,
    rounding: str | Rounding = "nearest",
    key: jax.Array | None = None,
) -> QTensor:
    """Return q with x, quantized with q's settings, written at `start`, like `jax.lax.dynamic_update_slice`.

    If q has an amax for each entry (`amax_axes`, for example one for each token and head of a cache), the written
    entries get their own. The result then equals, byte for byte, the quantized updated array.

    Args:
        q: a QTensor of any rank.
        x: a float array of q's rank, or a QTensor with q's format, axis and amax axes.
        start: a start index for each axis. It may be traced, except for a partial update of a blocked axis. It is
            clamped, as by `jax.lax`, so that x lies inside q. Along a blocked axis x covers the whole axis, or whole
            blocks.
        keep_amax: encode x with q's amax, for example that of a calibrated cache; larger values saturate.
        loss, search, rounding, key: as for `ifjax.quantize`.

    Raises:
        TypeError: x is not a float array or a QTensor.
        ValueError: x does not fit, begins or ends inside a block, or is packed differently; or q's amax is shared with
            values that are not overwritten, and `keep_amax` is False.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> cache = ifjax.quantize(jnp.zeros((2, 8, 64)), "if4", amax_axes=(0, 1))
        >>> cache = ifjax.dynamic_update_slice(cache, jnp.full((2, 1, 64), 3.0), (0, 5, 0))
        >>> cache[:, 4:7].dequantize()[0, :, 0]
        Array([0., 3., 0.], dtype=float32)
    """
    x = x if isinstance(x, QTensor) else jnp.asarray(x)
    if x.ndim != q.ndim or any(n > m for n, m in zip(x.shape, q.shape, strict=True)):
        raise ValueError(f"an update of shape {x.shape} does not fit into {q.shape}: it needs as many axes, no longer")
    place = _Place.of(q, start, x.shape)
    partial = [axis for axis, (n, m) in enumerate(zip(x.shape, q.shape, strict=True)) if n < m]
    own = tuple(axis for axis in range(q.ndim) if has_own_amax(q, axis))
    amax = q.amax
    cut = place.of_amax(q, x.shape) if amax is not None and amax.ndim else ((), ())
    kept = None if amax is None or not amax.ndim else lax.dynamic_slice(amax, *cut)
    how = Encoding.of(q.fmt, loss=loss, search=search, rounding=rounding, block_2d=q.block_2d)
    new = _encoded(q, x, how, q.axis, own, amax if kept is None else kept, partial, keep_amax, key)
    if amax is not None and not keep_amax:
        values = _with_ndim(new.amax, amax.ndim)
        amax = lax.dynamic_update_slice(amax, jnp.broadcast_to(values, cut[1]), cut[0]) if amax.ndim else values
    codes = lax.dynamic_update_slice(q.codes, new.codes, place.codes)
    scales = lax.dynamic_update_slice(q.scales, new.scales, place.scales)
    return q.replaced(codes=codes, scales=scales, amax=amax)


def concatenate(tensors: Sequence[QTensor], axis: int = 0) -> QTensor:
    """Join QTensors of one format along an unblocked axis, like `jax.numpy.concatenate`.

    An amax that all entries along `axis` shared is repeated for each entry.

    Raises:
        TypeError: an element is not a QTensor.
        ValueError: the sequence is empty, `axis` is blocked, or the tensors differ in format, blocks or shape.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> q = ifjax.quantize(jnp.ones((2, 32)), "if4")
        >>> ifjax.concatenate([q, q]).shape
        (4, 32)
    """
    tensors = _alike(tensors, "concatenate")
    first = tensors[0]
    at = unblocked(first, axis)
    for q in tensors:
        if q.shape[:at] + q.shape[at + 1 :] != first.shape[:at] + first.shape[at + 1 :]:
            raise ValueError(f"shapes {first.shape} and {q.shape} differ along other axes than {axis}")
    amax = None
    if first.amax is not None:
        ndim = max(at + 1, *(q.amax.ndim for q in tensors if q.amax is not None))
        amax = jnp.concatenate([spread_amax(q, ndim) for q in tensors], at)
    codes, scales = (jnp.concatenate([getattr(q, name) for q in tensors], at) for name in ("codes", "scales"))
    return first.replaced(codes=codes, scales=scales, amax=amax)


def stack(tensors: Sequence[QTensor], axis: int = 0) -> QTensor:
    """Stack QTensors of one format and shape along a new axis, like `jax.numpy.stack`. Each keeps its own amax.

    Useful for layers or experts.

    Raises:
        TypeError, ValueError: as for `ifjax.concatenate`, or `axis` is out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> q = ifjax.quantize(jnp.ones((2, 32)), "if4")
        >>> ifjax.stack([q, q, q]).shape
        (3, 2, 32)
    """
    tensors = _alike(tensors, "stack")
    ndim = tensors[0].ndim + 1
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis {axis} is out of range for tensors of {ndim - 1} axes")
    return concatenate([expanded(q, axis % ndim) for q in tensors], axis % ndim)


class At:
    """Helper that `QTensor.at` returns, for indexed updates `q.at[index].set(x)`."""

    def __init__(self, q: QTensor, index: Any = ()):
        self.q, self.index = q, index

    def __getitem__(self, index: Any) -> "At":
        return At(self.q, index)

    def set(
        self,
        x: ArrayLike,
        *,
        keep_amax: bool = False,
        loss: Loss | None = None,
        search: str | Search | None = None,
        rounding: str | Rounding = "nearest",
        key: jax.Array | None = None,
    ) -> QTensor:
        """Return q with x, quantized with q's settings, at the index. x broadcasts to the shape of q[index].

        Along unblocked axes, the index has integers, which may be traced, slices, and adjacent integer arrays:
        q.at[:, position], q.at[rows, positions]. Out-of-range updates are dropped, as by `jax.Array.at`, but a Python
        integer out of range raises IndexError. Arguments and errors are those of `ifjax.dynamic_update_slice`.
        """
        q, index = self.q, _full_index(self.q, self.index)
        arrays = [axis for axis, entry in enumerate(index) if not isinstance(entry, slice)]
        lead = np.broadcast_shapes(*(jnp.shape(index[axis]) for axis in arrays))
        # Find the position of each axis of q in q[index]. The axes of index arrays replace the first indexed axis.
        places, made = {}, []
        for axis, entry in enumerate(index):
            if axis in arrays:
                if axis == arrays[0]:
                    made += lead
                continue
            places[axis] = len(made)
            made.append(len(range(*entry.indices(q.shape[axis]))))
        partial = [axis for axis in range(q.ndim) if axis in arrays or made[places[axis]] < q.shape[axis]]
        partial = [axis for axis in partial if q.shape[axis] > 1 or axis not in arrays]
        x = jnp.broadcast_to(jnp.asarray(x), made)
        amax, own = q.amax, [axis for axis in range(q.ndim) if has_own_amax(q, axis)]
        own_places = {places[axis] for axis in own if axis in places}
        if any(axis in own for axis in arrays):
            own_places |= set(range(arrays[0], arrays[0] + len(lead)))
        axis = places[q.ndim + q.axis] - len(made)
        kept = amax
        if amax is not None and amax.ndim and keep_amax:
            kept = spread_amax(q, max(amax.ndim, 1 + max(arrays, default=0)))
            kept = kept[tuple(slice(None) if a - q.ndim in q.blocked_axes else index[a] for a in range(kept.ndim))]
            own_places = {i for i, n in enumerate(kept.shape) if i != axis + len(made)}
        how = Encoding.of(q.fmt, loss=loss, search=search, rounding=rounding, block_2d=q.block_2d)
        new = _encoded(q, x, how, axis, sorted(own_places), kept, partial, keep_amax, key)
        if amax is not None and not keep_amax:
            entries = tuple(index[a] if a in own else slice(None) for a in range(amax.ndim))
            shape = jax.eval_shape(lambda a: a[entries], amax).shape
            values = _with_ndim(new.amax, len(shape))
            amax = amax.at[entries].set(values) if amax.ndim else values
        codes, scales = q.codes.at[index].set(new.codes), q.scales.at[index].set(new.scales)
        return q.replaced(codes=codes, scales=scales, amax=amax)


# --- below the surface -----------------------------------------------------------------------------------------------


class _Place:
    """Position of a slice of q in q's arrays.

    Attributes:
        start: clamped start index for each axis of q.
        codes, scales: start indices in q.codes and q.scales.
        code_sizes, scale_sizes: sizes of the slice in q.codes and q.scales.
    """

    def __init__(self, q: QTensor, start: list[Any], sizes: Sequence[int]):
        at, fmt = q.ndim + q.axis, q.fmt
        self.start = start
        first, length = start[at], sizes[at]
        blocks = -(-length // fmt.block)
        self.codes, self.scales = list(start), list(start)
        self.code_sizes, self.scale_sizes = list(sizes), list(sizes)
        whole = length == q.shape[at]
        self.codes[at] = np.int32(0 if whole else packed_length(first, fmt.bits))
        self.scales[at] = np.int32(0 if whole else first // fmt.block * fmt.scale.nbytes)
        self.code_sizes[at] = q.codes.shape[at] if whole else packed_length(blocks * fmt.block, fmt.bits)
        self.scale_sizes[at] = q.scales.shape[at] if whole else blocks * fmt.scale.nbytes

    @classmethod
    def of(cls, q: QTensor, start: Sequence[Any], sizes: Sequence[int]) -> "_Place":
        start = list(start)
        if len(start) != q.ndim or len(sizes) != q.ndim:
            raise ValueError(f"a slice of shape {q.shape} needs {q.ndim} indices and sizes, got {len(start)} indices "
                             f"and {len(sizes)} sizes")
        for axis, (n, m) in enumerate(zip(sizes, q.shape, strict=True)):
            if not 0 <= n <= m:
                raise ValueError(f"a slice of {n} entries along axis {axis} of shape {q.shape} is too long")
            blocked = axis - q.ndim in q.blocked_axes
            if n == m:
                start[axis] = np.int32(0)
            elif isinstance(start[axis], Tracer):
                if blocked:
                    raise ValueError(f"axis {axis} of shape {q.shape} is blocked: a slice of it begins at a number "
                                     "that is known while tracing, a multiple of the block")
                start[axis] = jnp.asarray(start[axis], jnp.int32)
            else:
                first = operator.index(start[axis])
                first = min(max(first + m if first < 0 else first, 0), m - n)
                start[axis] = np.int32(first)
                unit = np.lcm(q.fmt.block, group_of(q.fmt.bits)[0])
                if blocked and (first % unit or (n % unit and first + n != m)):
                    raise ValueError(
                        f"entries {first} to {first + n} of axis {axis} of shape {q.shape} begin or end inside a block "
                        f"of {q.fmt.name}: they need multiples of {unit}; dequantize for others"
                    )
        return cls(q, start, sizes)

    def of_amax(self, q: QTensor, sizes: Sequence[int]) -> tuple[list[Any], list[int]]:
        """Return start and sizes of the slice in q.amax, whose length is 1 where entries share an amax."""
        own = [has_own_amax(q, axis) for axis in range(q.amax.ndim)]  # pyright: ignore[reportOptionalMemberAccess]
        return (
            [start if is_own else np.int32(0) for start, is_own in zip(self.start, own, strict=False)],
            [n if is_own else 1 for n, is_own in zip(sizes, own, strict=False)],
        )


def _encoded(q, x, how, axis, own, amax, partial, keep_amax, key) -> QTensor:
    """Quantize x with q's settings: blocks along `axis`, an amax for each entry of the axes `own` of x.

    With `keep_amax`, `amax` is used instead. Axes of q in `partial` have entries that are not overwritten.
    """
    if keep_amax and q.amax is None:
        raise ValueError(f"{q.fmt.name} has no tensor scale, so keep_amax does not apply: leave it out")
    if q.amax is not None and not keep_amax:
        shared = [a for a in partial if not has_own_amax(q, a)]
        if shared:
            raise ValueError(
                f"the amax of this QTensor {q.shape} is also that of entries along axis {shared[0]} that stay, so it "
                "cannot become that of the new ones: quantize the tensor with an amax for each entry, "
                f"amax_axes={tuple(a for a in range(q.ndim) if a - q.ndim not in q.blocked_axes)}, or keep one that "
                "was fixed for all, keep_amax=True, at which larger values saturate"
            )
    if isinstance(x, QTensor):
        layout = ("fmt", "headroom", "block_2d")
        same_amax = x.amax is None or all(has_own_amax(x, a) for a in own)
        if any(getattr(x, f) != getattr(q, f) for f in layout) or x.axis != axis or not same_amax or keep_amax:
            raise ValueError(f"{x!r} is packed otherwise than {q!r}: pass the array, or quantize it with the same "
                             "format, axis and amax_axes")
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"values to be quantized are floats, got {x.dtype}")
    if how.headroom != q.headroom:
        raise ValueError(f"this QTensor leaves headroom {q.headroom} and rounding={how.rounding.name!r} "
                         f"{how.headroom}: pass the rounding= that it was made with")
    if keep_amax and not isinstance(amax, Tracer) and bool(jnp.any(amax == 0)) and bool(jnp.any(x != 0)):
        raise ValueError("keep_amax=True with an amax of 0, at which every value is 0: quantize the tensor with the "
                         "amax= that its values will have")
    if not q.fmt.has_tensor_scale:
        return quantize(x, how, axis=axis, key=key)
    if not keep_amax:
        return quantize(x, how, axis=axis, key=key, amax_axes=own)
    amax = amax.reshape(amax.shape[: max(own, default=-1) + 1])
    return quantize(x, how, axis=axis, key=key, amax_axes=own, amax=amax)


def _with_ndim(amax: Any, ndim: int) -> jax.Array:
    return amax.reshape(amax.shape + (1,) * (ndim - amax.ndim))


def _full_index(q: QTensor, entries: Any) -> tuple[Any, ...]:
    """Return the index as one entry per axis of q: a slice, an integer or an integer array."""
    entries = list(without_ellipsis(q, entries))
    entries += [slice(None)] * (q.ndim - len(entries))
    for axis, entry in enumerate(entries):
        if isinstance(entry, slice):
            if len(range(*entry.indices(q.shape[axis]))) == q.shape[axis] and entry.step in (None, 1):
                entries[axis] = slice(None)
            else:
                unblocked(q, axis)
            continue
        unblocked(q, axis)
        if isinstance(entry, bool) or not (
            hasattr(entry, "__index__") or jnp.issubdtype(getattr(entry, "dtype", np.bool_), jnp.integer)
        ):
            raise TypeError(f"indices of q.at are integers, slices and integer arrays, got {entry!r}")
        if isinstance(entry, int) and not -q.shape[axis] <= entry < q.shape[axis]:
            raise IndexError(f"index {entry} is out of range for axis {axis} of shape {q.shape}")
    arrays = [axis for axis, entry in enumerate(entries) if not isinstance(entry, slice)]
    apart = bool(arrays) and arrays[-1] - arrays[0] >= len(arrays)
    if apart and any(jnp.ndim(entries[axis]) for axis in arrays):
        raise IndexError("integers and index arrays of q.at must be next to each other: move the axis with q.moveaxis")
    return tuple(entries)


def _alike(tensors: Sequence[QTensor], name: str) -> list[QTensor]:
    tensors = list(tensors)
    if not tensors:
        raise ValueError(f"{name} needs one QTensor at least")
    for q in tensors:
        if not isinstance(q, QTensor):
            raise TypeError(f"ifjax.{name} joins QTensors, got {type(q).__name__}: quantize it with the same format")
        if q.replaced(names=None).blocking != tensors[0].replaced(names=None).blocking or q.ndim != tensors[0].ndim:
            raise ValueError(f"{q!r} and {tensors[0]!r} differ in format, blocks or dtype: {name} joins what is alike")
    return tensors
