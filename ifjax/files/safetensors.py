"""A streaming writer and a validating reader of safetensors files, and checkpoints of several shards.

A safetensors file holds a length (8 bytes), a header (JSON with each array's offsets, and text metadata) and the
arrays' bytes. The writer knows the header in advance, except for checksums of a fixed width. So arrays can be written
in parts and in any order, and none has to be in memory as a whole.
"""

import contextlib
import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ifjax.atomic import Around, replacing, sync_folder, write_all, write_text

# The names of numpy and ml_dtypes dtypes in safetensors files.
CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip
NAMES = {code: name for name, code in CODES.items()}

INDEX = ".index.json"
SEAL = "ifjax.checksum"  # in the metadata of every checkpoint file that this library writes
_HEADER_LIMIT = 100_000_000  # bytes; safetensors reads no longer header, and the limit applies to index files here too
_TRIES = 20  # the number of tries to read a header while the file is replaced

Write = Callable[[str, Any], None]


class FileError(ValueError):
    """Raised if a file is broken or contains nothing to measure; the message states the file and the reason."""


class StoredTensor(NamedTuple):
    """A tensor in a file: `dtype` is its name in safetensors files, `start` the offset of its first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def natural_order(name: str) -> list[tuple[bool, int, str]]:
    """Return a sort key of a name that orders numbers by value: layer 2 before layer 10."""
    parts = [part for part in re.split(r"(\d+)", name) if part]
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def numpy_dtype(code: str) -> np.dtype | None:
    """Return the dtype with this name in safetensors files; None if numpy and ml_dtypes lack it."""
    name = NAMES.get(code)
    return None if name is None else np.dtype(getattr(ml_dtypes, name, None) or name)


def as_bytes(a: np.ndarray) -> np.ndarray:
    """Return the bytes of a as uint8 [nbytes], in C order and little-endian, as in files.

    Python's buffer protocol supports neither bfloat16 nor empty arrays.
    """
    a = a if a.dtype.byteorder in "|=<" and a.dtype.isnative else a.astype(a.dtype.newbyteorder("<"))
    return np.ascontiguousarray(a).reshape(-1).view(np.uint8)


class Slot(NamedTuple):
    """An array of a file to be written: `dtype` is its name in safetensors files."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the whole array."""
        dtype = numpy_dtype(self.dtype)
        assert dtype is not None
        return math.prod(self.shape) * dtype.itemsize


class Foreign(NamedTuple):
    """A slot whose dtype numpy lacks; its bytes are only copied."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@contextlib.contextmanager
def safetensors_writer(
    path: str | os.PathLike,
    slots: Sequence[Slot | Foreign],
    metadata: Callable[[Mapping[str, str]], dict[str, str]],
    around: Around = contextlib.nullcontext,
) -> Iterator[Write]:
    """Yield a function that writes (name, bytes), each slot's bytes in order; the file appears when the block ends.

    Slots with wider elements are stored first, so that all are aligned. Otherwise the order of `slots` is kept.

    Args:
        path: the file to write.
        slots: the arrays of the file.
        metadata: returns the file's metadata from checksums by name, of eight hexadecimal digits each. It is first
            called with zeros; the length of its result must not depend on the digits.
        around: as for `ifjax.atomic.replacing`.

    Raises:
        ValueError: names are not unique, or safetensors cannot hold a name or the header.
        OSError: the file cannot be written. A lack of disk space is found at the start.
    """
    slots = sorted(slots, key=lambda slot: -_item_bytes(slot))
    sums = {slot.name: 0 for slot in slots}
    if len(sums) < len(slots):
        names = [slot.name for slot in slots]
        raise ValueError(f"names must be unique, and these are not: {sorted({n for n in names if names.count(n) > 1})}")
    start = len(_header(slots, metadata(_digits(sums))))
    ends = np.cumsum([start, *[slot.nbytes for slot in slots]]).tolist()
    at = {slot.name: first for slot, first in zip(slots, ends, strict=False)}
    last = {slot.name: end for slot, end in zip(slots, ends[1:], strict=True)}

    with replacing(path, around=around) as file:
        _reserve(file, ends[-1])

        def write(name, data):
            data = as_bytes(np.asarray(data))
            if at[name] + data.size > last[name]:
                raise RuntimeError(f"{name} got more bytes than its shape holds")
            file.seek(at[name])
            write_all(file, data)
            sums[name] = zlib.crc32(data.data, sums[name])
            at[name] += data.size

        yield write
        missing = [name for name in at if at[name] != last[name]]
        if missing:
            raise RuntimeError(f"{missing} were not written whole")
        file.seek(0)
        header = _header(slots, metadata(_digits(sums)))
        assert len(header) == start
        write_all(file, header)


def _item_bytes(slot):
    count = math.prod(slot.shape)
    return slot.nbytes // count if count else 1


def _digits(sums: Mapping[str, int]) -> dict[str, str]:
    return {name: f"{value:08x}" for name, value in sums.items()}


def _header(slots, metadata) -> bytes:
    """Return the header: its length and its JSON, padded with spaces to a multiple of 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    start = 0
    for slot in slots:
        if slot.name == "__metadata__":
            raise ValueError("'__metadata__' is no name for an array in a safetensors file: rename it")
        end = start + slot.nbytes
        fields[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [start, end]}
        start = end
    try:
        text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"names and metadata must be text that UTF-8 can hold: {error}") from None
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_LIMIT:
        raise ValueError(
            f"the header would take {len(text)} bytes, and safetensors allows {_HEADER_LIMIT}: write several files"
        )
    return len(text).to_bytes(8, "little") + text


def _reserve(file, size: int) -> None:
    """Reserve disk space for the whole file, so that a full disk raises an error before any work is done."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                reason = f"{os.strerror(error.errno or 0)} ({size} bytes are needed)"
                raise OSError(error.errno, reason, os.fspath(file.name)) from None
    file.truncate(size)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_header(path: str | os.PathLike) -> tuple[StoredTensor, ...]:
    """Return the tensors of a safetensors file, sorted by name with numbers by value; reads the header only.

    Raises:
        FileError: the file is not a complete safetensors file.
        OSError: the file cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            with safe_open(path, framework="numpy"):  # checks lengths and offsets, and that they cover the file
                header = json.loads(file.read(length))
        except SafetensorError as error:
            raise FileError(f"{path} is not a whole safetensors file: {error}") from error
    header.pop("__metadata__", None)
    entries = []
    for name, tensor in header.items():
        start, end = tensor["data_offsets"]
        entries.append(StoredTensor(name, tensor["dtype"], tuple(tensor["shape"]), 8 + length + start, end - start))
    return tuple(sorted(entries, key=lambda entry: natural_order(entry.name)))


class Identity(NamedTuple):
    """The identity of a file's version: another file, or another version of the file, has another identity."""

    device: int
    inode: int
    size: int
    time_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> "Identity":
        """Return the identity of a file from the result of `os.stat` or `os.fstat`."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class Contents(NamedTuple):
    """The header of a safetensors file, and the identity of the file from which it was read."""

    path: Path
    entries: dict[str, StoredTensor]
    metadata: dict[str, str]
    identity: Identity


def check_identity(file: Any, path: Path, identity: Identity | None) -> None:
    """Raise a FileError if an open file is not the file whose header was read."""
    if identity is not None and Identity.of(os.fstat(file.fileno())) != identity:
        raise FileError(f"{path} has been changed since it was opened: open it again")


def check_written(path: Path, identity: Identity) -> None:
    """Raise a FileError if a mapped file was modified in place; it may be replaced or deleted, which is harmless."""
    with contextlib.suppress(FileNotFoundError):
        now = Identity.of(path.stat())
        if (now.device, now.inode) == (identity.device, identity.inode) and now != identity:
            raise FileError(f"{path} has been changed since it was opened: open it again")


def read_contents(path: str | os.PathLike) -> Contents:
    """Return the stored tensors and metadata of a safetensors file; reads the header only.

    Raises:
        FileError: the file is not a complete safetensors file, or is replaced repeatedly meanwhile.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    # A writer may replace the file between the reads of its header. The identities before and after then differ, and
    # the header is read again.
    for _ in range(_TRIES):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            raise FileError(f"{path} is no plain file: only those can be read")
        entries, metadata, fault = {}, {}, None
        try:
            entries, metadata = _header_of(path)
        except FileError as error:
            fault = error
        if Identity.of(path.stat()) != Identity.of(status):
            continue
        if fault is not None:
            raise fault
        return Contents(path, entries, metadata, Identity.of(status))
    raise FileError(f"{path} was replaced again and again while its header was read: open it again")


def _header_of(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    from safetensors import safe_open

    try:
        entries = {entry.name: entry for entry in read_header(path)}
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
    except FileError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise FileError(f"{path} is not a whole safetensors file: {error}") from error
    return entries, metadata


def resolve(path: str | os.PathLike) -> tuple[Path | None, list[Path], dict[str, str]]:
    """Return (index file, files, file name by array name) of a checkpoint; (None, [file], {}) without an index file.

    `path` is a safetensors file, an index file (`*.index.json`), the single file that an index file replaces, or a
    folder that contains one checkpoint.

    Raises:
        FileError: the index file is broken, or the folder contains no checkpoint or several.
        OSError: the index file cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if path.suffix == ".json":
        weight_map = read_index(path)
        return path, [path.parent / name for name in dict.fromkeys(weight_map.values())], weight_map
    index = path.with_name(path.name + INDEX)
    if not path.exists() and index.exists():
        return resolve(index)
    return None, [path], {}


def is_of_several(path: str | os.PathLike) -> bool:
    """Return whether the checkpoint's files are found through an index file or a folder, not `path` alone."""
    path = Path(path)
    return path.suffix == ".json" or not path.is_file()


def _in_folder(folder: Path) -> Path:
    """Return the path of the only checkpoint in a folder.

    An index file stands for its shards. If a checkpoint has the standard name, other writers' files are ignored.
    """
    found = {path.name: path for path in sorted(folder.glob("*.safetensors"))}
    indices = {path.name: path for path in sorted(folder.glob("*.safetensors" + INDEX))}
    listed: set[str] = set()
    for index in indices.values():
        with contextlib.suppress(FileError):  # if it is the checkpoint, reading it raises the error
            listed |= set(read_index(index).values())
    whole = [path for name, path in found.items() if name not in listed]
    parts = [path for path in whole if re.search(r"-\d{5,}-of-(?!0*1\.)\d{5,}\.safetensors$", path.name)]
    candidates = [*indices.values(), *(path for path in whole if path not in parts)]
    if not candidates and parts:
        raise FileError(
            f"{folder} holds parts of a checkpoint, such as {parts[0].name}, and no index of them: name a file, or "
            "bring the index"
        )
    if not candidates:
        raise FileError(f"{folder} holds no safetensors file: name the file")
    standard = [path for path in candidates if path.name in ("model.safetensors", "model.safetensors" + INDEX)]
    # Other tools keep unrelated files next to the standard name. A file of ifjax is a second checkpoint.
    others = [path for path in candidates if path not in standard and (not standard or _is_own(path))]
    if len(standard) + len(others) > 1:
        names = [path.name for path in (*standard, *others)]
        raise FileError(
            f"{folder} holds {len(names)} checkpoints ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): "
            "name one of them, or remove the others"
        )
    return (standard or others)[0]


def _is_own(path: Path) -> bool:
    """Return whether this library wrote a file, or the first shard of an index file."""
    try:
        file = path.with_name(next(iter(read_index(path).values()))) if path.name.endswith(INDEX) else path
        return SEAL in read_contents(file).metadata
    except (FileError, OSError):
        return False


def read_index(path: Path) -> dict[str, str]:
    """Return an index file's file names, by array name; all are plain names in the index file's folder.

    Raises:
        FileError: the index file is broken.
        OSError: the index file cannot be read.
    """
    if path.stat().st_size > _HEADER_LIMIT:
        raise FileError(f"{path} is too long for an index: {path.stat().st_size} bytes")
    try:
        index = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} is not JSON: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f'{path} is no index of safetensors files: it has no "weight_map" of names to files')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise FileError(
                f"{path} says that {name!r} is in {file!r}: an index names files of its own folder, such as "
                "'model-00001-of-00002.safetensors', without a path"
            )
    return weight_map


def _is_plain_name(name: str) -> bool:
    return re.fullmatch(r"[^/\\:\0]+\.safetensors", name) is not None and name.isprintable()


class Reader:
    """A reader of one stored array that does not map the file, so that read pages do not count as used memory."""

    def __init__(self, path: Path, entry: StoredTensor, identity: Identity | None = None):
        """Open the file; raise a FileError if `identity` is given and the file's identity differs."""
        self.path, self.entry = path, entry
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            check_identity(self._file, path, identity)
        except FileError:
            self._file.close()
            raise

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error) -> None:
        self._file.close()

    def values(self, start: int, count: int) -> np.ndarray:
        """Return a copy of elements [start, start + count) of the flattened array, in its dtype."""
        dtype = numpy_dtype(self.entry.dtype)
        assert dtype is not None
        return self.bytes(start * dtype.itemsize, count * dtype.itemsize).view(dtype)

    def bytes(self, start: int, count: int) -> np.ndarray:
        """Return `count` bytes of the array from byte `start` on, as uint8."""
        data = np.empty(count, np.uint8)
        self._file.seek(self.entry.start + start)
        done = 0
        while done < count:
            got = self._file.readinto(data.data[done:])
            if not got:
                raise FileError(f"{self.path} ends within {self.entry.name!r}: it has been changed since it was opened")
            done += got
        return data

    def chunks(self, size: int = 2**22) -> Iterator[np.ndarray]:
        """Yield all bytes of the array, `size` at a time."""
        for start in range(0, self.entry.nbytes, size):
            yield self.bytes(start, min(size, self.entry.nbytes - start))


# --- shards ----------------------------------------------------------------------------------------------------------


def shard_paths(path: Path, count: int) -> list[Path]:
    """Return unused names for a checkpoint's shards, so that an old checkpoint stays intact while they are written."""
    stem = path.name.removesuffix(".safetensors")
    for mark in ("", f"-{secrets.token_hex(4)}"):
        paths = [path.with_name(f"{stem}{mark}-{i + 1:05}-of-{count:05}.safetensors") for i in range(count)]
        if not any(os.path.lexists(p) for p in paths):
            break
    return paths


def replaced_by_file(path: Path) -> list[Path]:
    """Return the shards and index file of an older checkpoint that a single file at `path` replaces.

    All were written by this library. The list is empty if there is no index file. Pass it to `remove` after the new
    file is in place.

    Raises:
        FileExistsError: the index file is broken or of another writer, so that it must not be removed.
    """
    index = path.with_name(path.name + INDEX)
    if not os.path.lexists(index):
        return []
    try:
        return [*_own_shards(index), index]  # the index comes last, so that an interrupted removal can be resumed
    except FileError as error:
        raise FileExistsError(
            errno.EEXIST, f"would stand beside another checkpoint, whose index is broken ({error}): remove the index",
            str(path),
        ) from None  # fmt: skip


def replaced_by_index(path: Path, *, named: bool) -> list[Path]:
    """Return the files of an older checkpoint that an index file for `path` replaces: its shards, and `path` itself.

    Args:
        path: the path of a single-file checkpoint.
        named: whether the caller asked for `path`. If it asked for the index file, a file at `path` must not be
            removed.

    Raises:
        FileExistsError: a file at `path` must not be removed, or the shards are of another writer.
    """
    index = path.with_name(path.name + INDEX)
    if path.is_file() and not named:
        raise FileExistsError(
            errno.EEXIST, f"is a checkpoint of its own, and {index.name} would be a second one beside it: remove it, "
            f"or save to {path.name} to replace it", str(path),
        )  # fmt: skip
    old = []
    if os.path.lexists(index):
        with contextlib.suppress(FileError):  # a broken index lists no shards and is itself replaced
            old = _own_shards(index)
    return old + [path] * path.is_file()


def remove(files: Iterable[Path]) -> None:
    """Remove files that are no longer referenced, in this order."""
    folders = {file.parent for file in files}
    for file in files:
        file.unlink(missing_ok=True)
    for folder in folders:
        sync_folder(folder)


def _own_shards(index: Path) -> list[Path]:
    """Return the existing shards of an index file, after checking by names and metadata that this library wrote them.

    Raises:
        FileExistsError: another writer wrote a shard.
    """
    stem = re.escape(index.name.removesuffix(".safetensors" + INDEX))
    shards = [index.with_name(name) for name in dict.fromkeys(read_index(index).values())]
    shards = [shard for shard in shards if os.path.lexists(shard)]
    for shard in shards:
        own = re.fullmatch(rf"{stem}(-[0-9a-f]{{8}})?-\d{{5,}}-of-\d{{5,}}\.safetensors", shard.name) is not None
        if own:
            try:
                own = SEAL in read_contents(shard).metadata
            except (FileError, OSError):
                own = False
        if not own:
            raise FileExistsError(
                errno.EEXIST, f"lists {shard.name}, which ifjax has not written: save to another name, or remove that "
                "checkpoint first", str(index),
            )  # fmt: skip
    return shards


def write_index(path: Path, shards: Mapping[str, Path], total: int, folder: Path) -> None:
    """Write the index file for `path` atomically; from then on readers find the new checkpoint.

    Args:
        path: the path of the single file that the index file replaces.
        shards: the shard of each array, by the array's name.
        total: the total bytes of all arrays.
        folder: a temporary folder on the same file system, in which the index file is first written.
    """
    index, made = path.with_name(path.name + INDEX), folder / "index"
    weight_map = {name: file.name for name, file in shards.items()}
    fields = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_text(made, json.dumps(fields, indent=1, ensure_ascii=False) + "\n")
    if index.is_file():
        shutil.copymode(index, made)
    os.replace(made, index)  # a link is replaced, not followed, because the shards are in this folder
    sync_folder(path.parent)
