"""Atomic writes of files and folders, and locks of folders."""

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
    """Yield a new unbuffered binary file that replaces `path` when the block ends without an error.

    Until then the file has a temporary name in the same folder, `.NAME.*.tmp`. On an error it is removed. File and
    folder are synced, so that a crash leaves the old file or the new one. If `path` is a link, its target is replaced,
    or the link itself if `follow` is false.

    Args:
        path: the file to replace or create.
        follow: whether to follow links.
        around: returns a context manager that is entered before the file is renamed and left afterwards, while no other
            writer changes the folder.

    Raises:
        OSError: the file cannot be written, or `path` is not a regular file.
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
    """Create a temporary file or folder beside `path` and remove it when the block ends, unless it was renamed.

    It is locked until then. Temporary files for the same `path` that are not locked belong to writers that died, and
    are removed first.
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
        held.add(real)  # if it is a folder, writes in it by this thread do not lock it again
    try:
        yield name
    finally:
        held.discard(real)
        _remove(name)
        if guard is not None:
            os.close(guard)


_DOUBTFUL = "doubtful.json"


def note_doubtful(folder: Path, files: Mapping[Path, str], index: Path) -> None:
    """Record in a temporary folder which files are useless unless the index file beside the folder lists them.

    If this process dies, the next writer of the same name removes the files that the index file does not list.

    Args:
        folder: a folder created by `temporary_folder`.
        files: the files' present paths, and their present or future names beside the folder.
        index: the path of the index file, a text file that lists file names as JSON strings.
    """
    known = {name: file.stat().st_ino for file, name in files.items()}
    write_text(folder / _DOUBTFUL, json.dumps({"index": index.name, "files": known}))


def _remove_doubtful(left: Path) -> None:
    try:
        note = json.loads((left / _DOUBTFUL).read_text())
        index, files = left.with_name(note["index"]), [(left.with_name(n), i) for n, i in note["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # most temporary folders have no such record
        return
    named = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    for file, inode in files:
        # If another writer has created another file of this name meanwhile, its inode differs and it is kept.
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
    """Return the paths that this thread has locked."""
    return _HELD.__dict__.setdefault("paths", set())


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep other writers of this library, in any process, from changing the folder's files within the block.

    The folder itself is locked; no lock file is created. Yields False if the file system has no locks.
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
    """Lock a file or folder and return the descriptor that holds the lock; None if it is taken or not supported."""
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
    """Sync a folder, so that renames in it survive a crash."""
    if os.name != "posix":  # other systems cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike, text: str, *, follow: bool = True) -> None:
    """Write a text file atomically, in UTF-8."""
    with replacing(path, follow=follow) as file:
        write_all(file, text.encode())


def write_all(file: Any, data: Any) -> None:
    """Write a whole buffer to an unbuffered file."""
    view = memoryview(data)
    while len(view):  # a write to a nearly full disk may be partial before the next one fails
        view = view[file.write(view) :]


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a new folder with a temporary name that is renamed to `path` when the block ends without an error.

    Raises:
        FileExistsError: `path` is a folder that is not empty.
        OSError: the folder cannot be created or renamed.
    """
    path = Path(os.path.realpath(path))
    if path.is_dir() and any(path.iterdir()):
        raise FileExistsError(errno.EEXIST, "holds something already: name a new folder", str(path))
    with temporary_folder(path) as name:
        yield name
        os.replace(name, path)
    sync_folder(path.parent)


def temporary_folder(path: Path) -> contextlib.AbstractContextManager[Path]:
    """Create a folder `.NAME.*.tmp` beside `path` and remove it when the block ends, unless it was renamed."""
    return _temporary(path, Path.mkdir)
