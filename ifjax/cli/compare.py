"""The command line: compare, quantize, inspect, verify, dequantize. Results go to stdout, all else to stderr.

Exit codes: 0 done, 1 bad input (a file that cannot be read, measured or written, or that is not as it should be),
2 wrong usage. A command is a function of the parsed arguments, registered in `_parser`.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ifjax import __version__
from ifjax.arrays.qtensor import DTYPES
from ifjax.files import checkpoint, convert
from ifjax.files import safetensors as _files
from ifjax.formats import get_format
from ifjax.measure import errors as analysis
from ifjax.models.rules import default_rules, load_rules


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; wrong usage and --help leave by SystemExit, as in argparse."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code = options.run(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (analysis.FileError, OSError, _Misused) as error:
        print(f"ifjax: error: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, _Misused) else 1
    except KeyboardInterrupt:
        return 130
    return 0


class _Misused(Exception):
    """Options that do not go together."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ifjax", description="Adaptive block-scaled number formats for JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="where to begin:\n"
        "  ifjax compare                      what each format costs, on samples\n"
        "  ifjax quantize IN OUT --dry-run    what would be packed in a checkpoint, and why not the rest\n"
        "  ifjax COMMAND --help               options and examples\n"
        "  python -m pydoc ifjax              what to call from Python, such as ifjax.quantize(x, fmt='if4')",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ifjax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_compare(commands)
    _add_quantize(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_dequantize(commands)
    return parser


def _command(commands, name: str, run, summary: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser for `ifjax NAME`, whose options go to `run`. Description and examples keep their lines."""
    parser = commands.add_parser(
        name, help=summary, description=description, epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def _add_json(parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_search(parser) -> None:
    parser.add_argument(
        "--search", choices=("fast", "exhaustive"), help="try several scales for each block: less error, more time"
    )


# --- compare ---------------------------------------------------------------------------------------------------------


def _add_compare(commands) -> None:
    parser = _command(
        commands, "compare", _compare, "what each format costs, on the weights of a file or on samples",
        "Quantize the weights of a safetensors file to each format, one tensor at a time, and report bits a\n"
        "value, size, SQNR, relative error and the share of blocks that took integers.\n"
        "\n"
        "Without FILE: the errors of random samples beside the published ones, and a small sample of\n"
        "pretrained weights that comes with ifjax.",
        "ifjax compare",
        "ifjax compare model.safetensors",
        "ifjax compare model.safetensors --formats if4 nvfp4 --out plots",
        "ifjax compare gpt2.safetensors --axis -2 --json > report.json",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a safetensors file")
    parser.add_argument(
        "--formats", nargs="+", type=_formats, metavar="FORMAT", default=[list(analysis.DEFAULT_FORMATS)],
        help=f"names, separated by spaces or commas (default: {' '.join(analysis.DEFAULT_FORMATS)})",
    )  # fmt: skip
    parser.add_argument(
        "--axis", type=int, default=-1,
        help="the axis that blocks lie along (default: -1, the contraction of weights stored [out, in], as PyTorch "
        "does; -2 for [in, out])",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="quantize biases, norms and other vectors too")
    _add_search(parser)
    _add_json(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write errors.png and choices.png there")


def _formats(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("needs a format's name")
    try:
        return [get_format(name).name for name in names]
    except ValueError as error:
        hint = "; FILE comes before --formats" if text.endswith(".safetensors") else ""
        raise argparse.ArgumentTypeError(f"{error}{hint}") from None


def _compare(options: argparse.Namespace) -> None:
    formats = tuple(dict.fromkeys(name for names in options.formats for name in names))
    if options.out is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise OSError("--out draws with matplotlib, which is not installed: pip install 'ifjax[viz]'")
        options.out.mkdir(parents=True, exist_ok=True)

    synthetic = None
    if options.file is None:
        path, source = analysis.sample_path(), analysis.SAMPLE_SOURCE
    else:
        path, source = options.file, options.file.name
    entries = analysis.read_header(path)
    with _progress() as progress:
        if options.file is None:
            rows = analysis.synthetic_table(formats, search=options.search)
            count = len(formats) * len(analysis.DISTRIBUTIONS)
            synthetic = tuple(_tracked(progress, rows, [1] * count, ["random samples"] * count))
        reports = analysis.file_reports(
            path, entries, formats, axis=options.axis, everything=options.all, search=options.search
        )
        names, sizes = [entry.name for entry in entries], [entry.nbytes for entry in entries]
        report = analysis.Report(source, tuple(_tracked(progress, reports, sizes, names)))
    if not report.quantized:
        raise analysis.FileError(f"{path} has nothing to measure: {_why_nothing(report)}")

    if options.json:
        result = {"axis": options.axis, "search": options.search, "version": __version__} | report.to_dict()
        if synthetic is not None:
            result["synthetic"] = [_synthetic_dict(row) for row in synthetic]
        print(json.dumps(_without_infinities(result), indent=1))
    else:
        console = _console()
        if synthetic is not None:
            _print_synthetic(console, synthetic)
        _print_report(console, report)
    if options.out is not None:
        _write_plots(report, options.out)


def _why_nothing(report) -> str:
    if not report.tensors:
        return "it holds no tensors"
    reasons = {}
    for t in report.tensors:
        reasons.setdefault(f"{t.status}, {t.reason}", []).append(t.name)
    lines = [f"{len(names)} tensors {reason}" for reason, names in reasons.items()]
    hint = " (--all takes vectors too)" if any(t.status == "kept" for t in report.tensors) else ""
    return "; ".join(lines) + hint


def _synthetic_dict(row) -> dict[str, Any]:
    figures = row.error.to_dict() | {"normalized_mse": row.error.normalized_mse}
    published = [number._asdict() for number in row.published]
    return {"distribution": row.distribution, "format": row.fmt, "error": figures, "published": published}


def _without_infinities(value):
    """JSON has no numbers for NaN and infinity: null instead."""
    if isinstance(value, dict):
        return {key: _without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_plots(report, folder: Path) -> None:
    from ifjax.measure import plots

    figures = {"errors.png": plots.plot_errors(report)}
    if any(error.second_share is not None for error in report.total.values()):
        figures["choices.png"] = plots.plot_choices(report)
    for name, figure in figures.items():
        figure.savefig(folder / name)
        print(f"wrote {folder / name}", file=sys.stderr)


# --- quantize and dequantize -----------------------------------------------------------------------------------------

_IN = "a safetensors file, an index (*.index.json), a folder with one checkpoint, or - for stdin"
_OUT = "the file to write, *.safetensors, or - for stdout; *.safetensors.index.json for several files"


def _add_quantize(commands) -> None:
    parser = _command(
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
    parser.add_argument("source", type=Path, metavar="IN", help=_IN)
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
    _add_search(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of what stays in floats, and what packed tensors decode to (default: as it is)"
    )
    parser.add_argument("--no-errors", action="store_true", help="do not measure errors: faster")
    parser.add_argument("--dry-run", action="store_true", help="write nothing; report what would be done")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON there, too")
    _add_output(parser)


def _add_dequantize(commands) -> None:
    parser = _command(
        commands, "dequantize", _dequantize, "write a copy of a packed checkpoint in floats",
        "Write a copy of a packed checkpoint in floats, for programs that know no packed ones.",
        "ifjax dequantize packed.safetensors floats.safetensors",
        "ifjax dequantize packed.safetensors floats.safetensors --dtype bfloat16 --shard-size 5GB",
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="IN", help=_IN)
    parser.add_argument("target", type=Path, metavar="OUT", help=_OUT)
    parser.add_argument("--dtype", choices=DTYPES, help="of what was packed (default: what it was)")
    _add_output(parser)


def _add_output(parser) -> None:
    parser.add_argument(
        "--shard-size", type=_bytes, metavar="SIZE", help="of more than this write several files and an index, as 5GB"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    _add_json(parser)


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
        raise _Misused("OUT and --json both ask for stdout: write the report by --report FILE")
    started = time.perf_counter()
    with _files_of(options) as (source, target):
        with _as_file_error():
            plan = convert.plan(
                source, _rules(options), axis=options.axis, dtype=options.dtype, measured=not options.no_errors
            )
        report = plan.report
        if not options.dry_run:
            with _progress(rate=True) as progress, _as_file_error():
                tick = _ticks(progress, plan.nbytes)
                target, report = plan.write(target, max_shard_bytes=options.shard_size, tick=tick)
    seconds = time.perf_counter() - started
    about = {
        "source": str(options.source), "target": str(options.target), "version": __version__,
        "dry_run": options.dry_run, "seconds": round(seconds, 3),
        "mb_per_s": None if options.dry_run else round(plan.nbytes / 1e6 / seconds, 1),
    }  # fmt: skip
    result = json.dumps(about | json.loads(report.to_json()), indent=1) + "\n"
    if options.report is not None and not options.dry_run:
        _files.write_text(options.report, result)
    if options.json:
        print(result, end="")
    else:
        console = _console() if str(options.target) != "-" or options.dry_run else Console(stderr=True, markup=False)
        console.print(report)
        wrote = "would write" if options.dry_run else "wrote"
        rate = "" if options.dry_run else f" in {seconds:.1f} s, {plan.nbytes / 1e6 / seconds:.0f} MB/s"
        after = report.totals.bytes_after
        print(f"{wrote} {options.target}: {_size(after)}{rate}", file=sys.stderr)
    odd = [entry for entry in report.entries if not entry.expected or math.isnan(entry.sqnr_db or 0)]
    for entry in odd:
        note = entry.note or "holds values that are not finite: their blocks decode to NaN"
        print(f"ifjax: warning: {entry.path}: {note}", file=sys.stderr)


def _rules(options: argparse.Namespace):
    if options.rules is not None:
        if options.embeddings:
            raise _Misused("--rules say themselves what becomes of embeddings: leave out --embeddings")
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
        raise _Misused("OUT and --json both ask for stdout: leave out --json")
    started = time.perf_counter()
    with _files_of(options) as (source, target), _progress(rate=True) as progress, _as_file_error():
        opened = checkpoint.open_file(source)
        report = convert.contents(opened)
        tick = _ticks(progress, report.totals.values)
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
        source, target = stack.enter_context(_input(options.source)), options.target
        to_stdout = str(target) == "-"
        if to_stdout:
            if sys.stdout.isatty():
                raise _Misused("OUT is -, and stdout is a terminal: name a file, or pipe it into one")
            if options.shard_size is not None:
                raise _Misused("OUT is -, which is one file: leave out --shard-size")
            target = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "out.safetensors"
        elif not getattr(options, "dry_run", False):
            _check_target(source, target, options.force)
        yield source, target
        if to_stdout and not getattr(options, "dry_run", False):
            sys.stdout.flush()
            with target.open("rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer, 2**20)


@contextlib.contextmanager
def _input(path: Path) -> Iterator[Path]:
    """The path itself, or that of a file that holds what stdin gave."""
    if str(path) != "-":
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "stdin.safetensors"
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
        yield copy


def _check_target(source: Path, target: Path, force: bool) -> None:
    index = target if target.suffix == ".json" else target.with_name(target.name + ".index.json")
    plain = target.with_name(target.name.removesuffix(".index.json"))
    if not target.name.endswith((".safetensors", ".safetensors.index.json")):
        raise analysis.FileError(f"{target}: OUT must end in .safetensors (for several files, .safetensors.index.json)")
    for path in (plain, index):
        if not os.path.lexists(path):
            continue
        if any(os.path.exists(f) and os.path.samefile(path, f) for f in _sources(source)):
            raise analysis.FileError(f"{path} is IN: name another file for OUT")
        if not force:
            raise analysis.FileError(f"{path} exists already: name another file, or replace it by --force")


def _sources(source: Path) -> list[Path]:
    index, files, _ = _files.resolve(source)
    return files if index is None else [index, *files]


@contextlib.contextmanager
def _as_file_error() -> Iterator[None]:
    """Rules and settings that do not fit the file: a sentence, not a traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise error if isinstance(error, analysis.FileError) else analysis.FileError(str(error)) from error


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


def _ticks(progress: Progress, total: int):
    task = progress.add_task("", total=total)

    def tick(name, count):
        progress.update(task, description=name, advance=count)

    return tick


# --- inspect and verify ----------------------------------------------------------------------------------------------


def _add_inspect(commands) -> None:
    parser = _command(
        commands, "inspect", _inspect, "what a checkpoint holds",
        "List the tensors of a checkpoint, packed or not, with formats, bits a value and totals, from its\n"
        "headers, which are checked. `ifjax verify` checks the rest.",
        "ifjax inspect packed.safetensors",
        "ifjax inspect packed.safetensors --json | jq .totals",
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE", help=_IN)
    _add_json(parser)


def _add_verify(commands) -> None:
    parser = _command(
        commands, "verify", _verify, "check a packed checkpoint, and compare it with the original",
        "Compare every checksum of a checkpoint and, with --against, its values with those of the\n"
        "original. Exits with 1 if anything is wrong.",
        "ifjax verify packed.safetensors",
        "ifjax verify packed.safetensors --against model.safetensors --min-sqnr 18",
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE", help=_IN)
    parser.add_argument("--against", type=Path, metavar="ORIGINAL", help="the checkpoint that it was made of")
    parser.add_argument("--min-sqnr", type=float, metavar="DB", help="of packed tensors, with --against")
    _add_json(parser)


def _inspect(options: argparse.Namespace) -> None:
    with _input(options.file) as path:
        opened = checkpoint.open_file(path)
        report = convert.contents(opened)
    size = sum(file.stat().st_size for file in opened.files) if str(options.file) != "-" else None
    if options.json:
        about = {
            "source": str(options.file), "layout": checkpoint.LAYOUT if opened.sums else None,
            "files": [file.name for file in opened.files], "bytes": size, "metadata": opened.metadata,
            "formats": {p.fmt.name: p.fmt.to_dict() for p in opened.packed.values()},
        }  # fmt: skip
        print(json.dumps(about | json.loads(report.to_json()), indent=1))
        return
    console = _console()
    kind = f"packed checkpoint, layout {checkpoint.LAYOUT}" if opened.packed else "nothing packed"
    console.print(f"{options.file}: {kind}, {len(opened.files)} file{'s' * (len(opened.files) > 1)}")
    console.print(report)


def _verify(options: argparse.Namespace) -> int:
    if options.min_sqnr is not None and options.against is None:
        raise _Misused("--min-sqnr is measured against the original: give --against ORIGINAL, too")
    with _input(options.file) as path, _progress(rate=True) as progress:
        opened = checkpoint.open_file(path)
        against = None if options.against is None else checkpoint.open_file(options.against)
        report = convert.contents(opened)
        tick = _ticks(progress, report.totals.bytes_after if against is None else report.totals.values)
        found = tuple(convert.verify(opened, against, min_sqnr_db=options.min_sqnr, tick=tick))
    faults = [v for v in found if v.fault is not None]
    if options.json:
        tensors = [v._asdict() | {"sqnr_db": v.sqnr_db} for v in found]
        result = {"source": str(options.file), "against": options.against and str(options.against), "ok": not faults}
        print(json.dumps(_without_infinities(result | {"checksums": len(opened.sums), "tensors": tensors}), indent=1))
        return 1 if faults else 0
    console = _console()
    if against is not None:
        packed = [v for v in found if v.fmt is not None and v.fault is None]
        table = _table("tensor", "format", "SQNR dB", "error %")
        table.columns[0].overflow = "fold"
        for v in packed:
            table.add_row(Text(v.name), v.fmt, *_error_figures(v.signal, v.noise))
        if packed:
            table.add_section()
            table.add_row("all", "", *_error_figures(sum(v.signal for v in packed), sum(v.noise for v in packed)))
            console.print(table)
    for v in faults:
        print(f"ifjax: error: {v.name}: {v.fault}", file=sys.stderr)
    checked = f"{len(opened.sums)} checksums" if opened.sums else "no checksums in it"
    good = len(found) - len(faults)
    console.print(f"{options.file}: {good} of {len(found)} tensors are as they should be ({checked})")
    return 1 if faults else 0


def _error_figures(signal: float, noise: float) -> tuple[str, str]:
    e = analysis.Error(1, signal, noise, 0, 0, None)
    return f"{e.sqnr_db:.2f}", f"{100 * e.relative_error:.3f}"


# --- tables ----------------------------------------------------------------------------------------------------------


def _print_synthetic(console: Console, rows) -> None:
    distributions = list(dict.fromkeys(row.distribution for row in rows))
    cells = {(row.distribution, row.fmt): row for row in rows}
    table = _table("format", *distributions)
    for fmt in dict.fromkeys(row.fmt for row in rows):
        table.add_row(fmt, *(_synthetic_cell(cells[distribution, fmt]) for distribution in distributions))
    console.print(f"Random samples of {rows[0].error.values} values: squared error over squared signal, x 1e-3")
    console.print(
        "%: blocks that took integers. In brackets: arXiv 2603.28765, Table 1; then an independent numpy program."
    )
    console.print(table)


def _synthetic_cell(row) -> Text:
    cell = Text(_thousandths(row.error.normalized_mse), "bold")
    if row.error.second_share is not None:
        cell.append(f"  {row.error.second_share:.0%}", "not bold")
    published = {number.source.startswith("arXiv"): number.normalized_mse for number in row.published}
    if published:
        numbers = f"{published[True] * 1e3:.1f}; " if True in published else ""
        numbers += _thousandths(published[False]) if False in published else ""
        cell.append(f"\n({numbers.removesuffix('; ')})", "not bold dim")
    return cell


def _thousandths(value: float) -> str:
    return f"{value * 1e3:.2f}" if value > 1e-3 else f"{value * 1e3:.4f}"


def _print_report(console: Console, report) -> None:
    table = _table("tensor", "format", *_FIGURES)
    table.columns[0].overflow = "fold"
    table.columns[1].justify = "left"
    for t in report.quantized:
        columns = zip(*map(_figures, t.errors.values()), strict=True)
        shape = " x ".join(map(str, t.shape))
        name = Text(t.name).append(f"\n{shape} {t.dtype}, {_size(t.nbytes)}", "dim")
        table.add_row(name, "\n".join(t.errors), *map("\n".join, columns), end_section=True)
    console.print(f"\n{report.source}")
    console.print(table)

    left = [t for t in report.tensors if t.status != "quantized"]
    if left:
        console.print("\nNot quantized")
        console.print(_left_table(left))

    table = _table("format", *_FIGURES)
    for name, error in report.total.items():
        table.add_row(name, *_figures(error))
    before, rest = (_size(sum(t.nbytes for t in tensors)) for tensors in (report.quantized, left))
    console.print(f"\nTotal of {len(report.quantized)} tensors, {before} before; {len(left)} others stay ({rest})")
    console.print(table)


_FIGURES = ("bits/value", "size", "SQNR dB", "error %", "INT %")


def _figures(error) -> tuple[str, ...]:
    share = "" if error.second_share is None else f"{100 * error.second_share:.1f}"
    sqnr, relative = f"{error.sqnr_db:.2f}", f"{100 * error.relative_error:.3f}"
    return f"{error.bits_per_value:.3f}", _size(error.nbytes), sqnr, relative, share


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _left_table(tensors) -> Table:
    table = _table("tensor", "count", "size")
    table.columns[0].overflow = "fold"
    table.add_column("why")
    groups: dict[tuple[str, str], list] = {}
    for t in tensors:  # layers that differ in their numbers only share a row; --json lists each tensor
        pattern = re.sub(r"\d+", "*", t.name)
        groups.setdefault((pattern, f"{t.status}: {t.reason}"), []).append(t)
    for (pattern, why), group in groups.items():
        name = group[0].name if len(group) == 1 else pattern
        table.add_row(Text(name), str(len(group)), _size(sum(t.nbytes for t in group)), Text(why))
    return table


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.2f} kB"


# --- the terminal ----------------------------------------------------------------------------------------------------


def _console() -> Console:
    # Not a terminal: wide enough for the tables, whoever reads them.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110
    return Console(width=width, markup=False, highlight=False)


def _progress(rate: bool = False) -> Progress:
    console = Console(stderr=True, markup=False)
    times = (TransferSpeedColumn(), TimeRemainingColumn()) if rate else (TimeElapsedColumn(),)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), *times
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _tracked(progress: Progress, items: Iterator, sizes: Sequence[int], names: Sequence[str]) -> Iterator:
    """The items, each shown while it is made."""
    task = progress.add_task("", total=sum(sizes))
    for size, name in zip(sizes, names, strict=True):
        progress.update(task, description=name)
        yield next(items)
        progress.advance(task, size)
    progress.remove_task(task)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
