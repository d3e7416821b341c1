"""Where a parameter's values lie in a tensor of a checkpoint, which is turned, split and laid in another shape.

    stored -> turned: the last two axes exchanged -> split: some entries of an axis -> laid: axes divided

A `Window` goes the other way: from a part of the parameter to the least box of the stored tensor that has it. Codes and
scales of packed tensors go through the same window, in their own units along the blocked axis.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ifjax.arrays.shaping import reshape_groups

Index = tuple[slice, ...]


class Share(NamedTuple):
    """A path's share of a split axis.

    Attributes:
        axis: of the turned tensor, from the front.
        length: of that axis.
        groups: in how many runs it lies.
        start, stop: the share of each run.
    """

    axis: int
    length: int
    groups: int
    start: int
    stop: int


class Window(NamedTuple):
    """How a stored tensor becomes a parameter, or one tensor of a stack of them.

    Attributes:
        turned: whether the last two axes change places.
        share: what is taken of a split axis; None for all of the tensor.
        shape: of what is taken.
        laid: the shape that it is laid in.
    """

    turned: bool
    share: Share | None
    shape: tuple[int, ...]
    laid: tuple[int, ...]

    @classmethod
    def of(cls, stored: Sequence[int], turned: bool, share: Share | None, laid: Sequence[int] | None) -> "Window":
        """Return the window of a tensor of this shape; `laid` None is the shape it has."""
        shape = list(turned_shape(stored, turned))
        if share is not None:
            shape[share.axis] = share.groups * (share.stop - share.start)
        return cls(turned, share, tuple(shape), tuple(shape if laid is None else laid))

    @property
    def divides(self) -> bool:
        """Whether axes are only divided, so that a part of the parameter is a box of what is taken."""
        groups = reshape_groups(self.shape, self.laid)
        return self.shape == self.laid or (groups is not None and all(len(before) < 2 for before, _ in groups))

    def axis_of(self, axis: int) -> tuple[int, ...]:
        """The axes of the parameter that an axis of what is taken is divided into, both from the front."""
        if self.shape == self.laid:
            return (axis,)
        groups = reshape_groups(self.shape, self.laid)
        assert groups is not None
        found = [after for before, after in groups if before == (axis,)]
        return found[0] if found else ()

    def read(self, stored: Any, index: Index, laid: Sequence[int]) -> np.ndarray:
        """Return a part of the parameter in memory of its own.

        Args:
            stored: one of the tensor's arrays, or what gives the box of it that slices name.
            index: slices of the parameter's array.
            laid: the shape of that.
        """
        if not self.divides:
            stored = stored if isinstance(stored, np.ndarray) else stored[tuple(slice(0, n) for n in stored.shape)]
            return np.array(stored.reshape(laid)[index])
        box, shape, rest = self._undivided(index, laid)
        x = self._share_of(stored, box)
        return np.array(x.reshape(shape)[rest])

    def _undivided(self, index: Index, laid: Sequence[int]) -> tuple[list[slice], list[int], Index]:
        """The box of what is taken, the shape to lay it in, and the part of that which is wanted."""
        if self.shape == self.laid:
            return list(index), [i.stop - i.start for i in index], (...,)  # pyright: ignore[reportReturnType]
        groups = reshape_groups(self.shape, self.laid)
        assert groups is not None
        box, shape, rest = [slice(0, 1)] * len(self.shape), [], []
        for before, after in groups:
            first, *others = after or (None,)
            if first is None:
                continue
            inner = math.prod(laid[j] for j in others)
            if before:
                box[before[0]] = slice(index[first].start * inner, index[first].stop * inner)
            shape += [index[first].stop - index[first].start, *(laid[j] for j in others)]
            rest += [slice(None), *(index[j] for j in others)]
        return box, shape, tuple(rest)

    def _share_of(self, stored: Any, box: list[slice]) -> np.ndarray:
        share, shape = self.share, turned_shape(stored.shape, self.turned)
        if share is None:
            return _box(stored, box, self.turned)
        run, start, stop = (n * shape[share.axis] // share.length // d for n, d in
                            ((share.length, share.groups), (share.start, 1), (share.stop, 1)))  # fmt: skip
        wanted, width = box[share.axis], stop - start
        if share.groups == 1:
            box[share.axis] = slice(start + wanted.start, start + wanted.stop)
            return _box(stored, box, self.turned)
        first, last = wanted.start // width, -(-wanted.stop // width)
        box[share.axis] = slice(first * run, last * run)
        x = _box(stored, box, self.turned)
        lead, tail = x.shape[: share.axis], x.shape[share.axis + 1 :]
        x = x.reshape(*lead, last - first, run, *tail)[(*[slice(None)] * (share.axis + 1), slice(start, stop))]
        x = x.reshape(*lead, (last - first) * width, *tail)
        return x[(*[slice(None)] * share.axis, slice(wanted.start - first * width, wanted.stop - first * width))]


def turned_shape(shape: Sequence[int], turned: bool) -> tuple[int, ...]:
    """Return a shape with its last two axes exchanged, if they are to be."""
    return (*shape[:-2], shape[-1], shape[-2]) if turned and len(shape) > 1 else tuple(shape)


def _box(stored: Any, box: Sequence[slice], turned: bool) -> np.ndarray:
    if not turned:
        return stored[tuple(box)]
    return stored[(*box[:-2], box[-1], box[-2])].swapaxes(-1, -2)
