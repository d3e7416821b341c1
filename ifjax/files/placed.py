"""Assembly of a model's parameters from a checkpoint with other names, part by part for each device.

    names -> origins -> parameter -> parts of tensors, mapped -> (amax, encoded) -> devices

Each part is read when it is needed, and its memory map is closed afterwards. Apart from the model, only one part is in
memory at a time.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.arrays import DTYPES, Blocking, QTensor, packed_shapes, shardings
from ifjax.codec import Encoding
from ifjax.files.checkpoint import Checkpoint
from ifjax.files.names import NameRule, Origin, origins, refuse
from ifjax.files.pieces import amax_of, encode
from ifjax.models.leaves import value_of

Index = tuple[slice, ...]
Read = Callable[[Index], np.ndarray]


def placed_tree(file: Checkpoint, wanted: Mapping[str, Any], rules: Iterable[NameRule]) -> dict[str, Any]:
    """Return the parameters of a tree, by path, each on its devices; `rules` are the `names` of `load_file`.

    Raises:
        ValueError: names, shapes, dtypes or formats do not fit; the message lists the faults.
    """
    found = origins(file, rules, wanted)
    values = {path: value_of(leaf) for path, leaf in wanted.items()}
    faults = [f"{path!r} {fault}" for path in wanted if (fault := _fault(file, found[path], values[path])) is not None]
    refuse(faults, f"{file.path} does not fit the tree")
    return {path: _parameter(file, found[path], values[path]) for path in wanted}


def _parameter(file: Checkpoint, origin: Origin, value: Any) -> Any:
    first = origin.names.flat[0]
    if first in file.packed:
        return _packed(file, origin, value)
    source = _Stack(file, origin, "", tuple(value.shape))
    if isinstance(value, QTensor):
        return _encoded(source, value)

    def read(index: Index) -> np.ndarray:
        return source.read(index).astype(value.dtype, copy=False)

    return _put(source.shape, getattr(value, "sharding", None), read)


class _Stack(NamedTuple):
    """One array of each tensor of a stack, transposed and reshaped to fit the parameter.

    Attributes:
        file, origin: the checkpoint and the origin of the parameter.
        part: "codes", "scales" or "amax" of packed tensors; "" for arrays.
        shape: the shape of the whole stack.
    """

    file: Checkpoint
    origin: Origin
    part: str
    shape: tuple[int, ...]

    @property
    def lead(self) -> int:
        """The number of stacked axes."""
        return self.origin.names.ndim

    def read(self, index: Index) -> np.ndarray:
        """Return a copy of the part at `index`."""
        ahead, inner = index[: self.lead], index[self.lead :]
        names = self.origin.names[(*ahead, ...)]
        parts = [self._one(name, inner) for name in names.reshape(-1)]
        return parts[0] if not self.lead else np.stack(parts).reshape(*names.shape, *parts[0].shape)

    def _one(self, name: str, index: Index) -> np.ndarray:
        whole = self.file.mapped(self.file.parts(name)[self.part])
        turned = whole.swapaxes(-1, -2) if self.origin.rule.transpose else whole
        if self.origin.rule.reshape and self.part == "":
            turned = turned.view()
            turned.shape = self.shape[self.lead :]  # always a view: `_fault` has rejected shapes that need a copy
        return np.array(turned[index])


# --- placing ---------------------------------------------------------------------------------------------------------


def _put(shape: tuple[int, ...], sharding: Any, read: Read) -> Any:
    """Return an array on its devices; each part is transferred before the next one is read."""
    if sharding is None:
        a = read(tuple(slice(0, n) for n in shape))
        return jnp.asarray(a) if jax.dtypes.canonicalize_dtype(a.dtype) == a.dtype else a
    parts: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        parts.setdefault(_ends(index, shape), []).append(device)
    placed = []
    for ends, devices in parts.items():
        a = read(tuple(slice(*end) for end in ends))
        placed += [jax.device_put(a, device) for device in devices]
        jax.block_until_ready(placed[-len(devices) :])
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _ends(index: Any, shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(i.indices(n)[:2] for i, n in zip(index, shape, strict=True))


def _shardings(value: Any) -> dict[str, Any]:
    """Return the shardings of the arrays of a QTensor in the tree, by field; None where there is none."""
    return {name: getattr(getattr(value, name), "sharding", None) for name in ("codes", "scales", "amax")}


def _packed(file: Checkpoint, origin: Origin, value: Any) -> QTensor:
    """Return a QTensor from the bytes of tensors that are packed in the checkpoint."""
    blocking = _blocking(file, origin)
    shape = _shape(file, origin)
    amax = None
    if "amax" in file.parts(origin.names.flat[0]):
        amaxes = [np.array(file.mapped(file.parts(name)["amax"])) for name in origin.names.flat]
        own = max((a.shape for a in amaxes), key=len)
        amax = np.stack([a.reshape(own) for a in amaxes]).reshape(*origin.names.shape, *own)
    shapes = dict(zip(("codes", "scales"), packed_shapes(shape, blocking.fmt, blocking.axis), strict=True))
    if isinstance(value, QTensor):
        places = _shardings(value)
        if amax is not None:
            amax = amax.reshape(value.amax.shape)  # pyright: ignore[reportOptionalMemberAccess]
    else:
        sharding = getattr(value, "sharding", None)
        abstract = QTensor(*(jax.ShapeDtypeStruct(s, np.uint8) for s in shapes.values()),  # pyright: ignore
                           None if amax is None else jax.ShapeDtypeStruct(amax.shape, amax.dtype), blocking)  # pyright: ignore  # fmt: skip
        places = _shardings(None) if sharding is None else {
            name: getattr(shardings(abstract, sharding), name) for name in ("codes", "scales", "amax")}  # fmt: skip
    arrays = {part: _put(s, places[part], _Stack(file, origin, part, s).read) for part, s in shapes.items()}
    if amax is not None:
        arrays["amax"] = _put(amax.shape, places["amax"], lambda index: amax[index])
    return QTensor(arrays["codes"], arrays["scales"], arrays.get("amax"), blocking)


# --- encoding --------------------------------------------------------------------------------------------------------


def _encoded(source: _Stack, value: QTensor) -> QTensor:
    """Quantize a float tensor of the checkpoint to the tree's QTensor, with the bytes of `ifjax.quantize`."""
    places, parts = _shardings(value), _Encoder(source, value)
    shapes = {"codes": tuple(value.codes.shape), "scales": tuple(value.scales.shape)}
    if value.amax is not None:
        regions = {parts.region(index, "codes") for index in _indices(shapes["codes"], places["codes"])}
        parts.amax = _over_processes(parts.largest(regions), places["codes"])
    arrays = {name: _put(s, places[name], lambda index, name=name: parts.read(index, name))
              for name, s in shapes.items()}  # fmt: skip
    amax = None if (own := parts.amax) is None else _put(own.shape, places["amax"], lambda index: own[index])
    return QTensor(arrays["codes"], arrays["scales"], amax, value.blocking)


def _indices(shape: tuple[int, ...], sharding: Any) -> list[Index]:
    """Return the distinct parts of an array that the devices of this process hold."""
    whole = tuple(slice(0, n) for n in shape)
    if sharding is None:
        return [whole]
    found = dict.fromkeys(_ends(index, shape) for index in sharding.addressable_devices_indices_map(shape).values())
    return [tuple(slice(*end) for end in ends) for ends in found]


def _over_processes(amax: np.ndarray, sharding: Any) -> np.ndarray:
    """Return the maximum of amax over all processes that hold parts of the tensor."""
    if sharding is None or sharding.is_fully_addressable:
        return amax
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(amax)).max(0)


class _Encoder:
    """An encoder of regions of whole blocks of a stack of matrices; it keeps codes or scales until they are read."""

    def __init__(self, source: _Stack, value: QTensor):
        self.source, self.blocking, self.shape = source, value.blocking, source.shape
        fmt = value.fmt
        self.how = Encoding.of(fmt, block_2d=value.block_2d)
        self.at = len(self.shape) + value.axis
        # Leading axes, of the stack or with several amax values, are encoded one index at a time.
        kept = 0 if value.amax is None else max((i + 1 for i, n in enumerate(value.amax.shape) if n > 1), default=0)
        self.lead = max(source.lead, kept, len(self.shape) - 2 if value.block_2d else 0)
        self.amax: np.ndarray | None = None
        self._amax_shape = None if value.amax is None else tuple(value.amax.shape)
        # The smallest number of values that fills whole bytes and blocks, and its bytes of codes and of scales.
        self.whole = fmt.block * 8 // math.gcd(8, fmt.block * fmt.bits)
        self.nbytes = {"codes": self.whole * fmt.bits // 8, "scales": self.whole // fmt.block * fmt.scale.nbytes}
        self._done: dict[tuple[tuple[int, int], ...], dict[str, np.ndarray]] = {}

    def region(self, index: Index, part: str) -> tuple[tuple[int, int], ...]:
        """Return the ranges of values, in whole blocks, from which the bytes of a part at `index` are encoded."""
        ends = [(i.start, i.stop) for i in index]
        ends[self.at] = self._values(ends[self.at], self.nbytes[part], self.shape[self.at])
        if self.how.block_2d:
            other = len(self.shape) - 3 - (self.at - len(self.shape))
            ends[other] = self._values(ends[other], self.whole, self.shape[other])
        return tuple(ends)

    def _values(self, ends: tuple[int, int], nbytes: int, length: int) -> tuple[int, int]:
        first, last = ends[0] // nbytes, -(-ends[1] // nbytes)
        return first * self.whole, min(last * self.whole, length)

    def largest(self, regions) -> np.ndarray:
        """Return the amax of these regions, in the shape of the QTensor's amax."""
        assert self._amax_shape is not None
        amax = np.zeros(self._amax_shape, np.float32)
        for region in regions:
            for place in _places(region[: self.lead]):
                flat = self._matrix(place, region).reshape(-1)
                mine = self._amax_place(place)
                amax[mine] = max(amax[mine], amax_of(lambda start, count, x=flat: x[start : start + count], flat.size))
        return amax

    def read(self, index: Index, part: str) -> np.ndarray:
        """Return the bytes of "codes" or "scales" at `index`; the first of the two encodes both."""
        region = self.region(index, part)
        if part not in self._done.get(region, ()):
            self._done[region] = self._encode(region)
        data, first = self._done[region].pop(part), [start for start, _ in region]
        first[self.at] = region[self.at][0] // self.whole * self.nbytes[part]
        return data[tuple(slice(i.start - start, i.stop - start) for i, start in zip(index, first, strict=True))]

    def _encode(self, region) -> dict[str, np.ndarray]:
        shape = tuple(end - start for start, end in region)
        axis = self.blocking.axis
        shapes = zip(("codes", "scales"), packed_shapes(shape, self.blocking.fmt, axis), strict=True)
        out = {name: np.empty(s, np.uint8) for name, s in shapes}
        for place in _places(region[: self.lead]):
            at = tuple(i - start for i, (start, _) in zip(place, region, strict=False))
            amax = np.float32(0) if self.amax is None else self.amax[self._amax_place(place)]
            for name, array in self._matrix_bytes(place, region, amax).items():
                out[name][at] = array
        return out

    def _matrix_bytes(self, place, region, amax) -> dict[str, np.ndarray]:
        x, axis = self._matrix(place, region), self.blocking.axis
        if not self.how.block_2d:  # the order of the rows does not matter, since blocks are independent
            x = np.ascontiguousarray(np.moveaxis(x, axis, -1))
        rows, kept = math.prod(x.shape[:-1]), x.shape
        flat = x.reshape(-1)

        def read(start, count):
            return flat[start : start + count]

        pieces = list(encode(read, (rows, kept[-1]), amax, self.how, axis if self.how.block_2d else -1))
        found = {}
        for name in ("codes", "scales"):
            data = np.concatenate([getattr(piece, name).reshape(-1) for piece in pieces])
            if self.how.block_2d:
                found[name] = data.reshape(packed_shapes(kept, self.blocking.fmt, axis)[name == "scales"])
            else:
                found[name] = np.moveaxis(data.reshape(*kept[:-1], -1), -1, axis)
        return found

    def _matrix(self, place: tuple[int, ...], region) -> np.ndarray:
        index = tuple(slice(i, i + 1) for i in place) + tuple(slice(*ends) for ends in region[len(place) :])
        x = self.source.read(index).reshape([i.stop - i.start for i in index[len(place) :]])
        # Cast to the tree's dtype, so that the result equals quantizing the loaded floats.
        return x.astype(self.blocking.dtype, copy=False)

    def _amax_place(self, place: tuple[int, ...]) -> tuple[int, ...]:
        assert self._amax_shape is not None
        return tuple(i if n > 1 else 0 for i, n in zip((*place, *[0] * len(self._amax_shape)), self._amax_shape,
                                                       strict=False))  # fmt: skip


def _places(ends: Sequence[tuple[int, int]]):
    starts = [start for start, _ in ends]
    for offset in np.ndindex(*[end - start for start, end in ends]):
        yield tuple(start + i for start, i in zip(starts, offset, strict=True))


# --- what does not fit -----------------------------------------------------------------------------------------------


def _turned(file: Checkpoint, origin: Origin, name: str) -> tuple[int, ...]:
    shape = tuple(file.packed[name].shape if name in file.packed else file.entries[name].shape)
    return (*shape[:-2], shape[-1], shape[-2]) if origin.rule.transpose and len(shape) > 1 else shape


def _shape(file: Checkpoint, origin: Origin) -> tuple[int, ...]:
    return (*origin.names.shape, *_turned(file, origin, origin.names.flat[0]))


def _blocking(file: Checkpoint, origin: Origin) -> Blocking:
    """Return the blocking of a packed tensor in the parameter, after transposition and without axis names."""
    blocking = file.packed[origin.names.flat[0]].blocking
    axis = -3 - blocking.axis if origin.rule.transpose and blocking.axis >= -2 else blocking.axis
    return dataclasses.replace(blocking, axis=axis, names=None)


def _fault(file: Checkpoint, origin: Origin, value: Any) -> str | None:
    names, rule = origin.names, origin.rule
    first = names.flat[0]
    alike = {(name in file.packed, _turned(file, origin, name), _kind(file, name)) for name in names.flat}
    if len(alike) > 1:
        return f"is stacked of tensors that are not alike: {sorted(map(str, alike))[:2]}"
    if rule.transpose and len(_turned(file, origin, first)) < 2:
        return f"is to be transposed, and {first!r} has shape {_turned(file, origin, first)}"
    shape, wanted = _shape(file, origin), tuple(value.shape)
    if first in file.packed:
        return _packed_fault(file, origin, value, shape)
    if rule.reshape:
        lead = names.ndim
        if shape[:lead] != wanted[:lead] or math.prod(shape) != math.prod(wanted):
            return f"has the shape {wanted}, and {first!r} gives {shape}: that is no other shape of it"
        if not _splits(shape[lead:], wanted[lead:]) and rule.transpose:
            return f"has the shape {wanted}, which joins axes of the transposed {shape}: transpose or reshape alone"
    elif shape != wanted:
        hint = ": reshape=True lays it so" if math.prod(shape) == math.prod(wanted) else ""
        return f"has the shape {wanted}, and {first!r} gives {shape}{hint}"
    stored = file.abstract(first).dtype
    if isinstance(value, QTensor):
        if stored.name not in DTYPES:
            return (f"is to be quantized, and {first!r} is {file.entries[first].dtype}: decode it first, by "
                    "`ifjax import --decode` or `ifjax quantize --source`")  # fmt: skip
        if value.headroom != 1:
            return "was rounded stochastically in the tree: load floats, and quantize them with a key"
        amax = () if value.amax is None else value.amax.shape
        if any(n > 1 for n in amax[len(wanted) + value.axis :]):
            return f"has amax of shape {tuple(amax)}, beyond axis {value.axis} of its blocks: load floats, and quantize"
        return None
    both = {stored.name, np.dtype(value.dtype).name}
    if len(both) > 1 and not both <= set(DTYPES):
        return f"is {value.dtype}, and {first!r} is {stored}"
    return None


def _packed_fault(file: Checkpoint, origin: Origin, value: Any, shape: tuple[int, ...]) -> str | None:
    first, wanted = origin.names.flat[0], tuple(value.shape)
    if origin.rule.reshape and shape != wanted:
        return f"is to be reshaped, and {first!r} is packed: leave out reshape"
    if shape != wanted:
        return f"has the shape {wanted}, and {first!r} gives {shape}"
    if origin.rule.transpose and file.packed[first].blocking.block_2d and len(shape) < 2:
        return f"cannot be transposed: {first!r} has square blocks"
    if not isinstance(value, QTensor):
        return None
    found = _blocking(file, origin)
    for field in ("fmt", "axis", "dtype", "headroom", "block_2d"):
        ours, theirs = getattr(found, field), getattr(value.blocking, field)
        if ours != theirs:
            ours, theirs = (getattr(x, "name", x) for x in (ours, theirs))
            return f"has {field} {theirs}, and {first!r} is packed with {field} {ours}"
    if value.amax is not None:
        stored = [file.entries[file.parts(name)["amax"]].shape for name in origin.names.flat]
        if origin.names.size * math.prod(stored[0]) != math.prod(value.amax.shape):
            return f"has amax of shape {tuple(value.amax.shape)}, and {first!r} one of {stored[0]} for each of {shape}"
    return None


def _kind(file: Checkpoint, name: str) -> Any:
    return file.packed[name].blocking if name in file.packed else file.entries[name].dtype


def _splits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Return whether a reshape only splits axes, so that any part of the result is a view of the source."""
    rest = list(wanted)
    for n in shape:
        size = 1
        while rest and size < n:
            size *= rest.pop(0)
        if size != n:
            return False
    return all(n == 1 for n in rest)
