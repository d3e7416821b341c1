"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, follow: bool = True) -> Iterator[Any]:
    """A new binary file, unbuffered, that takes the place of `path` once the block has ended without an error.

    Until then it has a name of its own in the same folder, `.NAME.*.tmp`, and is removed if anything goes wrong. Data
    and folder are synced, so that a crash leaves the old file or the new one. A link stays one, and its target is
    replaced, unless `follow` is false.

    Raises:
        OSError: it cannot be written, or `path` is no file.
    """
    path = Path(os.path.realpath(path) if follow else path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "is not a folder: create it first", str(path.parent))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no plain file, and only those are replaced", str(path))
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    # Closed before it is renamed.
    file = open(temporary, "x+b", buffering=0)  # noqa: SIM115
    try:
        with file:
            yield file
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


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
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
