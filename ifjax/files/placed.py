"""Assembly of a model's parameters from a checkpoint with other names, part by part for each device.

    names -> origins -> parameter -> parts of tensors, mapped -> (amax, encoded) -> devices

Each part is read when it is needed, and its memory map is closed afterwards. Apart from the model, only one part is in
memory at a time.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ifjax.arrays import DTYPES, Blocking, QTensor, packed_shapes, shardings
from ifjax.codec import Encoding
from ifjax.files import safetensors
from ifjax.files.checkpoint import Packed
from ifjax.files.names import NameRule, Origin, origins, refuse
from ifjax.files.pieces import amax_of, encode
from ifjax.files.windows import Index, Share, Window, turned_shape
from ifjax.models.leaves import value_of

Read = Callable[[Index], np.ndarray]


class Tensors(Protocol):
    """What parameters are placed from: a `Checkpoint`, or another tool's that is seen as one.

    Attributes:
        path: of the file, for messages.
        packed: what is said of each packed tensor.
        entries: `dtype` (the file's name for it) and `shape` of each array that is not packed.
        says_dtype: whether packed tensors have a dtype, which the tree has to agree with.
    """

    path: Path
    packed: Any
    entries: Any
    says_dtype: bool

    def __iter__(self) -> Iterator[str]: ...

    def part(self, name: str, part: str) -> Any:
        """A packed tensor's "codes", "scales" or "amax", or "" of another: what gives the box that slices name."""


def placed_tree(file: Tensors, wanted: Mapping[str, Any], rules: Iterable[NameRule]) -> dict[str, Any]:
    """Return the parameters of a tree, by path, each on its devices; `rules` are the `names` of `load_file`.

    Raises:
        ValueError: names, shapes, dtypes or formats do not fit; the message lists the faults.
    """
    found = origins(file, rules, wanted)
    values = {path: value_of(leaf) for path, leaf in wanted.items()}
    sources, faults = {}, []
    for path in values:
        try:
            sources[path] = _fitted(file, found[path], path, values)
        except ValueError as error:
            faults.append(f"{path!r} {error}")
    refuse(faults, f"{file.path} does not fit the tree")
    return {path: _parameter(sources[path], value) for path, value in values.items()}


class _Source(NamedTuple):
    """The tensors that a parameter is made of, and how they become it.

    Attributes:
        file, origin: where they are.
        window: of each of them.
        packed: what is said of them as they lie in the parameter, if they are packed.
    """

    file: Tensors
    origin: Origin
    window: Window
    packed: Packed | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        return (*self.origin.names.shape, *self.window.laid)


def _parameter(source: _Source, value: Any) -> Any:
    if source.packed is not None:
        return _packed(source, source.packed.blocking, value)
    stack = _Stack(source, "", source.shape)
    if isinstance(value, QTensor):
        return _encoded(stack, value)

    def read(index: Index) -> np.ndarray:
        return stack.read(index).astype(value.dtype, copy=False)

    return _put(stack.shape, getattr(value, "sharding", None), read)


class _Stack(NamedTuple):
    """One array of each tensor of a stack, transposed, split and reshaped to fit the parameter.

    Attributes:
        source: the checkpoint, and how its tensors become the parameter.
        part: "codes", "scales" or "amax" of packed tensors; "" for arrays.
        shape: the shape of the whole stack.
    """

    source: _Source
    part: str
    shape: tuple[int, ...]

    @property
    def lead(self) -> int:
        """The number of stacked axes."""
        return self.source.origin.names.ndim

    def read(self, index: Index) -> np.ndarray:
        """Return a copy of the part at `index`."""
        ahead, inner = index[: self.lead], index[self.lead :]
        file, origin, window, _ = self.source
        names = origin.names[(*ahead, ...)]
        parts = [window.read(file.part(name, self.part), inner, self.shape[self.lead :]) for name in names.reshape(-1)]
        return parts[0] if not self.lead else np.stack(parts).reshape(*names.shape, *parts[0].shape)


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


def _packed(source: _Source, blocking: Blocking, value: Any) -> QTensor:
    """Return a QTensor from the bytes of tensors that are packed in the checkpoint."""
    amax = None
    if blocking.fmt.has_tensor_scale:
        wanted = value.amax.shape if isinstance(value, QTensor) and value.amax is not None else None
        amax = _amax(source, wanted)
    shapes = dict(zip(("codes", "scales"), packed_shapes(source.shape, blocking.fmt, blocking.axis), strict=True))
    sharding = getattr(value, "sharding", None)
    if isinstance(value, QTensor):
        places = _shardings(value)
    elif sharding is None:
        places = dict.fromkeys(("codes", "scales", "amax"))
    else:
        codes, scales = (jax.ShapeDtypeStruct(s, np.uint8) for s in shapes.values())
        own = None if amax is None else jax.ShapeDtypeStruct(amax.shape, amax.dtype)
        each = shardings(QTensor(codes, scales, own, blocking), sharding)  # pyright: ignore[reportArgumentType]
        places = {name: getattr(each, name) for name in ("codes", "scales", "amax")}
    arrays = {part: _put(s, places[part], _Stack(source, part, s).read) for part, s in shapes.items()}
    if amax is not None:
        arrays["amax"] = _put(amax.shape, places["amax"], lambda index: amax[index])
    return QTensor(arrays["codes"], arrays["scales"], arrays.get("amax"), blocking)


def _amax(source: _Source, wanted: tuple[int, ...] | None) -> np.ndarray:
    """The amax of all tensors of a stack, one for several matrices where the tree wants one for each.

    Raises:
        ValueError: the tree wants another shape, or the window cuts axes along which there are several.
    """
    file, origin, window, _ = source
    ndim = len(window.shape)
    amaxes = [np.asarray(file.part(name, "amax")) for name in origin.names.flat]
    amaxes = [a.reshape(a.shape + (1,) * (ndim - a.ndim)) for a in amaxes]
    amaxes = [a.swapaxes(-1, -2) if window.turned else a for a in amaxes]
    own = tuple(max(lengths) for lengths in zip(*(a.shape for a in amaxes), strict=True))
    last = max((i + 1 for i, n in enumerate(own) if n > 1), default=0)
    if last and (window.shape[:last] != window.laid[:last] or (window.share is not None and window.share.axis < last)):
        raise ValueError(f"has an amax for each of the first {last} axes of {window.shape}, which cannot be cut")
    stacked = np.stack([np.broadcast_to(a, own) for a in amaxes]).reshape((*origin.names.shape, *own[:last]))
    if wanted is None:
        return stacked
    if len(wanted) < stacked.ndim and all(n == 1 for n in stacked.shape[len(wanted) :]):
        stacked = stacked.reshape(stacked.shape[: len(wanted)])
    try:
        spread = stacked.reshape(stacked.shape + (1,) * (len(wanted) - stacked.ndim))
        return np.array(np.broadcast_to(spread, wanted))
    except ValueError:
        raise ValueError(f"has amax of shape {wanted}, and {origin.names.flat[0]!r} gives {stacked.shape}") from None


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
        self.stack, self.blocking, self.shape = source, value.blocking, source.shape
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
        x = self.stack.read(index).reshape([i.stop - i.start for i in index[len(place) :]])
        # As the tree's dtype has it: what is quantized is what a load of the floats would give.
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


def _fitted(file: Tensors, origin: Origin, path: str, values: Mapping[str, Any]) -> _Source:
    """What makes the parameter.

    Raises:
        ValueError: it is not what the tree wants; the words to follow its path.
    """
    names, rule, value = origin.names, origin.rule, values[path]
    first = names.flat[0]
    alike = {(name in file.packed, _stored(file, name), _kind(file, name)) for name in names.flat}
    if len(alike) > 1:
        raise ValueError(f"is stacked of tensors that are not alike: {sorted(map(str, alike))[:2]}")
    shape = _stored(file, first)
    if rule.transpose and len(shape) < 2:
        raise ValueError(f"is to be transposed, and {first!r} has shape {shape}")
    turned, wanted, lead = turned_shape(shape, rule.transpose), tuple(value.shape), names.ndim
    share = _share(origin, path, turned, values)
    window = Window.of(shape, rule.transpose, share, wanted[lead:] if rule.reshape else None)
    gives = (*names.shape, *window.shape)
    if rule.reshape:
        if gives[:lead] != wanted[:lead] or math.prod(gives) != math.prod(wanted):
            raise ValueError(f"has the shape {wanted}, and {first!r} gives {gives}: that is no other shape of it")
        if not window.divides and (rule.transpose or share is not None):
            what = "transposed" if rule.transpose else "split"
            raise ValueError(
                f"has the shape {wanted}, which joins axes of the {what} {gives}: transpose or reshape alone"
            )
    elif gives != wanted:
        hint = ": reshape=True lays it so" if math.prod(gives) == math.prod(wanted) else ""
        raise ValueError(f"has the shape {wanted}, and {first!r} gives {gives}{hint}")
    if first in file.packed:
        source = _Source(file, origin, window, _as_it_lies(file, first, window, value))
        _check_packed(source, value)
        return source
    _check_plain(file, first, value)
    return _Source(file, origin, window, None)


def _share(origin: Origin, path: str, turned: tuple[int, ...], values: Mapping[str, Any]) -> Share | None:
    """The share of a split tensor that this parameter has: parameters' sizes tell where each begins."""
    rule = origin.rule
    if rule.split is None:
        return None
    first, groups = origin.names.flat[0], rule.groups
    if len(turned) < -rule.split:
        raise ValueError(f"is to be split along axis {rule.split}, and {first!r} has shape {turned}")
    axis = len(turned) + rule.split
    rest = math.prod(turned[:axis] + turned[axis + 1 :])
    sizes = [math.prod(values[p].shape[origin.names.ndim :]) / rest if rest else 0 for p in origin.paths]
    if sum(sizes) != turned[axis] or any(size % groups for size in sizes):
        runs = f", in {groups} groups" if groups > 1 else ""
        raise ValueError(
            f"is split from axis {rule.split} of {first!r}, {turned}, which has {turned[axis]} entries{runs}, and the "
            f"parameters of {', '.join(origin.paths)} take {', '.join(f'{size:g}' for size in sizes)}"
        )
    ends = [0, *itertools.accumulate(int(size) // groups for size in sizes)]
    mine = origin.paths.index(path)
    return Share(axis, turned[axis], groups, ends[mine], ends[mine + 1])


def _check_plain(file: Tensors, first: str, value: Any) -> None:
    code = file.entries[first].dtype
    stored = safetensors.numpy_dtype(code)
    if stored is None:
        raise ValueError(f"is made of {first!r}, which is {code}: numpy lacks it")
    if isinstance(value, QTensor):
        if stored.name not in DTYPES:
            raise ValueError(
                f"is to be quantized, and {first!r} is {code}: decode it first, by `ifjax import --decode` or `ifjax "
                "quantize --source`; layouts of other tools come in by ifjax.exchange.load(path, like=, names=)"
            )
        if value.headroom != 1:
            raise ValueError("was rounded stochastically in the tree: load floats, and quantize them with a key")
        amax = () if value.amax is None else value.amax.shape
        if any(n > 1 for n in amax[value.ndim + value.axis :]):
            raise ValueError(
                f"has amax of shape {tuple(amax)}, beyond axis {value.axis} of its blocks: load floats, and quantize"
            )
        return
    both = {stored.name, np.dtype(value.dtype).name}
    if len(both) > 1 and not both <= set(DTYPES):
        raise ValueError(f"is {value.dtype}, and {first!r} is {stored}")


def _as_it_lies(file: Tensors, first: str, window: Window, value: Any) -> Packed:
    """What is said of a packed tensor, as it lies in the parameter.

    Raises:
        ValueError: blocks would be torn.
    """
    stored = file.packed[first].blocking
    axis = -3 - stored.axis if window.turned and stored.axis >= -2 else stored.axis
    at, whole = len(window.shape) + axis, stored.fmt.block * 8 // math.gcd(8, stored.fmt.block * stored.fmt.bits)
    if stored.block_2d and (window.share is not None or window.shape != window.laid):
        raise ValueError(f"cannot be cut or reshaped: {first!r} has square blocks")
    share = window.share
    if share is not None and share.axis == at and any(
        n % whole for n in (share.length // share.groups, share.start, share.stop)
    ):  # fmt: skip
        raise ValueError(f"takes {share.start} to {share.stop} of an axis of {first!r} that has blocks of {whole}")
    after: tuple[int, ...] = window.axis_of(at) if window.divides else ()
    if not after or (len(after) > 1 and window.laid[max(after)] % whole):
        raise ValueError(
            f"has the shape {window.laid}, which tears or joins blocks of {whole} along axis {axis} of the packed "
            f"{first!r}, {window.shape}"
        )
    dtype = stored.dtype if file.says_dtype else np.dtype(value.dtype)
    place = max(after)
    blocking = dataclasses.replace(stored, axis=place - len(window.laid), length=window.laid[place], dtype=dtype,
                                   names=None)  # fmt: skip
    return Packed(blocking, window.laid)


def _check_packed(source: _Source, value: Any) -> None:
    packed, first = source.packed, source.origin.names.flat[0]
    assert packed is not None
    fields = ("fmt", "axis", "dtype", "headroom", "block_2d") if isinstance(value, QTensor) else ()
    for field in fields:
        ours, theirs = getattr(packed.blocking, field), getattr(value.blocking, field)
        if ours != theirs:
            ours, theirs = (getattr(x, "name", x) for x in (ours, theirs))
            raise ValueError(f"has {field} {theirs}, and {first!r} is packed with {field} {ours}")
    if packed.fmt.has_tensor_scale:
        _amax(source, value.amax.shape if isinstance(value, QTensor) and value.amax is not None else None)


def _stored(file: Tensors, name: str) -> tuple[int, ...]:
    return tuple(file.packed[name].shape if name in file.packed else file.entries[name].shape)


def _kind(file: Tensors, name: str) -> Any:
    return file.packed[name].blocking if name in file.packed else file.entries[name].dtype
