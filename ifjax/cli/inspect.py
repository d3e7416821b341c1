"""ifjax inspect and ifjax verify."""

import argparse
import json
import sys
from pathlib import Path

from rich.text import Text

from ifjax import convert
from ifjax import measure as analysis
from ifjax.cli.convert import IN_HELP
from ifjax.cli.terminal import (
    Misused,
    add_command,
    add_json,
    input_file,
    plain_table,
    progress_bar,
    terminal_console,
    ticks,
    without_infinities,
)
from ifjax.convert import verify
from ifjax.files import checkpoint


def add_inspect(commands) -> None:
    parser = add_command(
        commands, "inspect", _inspect, "what a checkpoint holds",
        "List the tensors of a checkpoint, packed or not, with formats, bits a value and totals, from its\n"
        "headers, which are checked. `ifjax verify` checks the rest.",
        "ifjax inspect packed.safetensors",
        "ifjax inspect packed.safetensors --json | jq .totals",
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE", help=IN_HELP)
    add_json(parser)


def add_verify(commands) -> None:
    parser = add_command(
        commands, "verify", _verify, "check a packed checkpoint, and compare it with the original",
        "Compare every checksum of a checkpoint and, with --against, its values with those of the\n"
        "original. Exits with 1 if anything is wrong.",
        "ifjax verify packed.safetensors",
        "ifjax verify packed.safetensors --against model.safetensors --min-sqnr 18",
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE", help=IN_HELP)
    parser.add_argument("--against", type=Path, metavar="ORIGINAL", help="the checkpoint that it was made of")
    parser.add_argument("--min-sqnr", type=float, metavar="DB", help="of packed tensors, with --against")
    add_json(parser)


def _inspect(options: argparse.Namespace) -> None:
    with input_file(options.file) as path:
        opened = checkpoint.open_file(path)
        report = convert.contents(opened)
    size = sum(file.stat().st_size for file in opened.files) if str(options.file) != "-" else None
    if options.json:
        about = {
            "source": str(options.file), "layout": opened.layout,
            "files": [file.name for file in opened.files], "bytes": size, "metadata": opened.metadata,
            "formats": {p.fmt.name: p.fmt.to_dict() for p in opened.packed.values()},
        }  # fmt: skip
        print(json.dumps(about | json.loads(report.to_json()), indent=1))
        return
    console = terminal_console()
    kind = f"packed checkpoint, layout {opened.layout}" if opened.packed else "nothing packed"
    console.print(f"{options.file}: {kind}, {len(opened.files)} file{'s' * (len(opened.files) > 1)}")
    console.print(report)


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
    e = analysis.ErrorStats(1, signal, noise, 0, 0, None)
    return f"{e.sqnr_db:.2f}", f"{100 * e.relative_error:.3f}"
