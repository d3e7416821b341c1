"""ifjax quantize and ifjax dequantize."""

import argparse
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

from rich.console import Console

from ifjax import convert
from ifjax.arrays import DTYPES
from ifjax.cli.files import FOLDER_HELP, IN_HELP, OUT_HELP, bytes_of, check_report, files_of, format_name
from ifjax.cli.terminal import (
    Misused,
    add_command,
    add_json,
    add_report,
    add_search,
    as_file_error,
    printable,
    progress_bar,
    size_of,
    tell_report,
    tell_sum,
    ticks,
)
from ifjax.exchange import LAYOUTS
from ifjax.files import checkpoint
from ifjax.models.rule_files import load_rules
from ifjax.models.rules import default_rules
from ifjax.version import __version__


def add_quantize(commands) -> None:
    """Add the parser of `ifjax quantize`."""
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
    parser.add_argument("target", type=Path, metavar="OUT", help=OUT_HELP + FOLDER_HELP)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fmt", type=format_name, metavar="FORMAT", help="a format's name (default: if4)")
    which.add_argument("--rules", type=Path, metavar="FILE", help="rules in YAML or JSON, instead of --fmt")
    parser.add_argument(
        "--source", dest="tool", choices=_fp8_tools(),
        help="whose FP8 weights IN has: decode them, weight x scale, and pack that (default: they stay as they are)",
    )  # fmt: skip
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
    add_report(parser)
    _add_output(parser)


def _fp8_tools() -> list[str]:
    floats = (lay for lay in LAYOUTS.values() if lay.floats and lay.container == "safetensors")
    return list(dict.fromkeys(lay.tool for lay in floats))


def add_dequantize(commands) -> None:
    """Add the parser of `ifjax dequantize`."""
    parser = add_command(
        commands, "dequantize", _dequantize, "write a copy of a packed checkpoint in floats",
        "Write a copy of a packed checkpoint in floats, for programs that know no packed ones.",
        "ifjax dequantize packed.safetensors floats.safetensors",
        "ifjax dequantize packed.safetensors floats.safetensors --dtype bfloat16 --shard-size 5GB",
        "ifjax dequantize packed/ floats/",
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="IN", help=IN_HELP)
    parser.add_argument("target", type=Path, metavar="OUT", help=OUT_HELP)
    parser.add_argument("--dtype", choices=DTYPES, help="of what was packed (default: what it was)")
    _add_output(parser)


def _add_output(parser) -> None:
    parser.add_argument(
        "--shard-size", type=bytes_of, metavar="SIZE", help="of more than this write several files and an index, as 5GB"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    add_json(parser)


def _quantize(options: argparse.Namespace) -> None:
    if str(options.target) == "-" and options.json and not options.dry_run:
        raise Misused("OUT and --json both ask for stdout: write the report by --report FILE")
    check_report(None if options.dry_run else options.report)
    started = time.perf_counter()
    with files_of(options) as (source, target):
        with as_file_error():
            plan = convert.plan(
                source, _rules(options), axis=options.axis, dtype=options.dtype, measured=not options.no_errors,
                tool=options.tool,
            )
        report = plan.report
        if not options.dry_run:
            with progress_bar(rate=True) as progress, as_file_error():
                tick = ticks(progress, plan.nbytes)
                target, report = plan.write(target, max_shard_bytes=options.shard_size, tick=tick)
    seconds = time.perf_counter() - started
    to_stdout = str(options.target) == "-" and not options.dry_run
    tell_report(options, report, plan.nbytes, seconds, Console(stderr=True, markup=False) if to_stdout else None)
    if not options.json:
        tell_sum(options, plan.nbytes, seconds, size_of(report.totals.bytes_after))
    odd = [entry for entry in report.entries if not entry.expected or math.isnan(entry.sqnr_db or 0)]
    for entry in odd:
        note = entry.note or "holds values that are not finite: their blocks decode to NaN"
        print(f"ifjax: warning: {printable(f'{entry.path}: {note}')}", file=sys.stderr)


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
    with files_of(options) as (source, target), progress_bar(rate=True) as progress, as_file_error():
        opened = checkpoint.open_file(source)
        report = convert.contents(opened)
        tick = ticks(progress, report.totals.values)
        convert.dequantize_file(source, target, dtype=options.dtype, max_shard_bytes=options.shard_size, tick=tick)
    seconds = time.perf_counter() - started
    if options.json:
        tensors = [entry.path for entry in report.quantized]
        about = {"source": str(options.source), "target": str(options.target), "version": __version__}
        print(json.dumps(about | {"seconds": round(seconds, 3), "dequantized": tensors}, indent=1))
    else:
        count = len(report.quantized)
        print(printable(f"wrote {options.target}: {count} tensors dequantized in {seconds:.1f} s"), file=sys.stderr)
