"""ifjax inspect and ifjax verify."""

import argparse
import json
import sys
from pathlib import Path

from rich.text import Text

from ifjax import measure as analysis
from ifjax.cli.convert import _IN
from ifjax.cli.terminal import (
    _add_json,
    _command,
    _console,
    _input,
    _Misused,
    _progress,
    _table,
    _ticks,
    _without_infinities,
)
from ifjax.files import checkpoint, convert, verify


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
        found = tuple(verify.verify(opened, against, min_sqnr_db=options.min_sqnr, tick=tick))
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
