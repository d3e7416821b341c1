"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import glob
import json
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


Around = Callable[[], contextlib.AbstractContextManager[Any]]


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, *, follow: bool = True, around: Around = contextlib.nullcontext
) -> Iterator[Any]:
    """A new binary file, unbuffered, that takes the place of `path` once the block has ended without an error.

    Until then it has a name of its own in the same folder, `.NAME.*.tmp`, and is removed if anything goes wrong. Data
    and folder are synced, so that a crash leaves the old file or the new one. A link stays one, and its target is
    replaced, unless `follow` is false.

    Args:
        around: what belongs to the change: entered before the file is put in its place, left after it, while no other
            writer changes the folder.

    Raises:
        OSError: it cannot be written, or `path` is no file.
    """
    path = Path(os.path.realpath(path) if follow else path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "is not a folder: create it first", str(path.parent))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no plain file, and only those are replaced", str(path))
    with _temporary(path, _make_file) as name:
        with open(name, "r+b", buffering=0) as file:  # closed before it is renamed
            yield file
            os.fsync(file.fileno())
        with locked(path.parent), around():
            if path.exists():
                shutil.copymode(path, name)
            os.replace(name, path)
    sync_folder(path.parent)


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))


@contextlib.contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Make a file or folder beside `path`, which is gone when the block has ended, unless it was renamed.

    It is locked until then: those of the same name that nobody locks are of writers that died, and are removed.
    """
    name = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    with locked(path.parent) as alone:
        if alone:
            for left in path.parent.glob(f".{glob.escape(path.name[:80])}.{'[0-9a-f]' * 8}.tmp"):
                if (guard := _lock(left, wait=False)) is not None:
                    _remove_doubtful(left)
                    _remove(left)
                    os.close(guard)
        make(name)
        guard = _lock(name, wait=False)
    held, real = _held(), Path(os.path.realpath(name))
    if guard is not None:
        held.add(real)  # of a folder: what is written in it need not lock it again
    try:
        yield name
    finally:
        held.discard(real)
        _remove(name)
        if guard is not None:
            os.close(guard)


_DOUBTFUL = "doubtful.json"


def note_doubtful(folder: Path, files: Mapping[Path, str], index: Path) -> None:
    """Note in a temporary folder which files are of no use unless the index beside it names them.

    Should this process die, the next writer of the name removes those that the index does not name.

    Args:
        folder: as `temporary_folder` makes it.
        files: where they are now, and their names beside the folder, now or soon.
        index: a text that names files, as JSON strings.
    """
    known = {name: file.stat().st_ino for file, name in files.items()}
    write_text(folder / _DOUBTFUL, json.dumps({"index": index.name, "files": known}))


def _remove_doubtful(left: Path) -> None:
    try:
        note = json.loads((left / _DOUBTFUL).read_text())
        index, files = left.with_name(note["index"]), [(left.with_name(n), i) for n, i in note["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # most have none
        return
    named = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    for file, inode in files:
        # Under a name of which somebody else has made another file meanwhile, that one stays.
        if json.dumps(file.name, ensure_ascii=False) not in named and file.is_file() and file.stat().st_ino == inode:
            file.unlink()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# --- locks -----------------------------------------------------------------------------------------------------------

_HELD = threading.local()


def _held() -> set[Path]:
    """What this thread has locked."""
    return _HELD.__dict__.setdefault("paths", set())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Let no other writer of this library, of any process, change the folder's files within the block.

    It is the folder that is locked: no file is made for it. False where file systems have no locks.
    """
    folder = Path(os.path.realpath(folder))
    held = _held()
    if folder in held:
        yield True
        return
    guard = _lock(folder, wait=True)
    if guard is None:
        yield False
        return
    held.add(folder)
    try:
        yield True
    finally:
        held.discard(folder)
        os.close(guard)


def _lock(path: Path, *, wait: bool) -> int | None:
    """The descriptor that holds a lock on a file or folder; None if somebody else has it, or there are none."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def sync_folder(folder: Path) -> None:
    """Make renames in it last through a crash."""
    if os.name != "posix":  # elsewhere folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str, *, follow: bool = True) -> None:
    """The file appears whole or stays as it was."""
    with replacing(path, follow=follow) as file:
        write_all(file, text.encode())


def write_all(file: Any, data: Any) -> None:
    """Write all of a buffer to an unbuffered file."""
    view = memoryview(data)
    while len(view):  # a full disk takes a part before it refuses the rest
        view = view[file.write(view) :]


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Make a folder under another name beside `path`, which becomes `path` once the block has ended without an error.

    Raises:
        FileExistsError: there is something at `path` that is no empty folder.
        OSError: it cannot be made.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(errno.EEXIST, "holds something already: name a new folder", str(path))
    with temporary_folder(path) as name:
        yield name
        os.replace(name, path)
    sync_folder(path.parent)


def temporary_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    """A folder beside `path`, `.NAME.*.tmp`, that is gone when the block has ended, unless it was renamed."""
    return _temporary(path, Path.mkdir)
