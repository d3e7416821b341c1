"""Packed checkpoints: trees of QTensors and arrays in safetensors files, single or in shards.

BUILD.md describes the layout. A packed tensor w is stored as three companion tensors: `w.codes` and `w.scales` (uint8)
and `w.amax` (float32, absent for formats without a tensor scale). The metadata hold everything else: the format's full
record, so that a reader needs no table of formats, and checksums of every array and of the header. Files hold no
pickles.

    tree -> names -> items -> file          file -> header, checked -> arrays, mapped and checked one by one -> tree
"""

import contextlib
import errno
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ifjax.arrays import DTYPES, Blocking, QTensor, packed_shapes
from ifjax.arrays.qtensor import check_arrays
from ifjax.atomic import Around, locked, note_doubtful, temporary_folder
from ifjax.files import safetensors
from ifjax.files.safetensors import (
    Contents,
    FileError,
    Foreign,
    Identity,
    Reader,
    Slot,
    StoredTensor,
    Write,
    natural_order,
)
from ifjax.formats import Format
from ifjax.models.adapters import Adapted
from ifjax.models.leaves import is_leaf, value_of
from ifjax.models.sites import join_path
from ifjax.products import Prepacked

LAYOUT = 2  # the layout that is written; layout 1 can be read too


SHARD_BYTES = 5_000_000_000  # the shard size for paths of an index without `max_shard_bytes`


META, _SEAL = "ifjax", safetensors.SEAL


class Packed(NamedTuple):
    """The stored description of a packed tensor: its blocking and its shape."""

    blocking: Blocking
    shape: tuple[int, ...]

    @property
    def fmt(self) -> Format:
        """The format's record."""
        return self.blocking.fmt


class Item(NamedTuple):
    """A tensor to be written: its arrays' slots, and a function that passes their bytes to a `Write`, in order."""

    name: str
    slots: tuple[Slot | Foreign, ...]
    packed: Packed | None
    fill: Callable[[Write], None]


def save_file(params: Any, path: str | os.PathLike, *, max_shard_bytes: int | None = None) -> Path:
    """Write a tree of QTensors and arrays atomically to a safetensors file, or to shards and an index file.

    Tensors are named by their '/'-joined path in the tree. Device arrays are copied to the host one after the other. An
    existing file at `path` is replaced, and so is an older checkpoint of this name that `save_file` wrote in another
    number of files: the last save is what loads. A crash at any moment leaves the old checkpoint or the new one.

    Args:
        params: nested dictionaries or lists, an NNX state, Flax boxes, or any pytree whose leaves have names.
        path: the path of the file, `*.safetensors`, or of an index file, `*.safetensors.index.json`, to write shards.
        max_shard_bytes: the largest size of a file's arrays. A larger checkpoint is written in shards, with an index
            file `path` + ".index.json". A tensor is never split.

    Returns:
        The path to load: that of the file or of the index file.

    Raises:
        ValueError: names are not unique or nested in one another, `path` has another suffix, or an array spans hosts.
        TypeError: a leaf is not an array, or has a dtype that files cannot hold.
        FileExistsError: files that `save_file` did not write are in the way; none of them is removed.
        OSError: the files cannot be written; the old checkpoint is unchanged.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> params = {"mlp": {"kernel": ifjax.quantize(jnp.ones((64, 32)), "if4", axis=-2), "bias": jnp.zeros(32)}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = ifjax.save_file(params, f"{folder}/model.safetensors")
        ...     loaded = ifjax.load_file(path)
        >>> loaded["mlp"]["kernel"]
        QTensor(if4, 64x32 float32, axis=-2, 4.516 bits a value)
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_whole)
    items = [_item(join_path(keys), value_of(leaf)) for keys, leaf in leaves]
    _check_names(item.name for item in items)
    return write_items(path, items, max_shard_bytes=max_shard_bytes)


def open_file(path: str | os.PathLike, *, check: bool = True) -> "Checkpoint":
    """Return a checkpoint as a read-only mapping from names to tensors, each of which is read when it is accessed.

    Headers are read and checked immediately. Arguments and errors are those of `load_file`.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> params = {"a": ifjax.quantize(jnp.ones((2, 32))), "b": jnp.ones(3)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = ifjax.open_file(ifjax.save_file(params, f"{folder}/model.safetensors"))
        ...     list(file), file["a"].shape, type(file["a"].codes).__name__
        (['a', 'b'], (2, 32), 'ndarray')
    """
    return Checkpoint(path, check=check)


class Checkpoint(Mapping[str, Any]):
    """An open checkpoint, returned by `open_file`: QTensors and memory-mapped arrays by name.

    Attributes:
        path: the path of the file or index file.
        files: all files, in order.
        entries: the stored arrays, by their name in the files.
        packed: the descriptions of packed tensors, by name.
        layout: the layout's number, the newest if the files differ; None for files that ifjax did not write.
        metadata: the files' other metadata, as text.
        sums: CRC-32 of each array, by its name in the files; {} for files without checksums.
        says_dtype: True: packed tensors have a dtype, with which a tree must agree.
    """

    says_dtype = True

    def __init__(self, path: str | os.PathLike, *, check: bool = True):
        self._check = check
        try:
            whole = self._read(path)
        except FileNotFoundError:
            whole = False
        except FileError:
            if not safetensors.is_of_several(path):
                raise
            whole = False
        if not whole:  # the checkpoint is broken, or a writer replaced it meanwhile: read again, without writers
            folder = Path(path) if os.path.isdir(path) else Path(path).parent
            with locked(folder):
                self._read(path)

    def _read(self, path: str | os.PathLike) -> bool:
        """Read and check all headers; return whether the index file stayed the same meanwhile."""
        index, files, weight_map = safetensors.resolve(path)
        before = None if index is None else Identity.of(index.stat())
        self.path = files[0] if index is None else index
        self.files = tuple(files)
        self.entries: dict[str, StoredTensor] = {}
        self.packed: dict[str, Packed] = {}
        self.layout: int | None = None
        self.metadata: dict[str, str] = {}
        self.sums: dict[str, int] = {}
        self._file_of: dict[str, Path] = {}
        self._identities: dict[Path, Identity] = {}
        for file in files:
            contents = safetensors.read_contents(file)
            if index is not None:
                _check_shard(index, contents, weight_map)
            layout, packed, sums = _read_metadata(contents)
            self.layout = max(filter(None, (self.layout, layout)), default=None)
            self.entries |= contents.entries
            self.packed |= packed
            self.sums |= sums
            self.metadata |= {k: v for k, v in contents.metadata.items() if k not in (META, _SEAL)}
            self._file_of |= dict.fromkeys(contents.entries, file)
            self._identities[file] = contents.identity
        inside = {part for name, p in self.packed.items() for part in _parts(name, p.fmt)}
        names = [*self.packed, *(name for name in self.entries if name not in inside)]
        self._names = dict.fromkeys(sorted(names, key=natural_order))
        self._checked: set[str] = set()
        self._maps: dict[Path, np.ndarray] = {}
        return index is None or (Identity.of(index.stat()) == before and safetensors.resolve(path)[1] == files)

    def __len__(self) -> int:
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> QTensor | np.ndarray:
        if name not in self:
            raise KeyError(name)
        if name not in self.packed:
            return self.array(name)
        p = self.packed[name]
        arrays = {part: self.array(stored) for part, stored in self.parts(name).items()}
        parts: Any = arrays  # numpy arrays, so that no JAX backend is started
        return QTensor(parts["codes"], parts["scales"], parts.get("amax"), p.blocking)

    def parts(self, name: str) -> dict[str, str]:
        """Return the stored names of a packed tensor's "codes", "scales" and "amax"; {"": name} for other tensors."""
        if name not in self.packed:
            return {"": name}
        return {part.rpartition(".")[2]: part for part in _parts(name, self.packed[name].fmt)}

    def part(self, name: str, part: str) -> np.ndarray:
        """One of the arrays of `parts`, mapped by itself; errors as for `array`."""
        return self.mapped(self.parts(name)[part])

    def abstract(self, name: str) -> Any:
        """Return the tensor's shapes and dtypes, a QTensor of `jax.ShapeDtypeStruct` or one of these; reads nothing.

        Raises:
            FileError: numpy lacks the tensor's dtype.
        """
        if name not in self.packed:
            return jax.ShapeDtypeStruct(self.entries[name].shape, self._dtype(name))
        p, parts = self.packed[name], self.parts(name)
        codes, scales = (self.entries[parts[part]].shape for part in ("codes", "scales"))
        amax = None
        if "amax" in parts:
            amax = jax.ShapeDtypeStruct(self.entries[parts["amax"]].shape, np.float32)
        codes, scales = (jax.ShapeDtypeStruct(shape, np.uint8) for shape in (codes, scales))
        return QTensor(codes, scales, amax, p.blocking)  # pyright: ignore[reportArgumentType]

    def array(self, stored: str) -> np.ndarray:
        """Return a stored array by its name in the files: read-only and memory-mapped.

        Raises:
            FileError: the checksum differs, numpy lacks the dtype, or an amax is not possible (see `amax_fault`).
        """
        entry, dtype = self.entries[stored], self._dtype(stored)
        if self._check:
            self.check(stored)
        try:
            array = self._bytes(stored).view(dtype).reshape(entry.shape)
        except ValueError as error:  # a shape without elements that is too long for numpy
            raise FileError(f"{self._file_of[stored]}: {stored!r} cannot be of shape {entry.shape}: {error}") from None
        return self._sound(stored, array)

    def mapped(self, stored: str) -> np.ndarray:
        """Return a stored array as a memory map of its own; deleting the array frees the pages that were read.

        The errors are those of `array`.
        """
        entry, dtype = self.entries[stored], self._dtype(stored)
        if self._check:
            self.check(stored)
        if not entry.nbytes:
            return self.array(stored)
        file = self._file_of[stored]
        with file.open("rb") as opened:
            safetensors.check_identity(opened, file, self._identities[file])
            return self._sound(stored, np.asarray(np.memmap(opened, dtype, "r", entry.start, entry.shape)))

    def reader(self, stored: str) -> Reader:
        """Return a `Reader` of parts of a stored array; it does not compare the checksum."""
        file = self._file_of[stored]
        return Reader(file, self.entries[stored], self._identities[file])

    def check(self, stored: str) -> None:
        """Compare an array's bytes with its checksum, once; arrays without a checksum pass.

        Raises:
            FileError: the checksums differ.
        """
        if stored in self._checked or stored not in self.sums:
            return
        found = 0
        with self.reader(stored) as reader:
            for chunk in reader.chunks():
                found = zlib.crc32(chunk.data, found)
        if found != self.sums[stored]:
            raise FileError(
                f"{self._file_of[stored]}: {stored!r} is damaged: its checksum is {found:08x}, and it was written with "
                f"{self.sums[stored]:08x}. Take another copy of the file"
            )
        self._checked.add(stored)

    def _sound(self, stored: str, array: np.ndarray) -> np.ndarray:
        """The array, if it is no amax that cannot be."""
        name, _, part = stored.rpartition(".")
        if part != "amax" or name not in self.packed:
            return array
        parts = self.parts(name)

        def whole():
            return QTensor(self.array(parts["codes"]), self.array(parts["scales"]), array, self.packed[name].blocking)  # pyright: ignore

        if (fault := amax_fault(array, whole)) is not None:
            raise FileError(f"{self._file_of[stored]}: {name!r} {fault}. Take another copy of the file")
        return array

    def _dtype(self, stored: str) -> np.dtype:
        code = self.entries[stored].dtype
        dtype = safetensors.numpy_dtype(code)
        if dtype is None:
            raise FileError(f"{self._file_of[stored]}: {stored!r} is of dtype {code}, which numpy lacks")
        return dtype

    def _bytes(self, stored: str) -> np.ndarray:
        path, entry = self._file_of[stored], self.entries[stored]
        if path not in self._maps:
            with path.open("rb") as file:
                safetensors.check_identity(file, path, self._identities[path])
                self._maps[path] = np.asarray(np.memmap(file, np.uint8, mode="r"))
        data = self._maps[path][entry.start : entry.start + entry.nbytes]
        if data.size != entry.nbytes:
            raise FileError(f"{path} ends within {stored!r}: it has been changed since it was opened")
        return data

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors, {len(self.packed)} of them packed)"


def write_items(
    path: str | os.PathLike,
    items: Sequence[Item],
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    own: bool = True,
) -> Path:
    """Write a checkpoint of tensors that need not be in memory; `path`, result and errors are those of `save_file`.

    Args:
        path: as for `save_file`.
        items: the tensors, written in this order.
        metadata: added to ifjax's own metadata.
        max_shard_bytes: as for `save_file`.
        own: whether to write ifjax's own metadata; false for files in other tools' layouts.
    """
    path = Path(path)
    if path.name.endswith(safetensors.INDEX):
        path = path.with_name(path.name.removesuffix(safetensors.INDEX))
        max_shard_bytes, sharded, named = max_shard_bytes or SHARD_BYTES, True, False
    else:
        sharded, named = max_shard_bytes is not None and file_bytes(items) > max_shard_bytes, True
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} must end in .safetensors (or .safetensors.index.json, for several files)")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "is not a folder: create it first", str(path.parent))

    def in_the_way():
        return safetensors.replaced_by_index(path, named=named) if sharded else safetensors.replaced_by_file(path)

    @contextlib.contextmanager
    def taking_the_place():
        with locked(path.parent):
            old = in_the_way()
            yield old
            safetensors.remove(old)  # otherwise a reader of the folder would find the old index file

    with locked(path.parent):
        in_the_way()  # raises an error for other writers' files before any work is done
    if not sharded:
        _write_one(path, items, metadata or {}, own, taking_the_place)
        return path
    groups = _groups(items, max_shard_bytes or SHARD_BYTES)
    with temporary_folder(path) as folder:
        made = [folder / f"{i}.safetensors" for i in range(len(groups))]
        for file, group in zip(made, groups, strict=True):
            _write_one(file, group, metadata or {}, own)
        with taking_the_place() as old:
            _put(path, made, groups, old)
    return path.with_name(path.name + safetensors.INDEX)


def _put(path: Path, made: Sequence[Path], groups: Sequence[Sequence[Item]], old: Sequence[Path]) -> None:
    """Rename the written shards to their final names, then write the index file for `path`, which lists them only."""
    shards, index = safetensors.shard_paths(path, len(made)), path.with_name(path.name + safetensors.INDEX)
    files = dict(zip(made, (shard.name for shard in shards), strict=True)) | {file: file.name for file in old}
    note_doubtful(made[0].parent, {file: name for file, name in files.items() if file != index}, index)
    placed = []
    try:
        for file, shard in zip(made, shards, strict=True):
            os.replace(file, shard)
            placed.append(shard)
        pairs = zip(shards, groups, strict=True)
        places = {slot.name: shard for shard, group in pairs for item in group for slot in item.slots}
        safetensors.write_index(path, places, sum(map(file_bytes, groups)), made[0].parent)
    except BaseException:
        for shard in placed:  # no index file lists them
            shard.unlink(missing_ok=True)
        raise


def file_bytes(items: Iterable[Item]) -> int:
    """Return the total bytes of all arrays, without headers."""
    return sum(slot.nbytes for item in items for slot in item.slots)


def packed_slots(name: str, fmt: Format, codes, scales, amax) -> tuple[Slot, ...]:
    """Return the slots of a packed tensor's arrays from their shapes; formats without a tensor scale ignore `amax`."""
    shapes = {"codes": ("U8", codes), "scales": ("U8", scales), "amax": ("F32", amax)}
    return tuple(Slot(part, *shapes[part.rpartition(".")[2]]) for part in _parts(name, fmt))


def _parts(name: str, fmt: Format) -> tuple[str, ...]:
    parts = ("codes", "scales", "amax") if fmt.has_tensor_scale else ("codes", "scales")
    return tuple(f"{name}.{part}" for part in parts)


def _groups(items: Sequence[Item], limit: int) -> list[list[Item]]:
    groups, size = [], math.inf
    for item in items:
        size += file_bytes([item])
        if size > limit:
            groups.append([])
            size = file_bytes([item])
        groups[-1].append(item)
    return groups or [[]]


def _write_one(
    path: Path, items: Sequence[Item], metadata: Mapping[str, str], own: bool, around: Around = contextlib.nullcontext
) -> None:
    slots = [slot for item in items for slot in item.slots]
    stated = _metadata_of(items, slots, metadata) if own else lambda sums: dict(metadata)
    with safetensors.safetensors_writer(path, slots, stated, around) as write:
        for item in items:
            item.fill(write)


def _metadata_of(items, slots, metadata) -> Callable[[Mapping[str, str]], dict[str, str]]:
    own = description({name: packed for name, _, packed, _ in items if packed is not None})
    shapes = {slot.name: (slot.dtype, slot.shape) for slot in slots}

    def make(sums):
        fields = dict(metadata) | {META: json.dumps(own | {"crc32": dict(sums)}, separators=(",", ":"))}
        return fields | {_SEAL: _seal(shapes, fields)}

    return make


def description(packed: Mapping[str, Packed]) -> dict[str, Any]:
    """Return the descriptions of packed tensors as JSON values; a format shared by several tensors is listed once."""
    formats: dict[Format, str] = {}
    tensors = {}
    for name, (blocking, shape) in packed.items():
        if blocking.fmt not in formats:  # different records may have the same name
            taken = sum(fmt.name == blocking.fmt.name for fmt in formats)
            formats[blocking.fmt] = f"{blocking.fmt.name}#{taken + 1}" if taken else blocking.fmt.name
        fields = blocking.to_dict() | {"fmt": formats[blocking.fmt], "shape": shape}
        del fields["length"]  # the shape holds it
        tensors[name] = {key: value for key, value in fields.items() if key != "names" or value is not None}
    return {"layout": LAYOUT, "formats": {key: fmt.to_dict() for fmt, key in formats.items()}, "tensors": tensors}


def _seal(shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> str:
    """Return a checksum of the header's contents that does not depend on their order or JSON formatting."""
    arrays = [[name, dtype, list(shape)] for name, (dtype, shape) in sorted(shapes.items())]
    text = json.dumps([arrays, sorted(metadata.items())], separators=(",", ":"))
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def is_whole(leaf: Any) -> bool:
    # An Adapted weight is not stored as a whole: its packed weight and its adapter or basis are separate tensors, which
    # are read with `like`.
    return isinstance(leaf, QTensor | Prepacked) or (is_leaf(leaf) and not isinstance(leaf, Adapted))


def _item(name: str, value: Any) -> Item:
    if isinstance(value, Prepacked):
        raise TypeError(f"{name!r} is arranged for one kernel, and files hold the plain layout: save {name}.unpack()")
    if not isinstance(value, QTensor):
        _check_array(name, value)
        code = safetensors.CODES.get(value.dtype.name)
        if code is None:
            hint = ": save jax.random.key_data of it" if jnp.issubdtype(value.dtype, jax.dtypes.prng_key) else ""
            raise TypeError(f"{name!r} is {value.dtype}, and files hold only {', '.join(safetensors.CODES)}{hint}")
        return Item(name, (Slot(name, code, value.shape),), None, lambda write: write(name, np.asarray(value)))
    q = value
    arrays = {f"{name}.codes": q.codes, f"{name}.scales": q.scales, f"{name}.amax": q.amax}
    for stored, a in arrays.items():
        if a is not None:
            _check_array(stored, a)
    slots = packed_slots(name, q.fmt, q.codes.shape, q.scales.shape, None if q.amax is None else q.amax.shape)
    check_types(name, q)
    packed = Packed(q.blocking, q.shape)
    if q.amax is not None and (fault := amax_fault(np.asarray(q.amax), lambda: q)) is not None:
        raise ValueError(f"{name!r} {fault}")
    q.fmt.to_dict()  # raises for a scale that is a function, before anything is written
    if (fault := _fault_of(packed, *(slot.shape for slot in slots))) is not None:
        raise ValueError(f"{name!r}: {fault}")

    def fill(write):
        for slot in slots:
            write(slot.name, np.asarray(arrays[slot.name]))

    return Item(name, slots, packed, fill)


def amax_fault(amax: np.ndarray, whole: Callable[[], QTensor]) -> str | None:
    """Why no quantizer gives this amax: values would read as NaN, with another sign or as zero; None if one does.

    `whole`, the tensor, is asked for if there is a zero among them.
    """
    sound = (amax >= 0) & (amax < np.inf)
    if not sound.all():
        return f"has amax {amax[~sound].flat[0]}, and needs one that is finite and not negative"
    if amax.all() or not np.any((q := whole()).scales):
        return None
    values = np.asarray(q.replaced(amax=np.float32(amax == 0)).dequantize(np.float32))
    lost = np.any(np.nan_to_num(values) != 0)
    return "has amax 0, by which values read as 0 whose codes and scales are not" if lost else None


def check_types(name: str, q: QTensor) -> None:
    """Raise an error if dtypes or shapes of q's arrays were changed, so that their bytes would mean other values.

    Raises:
        TypeError, ValueError: as `check_arrays`; the message contains `name`.
    """
    try:
        check_arrays(q)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name!r}: {error}") from None


def _check_array(name: str, value: Any) -> None:
    if isinstance(value, Tracer) or not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name!r} must be an array to be saved, got {type(value).__name__}")
    if not getattr(value, "is_fully_addressable", True):
        raise ValueError(f"{name!r} is spread over several hosts: save such trees by ifjax.checkpoint.save_orbax")


def _check_names(names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        if not name:
            raise ValueError("params must be a tree whose leaves have names, such as {'w': q}, got a single leaf")
        if name in seen:
            raise ValueError(f"two leaves of the tree are named {name!r}: names are paths joined by '/'")
        seen.add(name)
    for name in seen:
        at = [i for i, letter in enumerate(name) if letter == "/"]
        clash = next((name[:i] for i in at if name[:i] in seen), None)
        if clash is not None:
            raise ValueError(f"{clash!r} is a leaf of the tree, and {name!r} lies within it: rename one")


def _check_shard(index: Path, contents: Contents, weight_map: Mapping[str, str]) -> None:
    mapped = {name for name, file in weight_map.items() if file == contents.path.name}
    found = set(contents.entries)
    for names, what in ((mapped - found, "lacks"), (found - mapped, "also holds")):
        if names:
            listed = ", ".join(map(repr, sorted(names)[:3])) + (", ..." if len(names) > 3 else "")
            raise FileError(f"{index} and its file {contents.path.name} do not agree: the file {what} {listed}")


def _read_metadata(contents: Contents) -> tuple[int | None, dict[str, Packed], dict[str, int]]:
    """Return the checked layout, packed tensors and checksums of a file; None, {}, {} for files of other writers."""
    path, entries, metadata, _ = contents
    if META not in metadata and _SEAL not in metadata:
        return None, {}, {}

    def fault(text):
        return FileError(f"{path}: its header is damaged: {text}. Take another copy of the file")

    if META not in metadata or _SEAL not in metadata:
        raise fault(f"of the metadata {META!r} and {_SEAL!r} one is missing")
    fields = {key: value for key, value in metadata.items() if key != _SEAL}
    seal = _seal({name: (entry.dtype, entry.shape) for name, entry in entries.items()}, fields)
    if seal != metadata[_SEAL]:
        raise fault(f"its checksum is {seal}, and it was written with {metadata[_SEAL]}")
    try:
        own = json.loads(metadata[META])
        packed = described(own, str(path))
        sums = {str(name): int(digits, 16) for name, digits in own["crc32"].items()}
    except FileError:
        raise
    except MALFORMED as error:
        raise fault(f"the metadata {META!r} are of no known layout: {error!r}") from None
    if set(sums) != set(entries):
        raise fault("arrays and checksums are not of the same names")
    for name, p in packed.items():
        parts = [entries.get(part) for part in _parts(name, p.fmt)]
        dtypes = [None if part is None else part.dtype for part in parts]
        if name in entries or dtypes != ["U8", "U8", "F32"][: len(parts)]:
            raise fault(f"{name!r} needs arrays {', '.join(_parts(name, p.fmt))} of U8, U8 and F32, got {dtypes}")
        if (text := _fault_of(p, *(part.shape for part in parts if part is not None))) is not None:
            raise fault(f"{name!r}: {text}")
    return own["layout"], packed, sums


MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)


def described(description: Any, source: str) -> dict[str, Packed]:
    """Invert `description`.

    Raises:
        MALFORMED: `description` is not a result of that function.
        FileError: the layout is newer.
    """
    layout = description["layout"]
    if layout not in (1, LAYOUT):
        raise FileError(f"{source} is of layout {layout!r}, and this ifjax reads 1 to {LAYOUT}: install what wrote it")
    formats = {key: Format.from_dict(record) for key, record in description["formats"].items()}
    return {name: _packed_of(fields, formats) for name, fields in description["tensors"].items()}


def _packed_of(fields: Mapping[str, Any], formats: Mapping[str, Format]) -> Packed:
    shape = tuple(fields["shape"])
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise ValueError(f"the shape must be of integers, got {shape}")
    axis, headroom, dtype, block_2d = (fields[key] for key in ("axis", "headroom", "dtype", "block_2d"))
    if not isinstance(axis, int) or not -len(shape) <= axis < 0:
        raise ValueError(f"the axis must be negative and one of {shape}, got {axis!r}")
    if not isinstance(headroom, float | int) or not 0 < headroom <= 1:
        raise ValueError(f"the headroom must be a number in (0, 1], got {headroom!r}")
    if dtype not in DTYPES or not isinstance(block_2d, bool):
        raise ValueError(f"dtype must be one of {DTYPES}, block_2d true or false, got {dtype!r} and {block_2d!r}")
    if block_2d and axis < -2:
        raise ValueError(f"blocks of two dimensions lie in the last two axes, got axis {axis}")
    names = fields.get("names")
    names = None if names is None else tuple(tuple(n) if isinstance(n, list) else n for n in names)
    fmt = formats[fields["fmt"]]
    blocking = Blocking(fmt, axis, shape[axis], jnp.dtype(dtype), float(headroom), block_2d, names)
    hash(blocking)  # raises TypeError if a field holds a list or another unhashable value
    return Packed(blocking, shape)


def _fault_of(p: Packed, codes, scales, amax=()) -> str | None:
    """Return the reason why arrays of these shapes cannot form the packed tensor; None if they can."""
    axis = p.blocking.axis
    wanted = packed_shapes(p.shape, p.fmt, axis)
    for what, shape, needed in zip(("codes", "scales"), (codes, scales), wanted, strict=True):
        if tuple(shape) != needed:
            return f"{what} of {p.shape} in {p.fmt.name} along axis {axis} are {needed}, got {tuple(shape)}"
    if not p.fmt.has_tensor_scale:
        return None
    fits = len(amax) <= len(p.shape) and all(a in (1, n) for a, n in zip(amax, p.shape, strict=False))
    return None if fits else f"amax of {p.shape} keeps leading axes or has 1 in their place, got {tuple(amax)}"
