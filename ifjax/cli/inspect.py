"""ifjax inspect and ifjax verify."""

import argparse
import collections
import contextlib
import dataclasses
import json
import sys
from pathlib import Path

from rich.text import Text

from ifjax import convert
from ifjax import measure as analysis
from ifjax.cli.files import IN_HELP, decibels_of, input_file
from ifjax.cli.terminal import (
    Misused,
    add_command,
    add_json,
    as_file_error,
    plain_table,
    printable,
    progress_bar,
    shown,
    terminal_console,
    ticks,
    without_infinities,
)
from ifjax.convert import held, verify
from ifjax.exchange import Found, Source, companions, declared, layouts_of, open_checkpoint, recognize
from ifjax.files import checkpoint
from ifjax.models.report import Report


def add_inspect(commands) -> None:
    """Add the parser of `ifjax inspect`."""
    parser = add_command(
        commands, "inspect", _inspect, "what a checkpoint holds",
        "List the tensors of a checkpoint, packed or not, with formats, bits a value and totals, from its\n"
        "headers, which are checked. Says in which tool's layout it is. `ifjax verify` checks the rest.",
        "ifjax inspect packed.safetensors",
        "ifjax inspect Llama-NVFP4/",
        "ifjax inspect packed.safetensors --json | jq .totals",
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE", help=IN_HELP)
    add_json(parser)


def add_verify(commands) -> None:
    """Add the parser of `ifjax verify`."""
    parser = add_command(
        commands, "verify", _verify, "check a packed checkpoint, and compare it with the original",
        "Compare every checksum of a checkpoint and, with --against, its values with those of the\n"
        "original. Exits with 1 if anything is wrong.",
        "ifjax verify packed.safetensors",
        "ifjax verify packed.safetensors --against model.safetensors --min-sqnr 18",
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE", help=IN_HELP)
    parser.add_argument("--against", type=Path, metavar="ORIGINAL", help="the checkpoint that it was made of")
    parser.add_argument("--min-sqnr", type=decibels_of, metavar="DB", help="of packed tensors, with --against")
    add_json(parser)


def _inspect(options: argparse.Namespace) -> None:
    with input_file(options.file) as path, as_file_error():
        foreign = open_checkpoint(path)
        opened = None if foreign.path.suffix == ".gguf" else checkpoint.open_file(path)
        found, others = _layouts(foreign)
        report = held(foreign) if opened is None else convert.contents(opened)
        if found and (opened is None or not opened.packed):
            with contextlib.suppress(ValueError):  # what cannot be read is listed array by array
                report = convert.plan_import(path).report
    parts = {name: f"part of a tensor in {f.layout.name}" for f in found for name in f.arrays}
    reasons = others | parts
    entries = (dataclasses.replace(e, reason=reasons[e.path]) if e.path in reasons and e.fmt is None else e
               for e in report.entries)  # fmt: skip
    report = Report(tuple(entries))
    files = [foreign.path] if opened is None else list(opened.files)
    size = sum(file.stat().st_size for file in files) if str(options.file) != "-" else None
    packed = {} if opened is None else opened.packed
    counts = collections.Counter(f.layout.name for f in found)
    if options.json:
        about = {
            "source": str(options.file), "layout": opened and opened.layout, "layouts": dict(counts),
            "files": [file.name for file in files], "bytes": size, "metadata": opened.metadata if opened else {},
            "formats": {p.fmt.name: p.fmt.to_dict() for p in packed.values()},
        }  # fmt: skip
        print(json.dumps(about | json.loads(report.to_json()), indent=1))
        return
    console = terminal_console()
    kind = f"packed checkpoint, layout {opened and opened.layout}" if packed else "nothing packed"
    kind = ", ".join(f"{n} tensors in {name}" for name, n in counts.items()) or kind
    console.print(f"{printable(str(options.file))}: {kind}, {len(files)} file{'s' * (len(files) > 1)}")
    console.print(shown(report))
    if counts and not packed:
        print("`ifjax import` makes a packed checkpoint of it", file=sys.stderr)


def _layouts(source: Source) -> tuple[list[Found], dict[str, str]]:
    """Tensors in other tools' layouts, and what else is no weight by itself: those that the files declare, if any."""
    layouts = None
    if source.declared is not None:
        with contextlib.suppress(ValueError):  # declared is what is not known here
            layouts = layouts_of(source.declared) if isinstance(source.declared, str) else declared(source.declared)[0]
    found = recognize(source.specs, layouts) or recognize(source.specs)
    return found, companions(source.specs)


def _verify(options: argparse.Namespace) -> int:
    if options.min_sqnr is not None and options.against is None:
        raise Misused("--min-sqnr is measured against the original: give --against ORIGINAL, too")
    with input_file(options.file) as path, progress_bar(rate=True) as progress:
        opened = checkpoint.open_file(path)
        against = None if options.against is None else checkpoint.open_file(options.against)
        report = convert.contents(opened)
        tick = ticks(progress, report.totals.bytes_after if against is None else report.totals.values)
        found = tuple(verify(opened, against, min_sqnr_db=options.min_sqnr, tick=tick))
    faults = [v for v in found if v.fault is not None]
    if options.json:
        tensors = [v._asdict() | {"sqnr_db": v.sqnr_db} for v in found]
        result = {"source": str(options.file), "against": options.against and str(options.against), "ok": not faults}
        print(json.dumps(without_infinities(result | {"checksums": len(opened.sums), "tensors": tensors}), indent=1))
        return 1 if faults else 0
    console = terminal_console()
    if against is not None:
        packed = [v for v in found if v.fmt is not None and v.fault is None]
        table = plain_table("tensor", "format", "SQNR dB", "error %")
        table.columns[0].overflow = "fold"
        for v in packed:
            table.add_row(Text(printable(v.name)), v.fmt, *_error_figures(v.signal, v.noise))
        if packed:
            table.add_section()
            table.add_row("all", "", *_error_figures(sum(v.signal for v in packed), sum(v.noise for v in packed)))
            console.print(table)
    for v in faults:
        print(f"ifjax: error: {printable(f'{v.name}: {v.fault}')}", file=sys.stderr)
    checked = f"{len(opened.sums)} checksums" if opened.sums else "no checksums in it"
    good = len(found) - len(faults)
    console.print(f"{printable(str(options.file))}: {good} of {len(found)} tensors are as they should be ({checked})")
    return 1 if faults else 0


def _error_figures(signal: float, noise: float) -> tuple[str, str]:
    e = analysis.ErrorStats(1, signal, noise, 0, 0, None)
    return f"{e.sqnr_db:.2f}", f"{100 * e.relative_error:.3f}"
