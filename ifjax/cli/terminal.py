"""What commands share: options, tables, progress, errors."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

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

from ifjax.atomic import write_text
from ifjax.files import FileError
from ifjax.models.report import Entry, Report
from ifjax.version import __version__


class Parser(argparse.ArgumentParser):
    """Whose errors quote nothing that a terminal would obey: `ifjax quantize *` hands over names of files."""

    def error(self, message: str):
        super().error(printable(message))


class Misused(Exception):
    """Options that do not go together."""


def add_command(commands, name: str, run, summary: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A parser for `ifjax NAME`, whose options go to `run`. Description and examples keep their lines."""
    parser = commands.add_parser(
        name, help=summary, description=description, epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def add_json(parser) -> None:
    """Add --json, for commands that print tables."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def add_report(parser) -> None:
    """Add --dry-run and --report, for commands that convert."""
    parser.add_argument("--dry-run", action="store_true", help="write nothing; report what would be done")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report as JSON there, too")


def tell_report(
    options: argparse.Namespace, report: Report, nbytes: int, seconds: float, console: Console | None = None
) -> None:
    """Give a conversion's report as --report and --json ask; without --json as a table, on stdout unless told else.

    `nbytes` were read in so many seconds, if it is no dry run.
    """
    about = {
        "source": str(options.source), "target": str(options.target), "version": __version__,
        "dry_run": options.dry_run, "seconds": round(seconds, 3),
        "mb_per_s": None if options.dry_run else round(nbytes / 1e6 / seconds, 1),
    }  # fmt: skip
    result = json.dumps(about | json.loads(report.to_json()), indent=1) + "\n"
    if options.report is not None and not options.dry_run:
        write_text(options.report, result)
    if options.json:
        print(result, end="")
    else:
        (terminal_console() if console is None else console).print(shown(report))


def tell_sum(options: argparse.Namespace, nbytes: int, seconds: float, what: str) -> None:
    """Say on stderr what a conversion wrote, or would write, and how fast."""
    wrote = "would write" if options.dry_run else "wrote"
    rate = "" if options.dry_run else f" in {seconds:.1f} s, {nbytes / 1e6 / seconds:.0f} MB/s"
    print(printable(f"{wrote} {options.target}: {what}{rate}"), file=sys.stderr)


def add_search(parser) -> None:
    """Add --search, for commands that encode."""
    parser.add_argument(
        "--search", choices=("fast", "exhaustive"), help="try several scales for each block: less error, more time"
    )


def without_infinities(value):
    """JSON has no numbers for NaN and infinity: null instead."""
    if isinstance(value, dict):
        return {key: without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def as_file_error() -> Iterator[None]:
    """Rules and settings that do not fit the file: a sentence, not a traceback."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise error if isinstance(error, FileError) else FileError(str(error)) from error


def ticks(progress: Progress, total: int):
    """Return a function of (name, count) that moves a new bar of `total` units on by count."""
    task = progress.add_task("", total=total)

    def tick(name, count):
        progress.update(task, description=printable(name), advance=count)

    return tick


def plain_table(first: str, *others: str) -> Table:
    """Return a table with these headings, all columns but the first aligned to the right."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def size_of(nbytes: int) -> str:
    """Return a number of bytes as text, in kB or MB."""
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.2f} kB"


def terminal_console() -> Console:
    """Return the console of standard output, without markup."""
    # Not a terminal: wide enough for the tables, whoever reads them.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110
    return Console(width=width, markup=False, highlight=False)


def progress_bar(rate: bool = False) -> Progress:
    """Return progress bars on standard error, shown on terminals only.

    With `rate` they tell bytes a second and the time that is left.
    """
    console = Console(stderr=True, markup=False)
    times = (TransferSpeedColumn(), TimeRemainingColumn()) if rate else (TimeElapsedColumn(),)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), *times
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def tracked(progress: Progress, items: Iterator, sizes: Sequence[int], names: Sequence[str]) -> Iterator:
    """The items, each shown while it is made."""
    task = progress.add_task("", total=sum(sizes))
    for size, name in zip(sizes, names, strict=True):
        progress.update(task, description=printable(name))
        yield next(items)
        progress.advance(task, size)
    progress.remove_task(task)


_LONGEST, _MOST_LINES = 1000, 40  # of a message


def sentence(error: Exception) -> str:
    """Return an error as text that a terminal can be trusted with."""
    if isinstance(error, OSError) and error.strerror:
        return printable(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return printable(str(error))


def printable(text: str) -> str:
    """Return text with control characters escaped, and neither longer lines nor more of them than anybody reads.

    Names come from files, and what moves a terminal's cursor or changes its colours is written out.
    """

    def escaped(line: str) -> str:
        line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}... ({len(line)} characters)"
        return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in line)

    lines = text.split("\n")
    more = [f"... ({len(lines)} lines)"] if len(lines) > _MOST_LINES else []
    return "\n".join([*map(escaped, lines[:_MOST_LINES]), *more])


def one_line(text: str | None) -> str | None:
    """Return printable text without line breaks, for a cell of a table."""
    return text and printable(text).replace("\n", "\\n")


def shown(report: Report) -> Report:
    """Return a report whose texts a terminal can be trusted with."""

    def of(entry: Entry) -> Entry:
        texts = {f: getattr(entry, f) for f in ("path", "dtype", "rule", "reason", "note")}
        return dataclasses.replace(entry, **{f: one_line(text) for f, text in texts.items()})

    return Report(tuple(map(of, report.entries)))
