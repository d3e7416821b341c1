"""Files as commands take them: options' values, stdin and stdout, targets that may be written."""

import argparse
import contextlib
import errno
import math
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ifjax.cli.terminal import Misused
from ifjax.convert.folders import is_file
from ifjax.files import FileError, safetensors
from ifjax.formats import get_format

IN_HELP = "a safetensors file, an index (*.index.json), a folder with one checkpoint, or - for stdin"
OUT_HELP = "the file to write, *.safetensors, or - for stdout; *.safetensors.index.json for several files"
FOLDER_HELP = ". Else a folder, new or empty, for weights and all that IN's folder has besides"


def format_name(text: str) -> str:
    """Return a format's name if there is such a format."""
    try:
        return get_format(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def bytes_of(text: str) -> int:
    """Return the number of bytes that a size such as 5GB stands for."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) *([kMGT]?)B?", text)
    size = int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")) if match else 0
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text[:40]!r}")
    return size


def decibels_of(text: str) -> float:
    """Return a finite number of decibels."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number of decibels, such as 18.5, got {text[:40]!r}")
    return value


def check_report(path: Path | None) -> None:
    """Raise an OSError now, rather than after the work, if no report can be written there."""
    if path is None:
        return
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "is not a folder: create it first", str(path.parent))
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


@contextlib.contextmanager
def input_file(path: Path) -> Iterator[Path]:
    """The path itself, or that of a file that holds what stdin gave."""
    if str(path) != "-":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stdin.safetensors"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
        yield copy


@contextlib.contextmanager
def files_of(options: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Where to read and to write. What comes by pipes goes through files of a temporary folder."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(ended_by_signal())
        source, target = stack.enter_context(input_file(options.source)), options.target
        to_stdout = str(target) == "-"
        if to_stdout:
            if sys.stdout.isatty():
                raise Misused("OUT is -, and stdout is a terminal: name a file, or pipe it into one")
            if options.shard_size is not None:
                raise Misused("OUT is -, which is one file: leave out --shard-size")
            target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "out.safetensors"
        elif not getattr(options, "dry_run", False):
            check_target(source, target, options.force)
        yield source, target
        if to_stdout and not getattr(options, "dry_run", False):
            sys.stdout.flush()
            with target.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, 2**20)


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise if nothing may be written there: a file exists, a folder holds something, or it is the source.

    Raises:
        FileError: the message says what to do.
    """
    if not is_file(target):
        if target.is_dir() and any(target.iterdir()):
            raise FileError(f"{target} holds something already: name a new folder")
        if target.exists() and not target.is_dir():
            raise FileError(f"{target} is a file: name a new folder, or a file that ends in .safetensors")
        return
    index = target if target.suffix == ".json" else target.with_name(target.name + ".index.json")
    plain = target.with_name(target.name.removesuffix(".index.json"))
    for path in (plain, index):
        if not os.path.lexists(path):
            continue
        if any(os.path.exists(f) and os.path.samefile(path, f) for f in _sources(source)):
            raise FileError(f"{path} is IN: name another file for OUT")
        if not force:
            raise FileError(f"{path} exists already: name another file, or replace it by --force")


def _sources(source: Path) -> list[Path]:
    if source.suffix == ".gguf":
        return [source]
    try:
        index, files, _ = safetensors.resolve(source)
    except FileError:  # a folder of a GGUF file
        return list(source.glob("*.gguf"))
    return files if index is None else [index, *files]


@contextlib.contextmanager
def ended_by_signal() -> Iterator[None]:
    """A polite request to end leaves no temporary files behind."""

    def leave(number, frame):
        del frame
        sys.exit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread, which alone has handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
