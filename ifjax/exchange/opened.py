"""Another tool's checkpoint, seen as one of ours: any part of codes, scales and values, read where it is looked at."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ifjax.arrays import Blocking, packed_shapes
from ifjax.exchange import read
from ifjax.exchange.blocks import amax_of, check_stored, checked_scales
from ifjax.exchange.containers import Source
from ifjax.exchange.layouts import Blocks, Floats, Part, Size, Spec
from ifjax.exchange.recognize import Found
from ifjax.files.checkpoint import Packed
from ifjax.files.safetensors import CODES
from ifjax.formats import Format

Box = tuple[slice, ...]


class Opened:
    """A checkpoint in another tool's layout, as `ifjax.files` places parameters from: tensors are [.., out, in].

    Args:
        source: the open files.
        tool: as for `ifjax.exchange.import_tensors`; what the files declare unless given.
        **settings: of `import_tensors`.

    Attributes:
        path: of the file or the index.
        packed: of each packed tensor, by its own name.
        entries: types and shapes of what is not packed; what is decoded has the type that was asked for.
        says_dtype: False: no layout tells what dtype a weight was.

    Raises:
        ValueError: as `import_tensors`.
    """

    says_dtype = False

    def __init__(self, source: Source, tool: str | Mapping[str, Any] | None = None, **settings: Any):
        layouts, how = read.choose(source.specs, source.declared if tool is None else tool, **settings)
        tensors = read.survey(source.specs, layouts)
        self.path, self._source = source.path, source
        self.packed: dict[str, Packed] = {}
        self.entries: dict[str, Spec] = {name: source.specs[name] for name in tensors.rest}
        self._tensors: dict[str, _Tensor | _Decoded] = {}
        for found in tensors.found:
            batch = batch_of(source, found)
            if not found.layout.floats:
                self._tensors[found.name] = tensor = _Tensor.of(source, found, how, batch)
                self.packed[found.name] = tensor.packed
            elif how.decode:
                with read.named(found):
                    floats, _ = read.as_stored(found, source.mapped, how)
                assert isinstance(floats, Floats)
                self._tensors[found.name] = _Decoded(floats, how.dtype)
                self.entries[found.name] = Spec(CODES[how.dtype.name], floats.shape)
            else:
                read.check_kept(found)
                self.entries |= {name: source.specs[name] for name in found.arrays if name is not None}

    def __iter__(self) -> Iterator[str]:
        return iter([*self.packed, *self.entries])

    def part(self, name: str, part: str) -> Any:
        """A packed tensor's "codes", "scales" or "amax", or "" of another: what gives the box that slices name."""
        tensor = self._tensors.get(name)
        if tensor is None:
            return self._source.mapped(name)
        return tensor if isinstance(tensor, _Decoded) else tensor.amax() if part == "amax" else _Part(tensor, part)


def batch_of(source: Source, found: Found) -> tuple[int, ...]:
    """Return the leading axes of a stack of matrices."""
    first, part = found.arrays[0], found.layout.parts[0]
    assert first is not None
    axes = 2 if part.shape is None else len(part.shape(Size((), 64, 64, 1)))
    shape = source.specs[first].shape
    return shape[: len(shape) - axes] if found.layout.stacks and len(shape) > axes else ()


def packed_of(source: Source, found: Found, how: read.Reading) -> Packed:
    """Return what can be said of a packed tensor, turned for axis -2, from headers and its first row.

    Raises:
        ValueError: arrays that contradict each other or the format.
    """
    packed = _Tensor.of(source, found, how, batch_of(source, found)).packed
    if how.axis == -1:
        return packed
    *batch, rows, columns = packed.shape
    return Packed(dataclasses.replace(packed.blocking, axis=-2), (*batch, columns, rows))


class _Decoded(NamedTuple):
    """A weight in FP8, or of a GGUF type without a format, as its values: only what is asked for is decoded."""

    floats: Floats
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.floats.shape

    def __getitem__(self, box: Box) -> np.ndarray:
        *lead, rows, columns = box
        *batch, height, _ = self.shape
        values = np.empty([i.stop - i.start for i in box], self.dtype)
        for place in itertools.product(*(range(i.start, i.stop) for i in lead)):
            first = height * int(np.ravel_multi_index(place, batch)) if batch else 0
            at = tuple(i - axis.start for i, axis in zip(place, lead, strict=True))
            values[at] = self.floats.rows(first + rows.start, first + rows.stop, columns)
        return values


class _Tensor(NamedTuple):
    """A packed tensor.

    Attributes:
        source, found, how, fmt: where it is, and how it is read.
        batch: the axes of a stack.
        packed: what is said of it.
        unit: columns that bytes are read in: whole blocks, and as many as GGUF has in one.
    """

    source: Source
    found: Found
    how: read.Reading
    fmt: Format
    batch: tuple[int, ...]
    packed: Packed
    unit: int

    @classmethod
    def of(cls, source: Source, found: Found, how: read.Reading, batch: tuple[int, ...]) -> "_Tensor":
        with read.named(found):
            fmt = read.record_of(found.layout, how)
            assert fmt is not None
            unit = math.lcm(64, fmt.block)
            blank = Packed(Blocking(fmt, -1, 0, how.dtype, how.headroom), ())
            tensor = cls(source, found, how, fmt, batch, blank, unit)
            first, shape = found.layout.parts[0], source.specs[found.arrays[0] or ""].shape
            stored = tensor.stored(slice(0, 1))
            columns = check_stored(stored, found.layout, fmt)
            rows = stored.codes.shape[-2]
            if tensor.is_cut:
                rows = shape[len(batch) + next(i for i, (row, _) in enumerate(_growth(first, unit, fmt.block)) if row)]
            blocking = Blocking(fmt, -1, columns, how.dtype, how.headroom)
            return tensor._replace(packed=Packed(blocking, (*batch, rows, columns)))

    def stored(self, rows: slice | None = None, units: slice | None = None, batch: Box = ()) -> Blocks:
        """What is stored of some rows and units of columns; of layouts that do not say how arrays grow, all of it."""
        parts = dict(zip(self.found.arrays, self.found.layout.parts, strict=True))

        def array(name: str) -> np.ndarray:
            mapped = self.source.mapped(name)
            return self._cut(parts[name], mapped, rows, units, batch) if self.is_cut else mapped

        value, _ = read.as_stored(self.found, array, self.how)
        assert isinstance(value, Blocks)
        return value

    @property
    def is_cut(self) -> bool:
        """Whether parts of the tensor can be read by themselves."""
        return self.found.layout.parts[0].shape is not None

    def _cut(self, part: Part, array: np.ndarray, rows: slice | None, units: slice | None, batch: Box) -> np.ndarray:
        growth = _growth(part, self.unit, self.fmt.block)
        if array.ndim != len(self.batch) + len(growth):  # a factor
            return array
        index = list(batch or [slice(None)] * len(self.batch))
        for each_row, each_unit in growth:
            of, each = (rows, each_row) if each_row else (units, each_unit)
            index.append(slice(None) if of is None or not each else slice(of.start * each, of.stop * each))
        return array[tuple(index)]

    def amax(self) -> np.ndarray:
        """That of the matrices, of shape () or of the stack's axes."""
        with read.named(self.found):
            few = self.stored(slice(0, 1), slice(0, 1))
            return np.asarray(amax_of(few, self.batch, self._scales, self.fmt, self.how.headroom), np.float32)

    def _scales(self) -> np.ndarray:
        stored = self.stored()
        return checked_scales(stored.codes, stored.scales, self.fmt)


class _Part(NamedTuple):
    """The codes or the scales of a packed tensor."""

    tensor: _Tensor
    part: str

    @property
    def shape(self) -> tuple[int, ...]:
        _, shape = self.tensor.packed
        return packed_shapes(shape, self.tensor.fmt, -1)[self.part == "scales"]

    def __getitem__(self, box: Box) -> np.ndarray:
        tensor, (*batch, rows, last) = self.tensor, box
        fmt = tensor.fmt
        each = tensor.unit * fmt.bits // 8 if self.part == "codes" else tensor.unit // fmt.block * fmt.scale.nbytes
        units = slice(last.start // each, -(-last.stop // each))
        with read.named(tensor.found):
            stored = tensor.stored(rows, units, tuple(batch))
            codes, scales = stored.codes, stored.scales
            found = codes if self.part == "codes" else checked_scales(codes, scales, fmt)
        if not tensor.is_cut:
            return found[box]
        return found[..., last.start - units.start * each : last.stop - units.start * each]


def _growth(part: Part, unit: int, block: int) -> list[tuple[int, int]]:
    """How many entries each axis of a matrix's array gets for a row, and for `unit` columns; 0 if it is neither's."""
    assert part.shape is not None
    one, tall, wide = (part.shape(Size((), rows, columns, columns // block)) for rows, columns in
                       ((1, unit), (2, unit), (1, 2 * unit)))  # fmt: skip
    return [(t - n, w - n) for n, t, w in zip(one, tall, wide, strict=True)]

