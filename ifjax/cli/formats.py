"""ifjax formats."""

import argparse
import json

from rich.progress import Progress

from ifjax import measure as analysis
from ifjax.arrays import packed_shapes
from ifjax.cli.terminal import add_command, add_json, plain_table, progress_bar, terminal_console, tracked
from ifjax.formats import FORMATS, Format, get_format

_SHAPE = (4096, 4096)


def add_formats(commands) -> None:
    """Add the parser of `ifjax formats`."""
    parser = add_command(
        commands, "formats", _formats, "the named formats: bits, error and bytes of each",
        "List the named formats with their grids, bits a value (scales included), the megabytes of a matrix of\n"
        "4096 x 4096 (33.55 in bfloat16), and the squared error of 2^20 normal numbers over their squares, x 1e-3.\n"
        "The fewest bits come first, then the least error. Measuring takes about a second a format.",
        "ifjax formats",
        "ifjax formats if4 nvfp4 mxfp4",
        "ifjax formats --quick",
    )  # fmt: skip
    parser.add_argument("formats", nargs="*", type=_format, metavar="FORMAT", help="names (default: all)")
    parser.add_argument("--quick", action="store_true", help="leave out the error, which has to be measured")
    add_json(parser)


def _format(name: str) -> Format:
    try:
        return get_format(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _formats(options: argparse.Namespace) -> None:
    formats = list(dict.fromkeys(options.formats or FORMATS.values()))
    errors: dict[str, float] = {}
    if not options.quick:
        with progress_bar() as progress:
            errors = _errors(formats, progress)
    formats.sort(key=lambda fmt: (fmt.bits_per_value, errors.get(fmt.name, 0.0)))
    rows = [
        {"format": fmt.name, "grids": list(dict.fromkeys(d.grid.name for d in fmt.decodings)), "block": fmt.block,
         "scale": fmt.scale.name, "bits": fmt.bits_per_value, "bytes": matrix_bytes(fmt), "error": errors.get(fmt.name)}
        for fmt in formats
    ]  # fmt: skip
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    measured = () if options.quick else ("error x 1e-3",)
    table = plain_table("format", "bits", *measured, "MB", "block", "scale", "grids")
    for row in rows:
        error = () if options.quick else (f"{1e3 * row['error']:.2f}",)
        grids = ", ".join(row["grids"][:2]) + (f" and {n} more" if (n := len(row["grids"]) - 2) > 0 else "")
        table.add_row(row["format"], f"{row['bits']:g}", *error, f"{row['bytes'] / 1e6:.2f}", str(row["block"]),
                      row["scale"], grids)  # fmt: skip
    terminal_console().print(table)


def _errors(formats: list[Format], progress: Progress) -> dict[str, float]:
    """Of normal numbers, by the format's name."""
    rows = analysis.synthetic_table(formats, distributions=["normal"])
    names = [fmt.name for fmt in formats]
    return {row.fmt: row.error.normalized_mse for row in tracked(progress, rows, [1] * len(names), names)}


def matrix_bytes(fmt: Format) -> int:
    """Bytes of a matrix of 4096 x 4096: codes, scales and an amax."""
    return sum(a * b for a, b in packed_shapes(_SHAPE, fmt, -1)) + 4 * fmt.has_tensor_scale
