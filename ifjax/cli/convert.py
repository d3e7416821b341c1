"""ifjax quantize and ifjax dequantize."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from ifjax import convert
from ifjax.arrays import DTYPES
from ifjax.atomic import write_text
from ifjax.cli.terminal import (
    Misused,
    add_command,
    add_json,
    add_search,
    as_file_error,
    input_file,
    progress_bar,
    size_of,
    terminal_console,
    ticks,
)
from ifjax.files import FileError, checkpoint, safetensors
from ifjax.formats import get_format
from ifjax.models.rule_files import load_rules
from ifjax.models.rules import default_rules
from ifjax.version import __version__

IN_HELP = "a safetensors file, an index (*.index.json), a folder with one checkpoint, or - for stdin"


_OUT = "the file to write, *.safetensors, or - for stdout; *.safetensors.index.json for several files"


def add_quantize(commands) -> None:
    parser = add_command(
        commands, "quantize", _quantize, "write a packed copy of a checkpoint",
        "Write a packed copy of a safetensors checkpoint, one tensor after the other and each in pieces: memory\n"
        "does not grow with the file. Biases, norms and other vectors stay as they are, and so do embeddings and\n"
        "output heads unless --embeddings or --rules say otherwise. OUT appears whole or not at all.",
        "ifjax quantize model.safetensors packed.safetensors",
        "ifjax quantize model.safetensors packed.safetensors --fmt if6 --embeddings --dry-run",
        "ifjax quantize llama/ packed.safetensors --rules rules.yaml --dtype bfloat16 --json > report.json",
        "ifjax quantize flax.safetensors packed.safetensors --axis -2 --search fast",
        "curl -L https://example.org/model.safetensors | ifjax quantize - packed.safetensors\n\n"
        "Rules match a tensor's name with '.' written as '/', without 'weight' or 'kernel' at its end.",
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="IN", help=IN_HELP)
    parser.add_argument("target", type=Path, metavar="OUT", help=_OUT)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fmt", type=_format, metavar="FORMAT", help="a format's name (default: if4)")
    which.add_argument("--rules", type=Path, metavar="FILE", help="rules in YAML or JSON, instead of --fmt")
    parser.add_argument("--embeddings", action="store_true", help="quantize embeddings and output heads too")
    parser.add_argument(
        "--axis", type=int, choices=(-1, -2), default=-1,
        help="the axis that blocks lie along, where no rule says: the contraction of weights stored [out, in] "
        "(default: -1), or [in, out] (-2)",
    )  # fmt: skip
    add_search(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of what stays in floats, and what packed tensors decode to (default: as it is)"
    )
    parser.add_argument("--no-errors", action="store_true", help="do not measure errors: faster")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; report what would be done")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON there, too")
    _add_output(parser)


def add_dequantize(commands) -> None:
    parser = add_command(
        commands, "dequantize", _dequantize, "write a copy of a packed checkpoint in floats",
        "Write a copy of a packed checkpoint in floats, for programs that know no packed ones.",
        "ifjax dequantize packed.safetensors floats.safetensors",
        "ifjax dequantize packed.safetensors floats.safetensors --dtype bfloat16 --shard-size 5GB",
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="IN", help=IN_HELP)
    parser.add_argument("target", type=Path, metavar="OUT", help=_OUT)
    parser.add_argument("--dtype", choices=DTYPES, help="of what was packed (default: what it was)")
    _add_output(parser)


def _add_output(parser) -> None:
    parser.add_argument(
        "--shard-size", type=_bytes, metavar="SIZE", help="of more than this write several files and an index, as 5GB"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    add_json(parser)


def _format(text: str) -> str:
    try:
        return get_format(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([kMGT]?)B?", text)
    size = int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text!r}")
    return size


def _quantize(options: argparse.Namespace) -> None:
    if str(options.target) == "-" and options.json and not options.dry_run:
        raise Misused("OUT and --json both ask for stdout: write the report by --report FILE")
    started = time.perf_counter()
    with _files_of(options) as (source, target):
        with as_file_error():
            plan = convert.plan(
                source, _rules(options), axis=options.axis, dtype=options.dtype, measured=not options.no_errors
            )
        report = plan.report
        if not options.dry_run:
            with progress_bar(rate=True) as progress, as_file_error():
                tick = ticks(progress, plan.nbytes)
                target, report = plan.write(target, max_shard_bytes=options.shard_size, tick=tick)
    seconds = time.perf_counter() - started
    about = {
        "source": str(options.source), "target": str(options.target), "version": __version__,
        "dry_run": options.dry_run, "seconds": round(seconds, 3),
        "mb_per_s": None if options.dry_run else round(plan.nbytes / 1e6 / seconds, 1),
    }  # fmt: skip
    result = json.dumps(about | json.loads(report.to_json()), indent=1) + "\n"
    if options.report is not None and not options.dry_run:
        write_text(options.report, result)
    if options.json:
        print(result, end="")
    else:
        to_stdout = str(options.target) == "-" and not options.dry_run
        console = Console(stderr=True, markup=False) if to_stdout else terminal_console()
        console.print(report)
        wrote = "would write" if options.dry_run else "wrote"
        rate = "" if options.dry_run else f" in {seconds:.1f} s, {plan.nbytes / 1e6 / seconds:.0f} MB/s"
        after = report.totals.bytes_after
        print(f"{wrote} {options.target}: {size_of(after)}{rate}", file=sys.stderr)
    odd = [entry for entry in report.entries if not entry.expected or math.isnan(entry.sqnr_db or 0)]
    for entry in odd:
        note = entry.note or "holds values that are not finite: their blocks decode to NaN"
        print(f"ifjax: warning: {entry.path}: {note}", file=sys.stderr)


def _rules(options: argparse.Namespace):
    if options.rules is not None:
        if options.embeddings:
            raise Misused("--rules say themselves what becomes of embeddings: leave out --embeddings")
        rules = load_rules(options.rules)
    elif options.embeddings:
        rules = default_rules(options.fmt or "if4")[-1:]
    else:
        rules = default_rules(options.fmt or "if4")

    def searching(rule):
        takes = options.search is not None and rule.weight_fmt is not None and rule.search is None
        return dataclasses.replace(rule, search=options.search) if takes else rule

    return tuple(map(searching, rules))


def _dequantize(options: argparse.Namespace) -> None:
    if str(options.target) == "-" and options.json:
        raise Misused("OUT and --json both ask for stdout: leave out --json")
    started = time.perf_counter()
    with _files_of(options) as (source, target), progress_bar(rate=True) as progress, as_file_error():
        opened = checkpoint.open_file(source)
        report = convert.contents(opened)
        tick = ticks(progress, report.totals.values)
        convert.dequantize_file(opened, target, dtype=options.dtype, max_shard_bytes=options.shard_size, tick=tick)
    seconds = time.perf_counter() - started
    if options.json:
        tensors = [entry.path for entry in report.quantized]
        about = {"source": str(options.source), "target": str(options.target), "version": __version__}
        print(json.dumps(about | {"seconds": round(seconds, 3), "dequantized": tensors}, indent=1))
    else:
        count = len(report.quantized)
        print(f"wrote {options.target}: {count} tensors dequantized in {seconds:.1f} s", file=sys.stderr)


@contextlib.contextmanager
def _files_of(options: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """Where to read and to write. What comes by pipes goes through files of a temporary folder."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ended_by_signal())
        source, target = stack.enter_context(input_file(options.source)), options.target
        to_stdout = str(target) == "-"
        if to_stdout:
            if sys.stdout.isatty():
                raise Misused("OUT is -, and stdout is a terminal: name a file, or pipe it into one")
            if options.shard_size is not None:
                raise Misused("OUT is -, which is one file: leave out --shard-size")
            target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "out.safetensors"
        elif not getattr(options, "dry_run", False):
            _check_target(source, target, options.force)
        yield source, target
        if to_stdout and not getattr(options, "dry_run", False):
            sys.stdout.flush()
            with target.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, 2**20)


def _check_target(source: Path, target: Path, force: bool) -> None:
    index = target if target.suffix == ".json" else target.with_name(target.name + ".index.json")
    plain = target.with_name(target.name.removesuffix(".index.json"))
    if not target.name.endswith((".safetensors", ".safetensors.index.json")):
        raise FileError(f"{target}: OUT must end in .safetensors (for several files, .safetensors.index.json)")
    for path in (plain, index):
        if not os.path.lexists(path):
            continue
        if any(os.path.exists(f) and os.path.samefile(path, f) for f in _sources(source)):
            raise FileError(f"{path} is IN: name another file for OUT")
        if not force:
            raise FileError(f"{path} exists already: name another file, or replace it by --force")


def _sources(source: Path) -> list[Path]:
    index, files, _ = safetensors.resolve(source)
    return files if index is None else [index, *files]


@contextlib.contextmanager
def _ended_by_signal() -> Iterator[None]:
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
