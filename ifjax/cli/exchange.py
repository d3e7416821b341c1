"""ifjax import and ifjax export."""

import argparse
import sys
import time
import warnings
from pathlib import Path

from ifjax.arrays import DTYPES
from ifjax.cli.files import IN_HELP, bytes_of, check_report, check_target, ended_by_signal, format_name
from ifjax.cli.terminal import (
    add_command,
    add_json,
    add_report,
    as_file_error,
    printable,
    progress_bar,
    size_of,
    tell_report,
    tell_sum,
    ticks,
)
from ifjax.convert import Transfer, plan_export, plan_import
from ifjax.exchange import LAYOUTS, TOOLS

_SRC = IN_HELP.removesuffix(", or - for stdin")
_OUT = "a file that ends in {}, or a folder, new or empty, which gets config.json, the tokenizer and all else, too"


def add_import(commands) -> None:
    """Add the parser of `ifjax import`."""
    parser = add_command(
        commands, "import", _import, "make a packed checkpoint of another tool's 4-bit one",
        "Make a packed checkpoint of one in another tool's layout: compressed-tensors, ModelOpt, gpt-oss, MLX,\n"
        "GGUF, fouroversix; codes and scales keep their bits. The layout is found from the files, and asked for\n"
        "where they leave it open. FP8 parts stay as they are unless --decode makes floats of them.",
        "ifjax import Llama-NVFP4/ packed/",
        "ifjax import gpt-oss/ packed/ --recast nvfp4",
        "ifjax import model.safetensors packed.safetensors --from modelopt --axis -2",
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="SRC", help=f"{_SRC}, or a GGUF file")
    parser.add_argument("target", type=Path, metavar="OUT", help=_OUT.format(".safetensors"))
    parser.add_argument("--from", dest="tool", choices=TOOLS, help="whose layout it is (default: what the files say)")
    parser.add_argument("--fmt", type=format_name, metavar="FORMAT", help="to read the tensors as, such as fouroversix")
    parser.add_argument(
        "--nibbles", choices=("low_first", "high_first"), help="where the earlier code of a byte lies, if not as usual"
    )
    parser.add_argument(
        "--axis", type=int, choices=(-1, -2), default=-1,
        help="-1: matrices stay [out, in] (default); -2: they become [in, out], as Flax has kernels",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of decoded tensors (default: bfloat16)")
    parser.add_argument("--decode", action="store_true", help="make floats of FP8 and of GGUF's other types")
    _add_shared(parser)


def add_export(commands) -> None:
    """Add the parser of `ifjax export`."""
    tools = [tool for tool in TOOLS if any(lay.tool == tool and lay.write for lay in LAYOUTS.values())]
    parser = add_command(
        commands, "export", _export, "write a packed checkpoint in another tool's layout",
        "Write a packed checkpoint in the layout of another tool, bit for bit. What the tool cannot decode is\n"
        "refused with the reason: IF formats have no reader elsewhere yet.",
        "ifjax export packed/ Llama-NVFP4/ --to compressed-tensors",
        "ifjax export packed.safetensors model.gguf --to gguf",
        "ifjax export packed/ out/ --to modelopt --refused floats --dry-run",
    )  # fmt: skip
    parser.add_argument("source", type=Path, metavar="SRC", help=_SRC)
    parser.add_argument("target", type=Path, metavar="OUT", help=_OUT.format(".safetensors or .gguf"))
    parser.add_argument("--to", dest="tool", choices=tools, required=True, help="whose layout it gets")
    parser.add_argument(
        "--refused", choices=("error", "floats"), default="error",
        help="what the tool has no layout for is an error (default), or goes out decoded",
    )  # fmt: skip
    parser.add_argument(
        "--common-amax", action="store_true",
        help="quantize again with one amax where the tool takes one factor: for query, key, value; gate, up; a stack "
        "of experts in modelopt; and, as mlx has none, everything for mlx",
    )  # fmt: skip
    _add_shared(parser)


def _add_shared(parser) -> None:
    parser.add_argument(
        "--recast", type=format_name, metavar="FORMAT",
        help="change to this format where no value changes: mxfp4 to nvfp4",
    )  # fmt: skip
    parser.add_argument(
        "--rename", nargs=2, action="append", default=[], metavar=("PATTERN", "NAME"),
        help="names that match the regular expression as a whole become NAME, with \\1 for its first group; of several "
        "the first that matches decides",
    )  # fmt: skip
    parser.add_argument("--shard-size", type=bytes_of, metavar="SIZE", help="of more than this write several files")
    parser.add_argument("--force", action="store_true", help="replace OUT where it is a file that exists")
    add_report(parser)
    add_json(parser)


def _import(options: argparse.Namespace) -> None:
    with as_file_error():
        transfer = plan_import(
            options.source, options.tool, recast=options.recast, fmt=options.fmt, nibbles=options.nibbles,
            axis=options.axis, dtype=options.dtype, decode=options.decode, rename=options.rename,
        )  # fmt: skip
    _run(options, transfer)


def _export(options: argparse.Namespace) -> None:
    with as_file_error(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        transfer = plan_export(options.source, options.tool, recast=options.recast, refused=options.refused,
                               common_amax=options.common_amax, rename=options.rename)  # fmt: skip
    for warning in told:
        print(f"ifjax: warning: {printable(str(warning.message))}", file=sys.stderr)
    _run(options, transfer)


def _run(options: argparse.Namespace, transfer: Transfer) -> None:
    started, report = time.perf_counter(), transfer.report
    check_report(None if options.dry_run else options.report)
    if not options.dry_run:
        check_target(options.source, options.target, options.force)
        with ended_by_signal(), progress_bar(rate=True) as progress, as_file_error():
            tick = ticks(progress, transfer.nbytes)
            transfer.write(options.target, max_shard_bytes=options.shard_size, tick=tick)
    seconds = time.perf_counter() - started
    tell_report(options, report, transfer.nbytes, seconds)
    packed, size = len(report.quantized), size_of(report.totals.bytes_after)
    what = f"{packed} packed tensors, {len(report.entries) - packed} others, {size}"
    tell_sum(options, transfer.nbytes, seconds, what)
