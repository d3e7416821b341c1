"""ifjax compare."""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ifjax import measure as analysis
from ifjax.cli.files import IN_HELP, input_file
from ifjax.cli.terminal import (
    add_command,
    add_json,
    add_search,
    as_file_error,
    one_line,
    plain_table,
    printable,
    progress_bar,
    size_of,
    terminal_console,
    tracked,
    without_infinities,
)
from ifjax.exchange import parts_of_quantized
from ifjax.files import FileError, open_file, read_header
from ifjax.formats import FORMATS, get_format
from ifjax.version import __version__

_EACH = 3  # tensors with the most error, and with the least, in the short report


def add_compare(commands) -> None:
    """Add the parser of `ifjax compare`."""
    parser = add_command(
        commands, "compare", _compare, "what each format costs, on the weights of a file or on samples",
        "Quantize the weights of a checkpoint to each format, one tensor at a time, and report bits a value,\n"
        "size, SQNR, relative error and the share of blocks that took another grid than the first. The total\n"
        "comes first, by bits and then by error, then the tensors with the most and the least error; --all prints\n"
        "every tensor.\n"
        "\n"
        "Without FILE: a small sample of pretrained weights that comes with ifjax, and the errors of random\n"
        "samples beside the published ones.",
        "ifjax compare",
        "ifjax compare model.safetensors",
        "ifjax compare --formats all --out plots",
        "ifjax compare model.safetensors --formats if4 nvfp4 --out plots",
        "ifjax compare gpt2.safetensors --axis -2 --json > report.json",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help=IN_HELP)
    parser.add_argument(
        "--formats", nargs="+", type=formats_of, metavar="FORMAT", default=[list(analysis.DEFAULT_FORMATS)],
        help=f"names, separated by spaces or commas, or all (default: {' '.join(analysis.DEFAULT_FORMATS)})",
    )  # fmt: skip
    parser.add_argument(
        "--axis", type=int, default=-1,
        help="the axis that blocks lie along (default: -1, the contraction of weights stored [out, in], as PyTorch "
        "does; -2 for [in, out])",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="print every tensor, and why others were left as they are")
    parser.add_argument(
        "--vectors", action="store_true",
        help="quantize what `ifjax quantize` leaves as well: biases, norms, embeddings, heads",
    )  # fmt: skip
    add_search(parser)
    add_json(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write pareto.png, errors.png and choices.png there")


def formats_of(text: str) -> list[str]:
    """Names with commas between, for argparse."""
    names = [name for name in text.split(",") if name]
    if not names:
        raise argparse.ArgumentTypeError("needs a format's name")
    if names == ["all"]:
        return list(dict.fromkeys(fmt.name for fmt in FORMATS.values()))
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
    with progress_bar() as progress, as_file_error():
        if options.file is None:
            rows = analysis.synthetic_table(formats, search=options.search)
            count = len(formats) * len(analysis.DISTRIBUTIONS)
            synthetic = tuple(tracked(progress, rows, [1] * count, ["random samples"] * count))
            report = measured(options, formats, analysis.sample_path(), analysis.SAMPLE_SOURCE, progress)
        else:
            name = "stdin" if str(options.file) == "-" else options.file.resolve().name
            with input_file(options.file) as path:
                report = measured(options, formats, path, name, progress)
    path = options.file
    if not report.quantized:
        raise FileError(f"{path} has nothing to measure: {_why_nothing(report)}")

    if options.out is not None:  # before printing, which may end early, as in `| head`
        _write_plots(report, options.out)
    if options.json:
        result = {"axis": options.axis, "search": options.search, "version": __version__} | report.to_dict()
        if synthetic is not None:
            result["synthetic"] = [_synthetic_dict(row) for row in synthetic]
        print(json.dumps(without_infinities(result), indent=1))
    else:
        console, report = terminal_console(), _shown(report)
        _print_total(console, report)
        if synthetic is not None:
            _print_synthetic(console, synthetic)
        _print_tensors(console, report, every=options.all)


def measured(options: argparse.Namespace, formats: tuple[str, ...], path: Path, source: str, progress):
    """The report of a checkpoint of one file or several, each tensor shown while it is measured."""
    opened = open_file(path)
    headers = {file: read_header(file) for file in opened.files}
    stored = [entry for header in headers.values() for entry in header]
    kept = parts_of_quantized(opened)
    how = {"axis": options.axis, "everything": options.vectors, "search": options.search, "kept": kept}

    def reports_of(file, header):
        for report in analysis.file_reports(file, header, formats, **how):
            with opened.reader(report.name):  # raises if the file is another one than when its header was read
                yield report

    of_files = (reports_of(file, header) for file, header in headers.items())
    reports = itertools.chain.from_iterable(of_files)
    names, sizes = [entry.name for entry in stored], [entry.nbytes for entry in stored]
    return analysis.Report(source, tuple(tracked(progress, reports, sizes, names)))


def _shown(report):
    """The report with texts that a terminal can be trusted with."""

    def of(tensor):
        texts = {f: getattr(tensor, f) for f in ("name", "dtype", "reason")}
        return dataclasses.replace(tensor, **{f: one_line(text) for f, text in texts.items()})

    return dataclasses.replace(report, source=one_line(report.source), tensors=tuple(map(of, report.tensors)))


def _why_nothing(report) -> str:
    if not report.tensors:
        return "it holds no tensors"
    reasons = {}
    for t in report.tensors:
        reasons.setdefault(f"{t.status}, {t.reason}", []).append(t.name)
    lines = [f"{len(names)} tensors {reason}" for reason, names in reasons.items()]
    hint = " (--vectors takes them too)" if any(t.status == "kept" for t in report.tensors) else ""
    return "; ".join(lines) + hint


def _synthetic_dict(row) -> dict[str, Any]:
    figures = row.error.to_dict() | {"normalized_mse": row.error.normalized_mse}
    published = [number._asdict() for number in row.published]
    return {"distribution": row.distribution, "format": row.fmt, "error": figures, "published": published}


def _write_plots(report, folder: Path) -> None:
    from ifjax.measure import plots

    figures = {"errors.png": plots.plot_errors(report)}
    if all(error.normalized_mse > 0 for error in report.total.values()):
        figures["pareto.png"] = plots.plot_pareto(report.total, report.source)
    if any(error.choice_share is not None for error in report.total.values()):
        figures["choices.png"] = plots.plot_choices(report)
    for name, figure in figures.items():
        figure.savefig(folder / name)
        print(printable(f"wrote {folder / name}"), file=sys.stderr)


def _print_synthetic(console: Console, rows) -> None:
    distributions = list(dict.fromkeys(row.distribution for row in rows))
    cells = {(row.distribution, row.fmt): row for row in rows}
    table = plain_table("format", *distributions)
    for fmt in dict.fromkeys(row.fmt for row in rows):
        table.add_row(fmt, *(_synthetic_cell(cells[distribution, fmt]) for distribution in distributions))
    console.print(f"\nRandom samples of {rows[0].error.values} values: sum error^2 / sum x^2, x 1e-3; lower is better")
    console.print("%: other grid. In brackets: arXiv 2603.28765, Table 1; then an independent numpy program.")
    console.print(table)


def _synthetic_cell(row) -> Text:
    cell = Text(_thousandths(row.error.normalized_mse), "bold")
    if row.error.choice_share is not None:
        cell.append(f"  {row.error.choice_share:.0%}", "not bold")
    published = {number.source.startswith("arXiv"): number.normalized_mse for number in row.published}
    if published:
        numbers = f"{published[True] * 1e3:.1f}; " if True in published else ""
        numbers += _thousandths(published[False]) if False in published else ""
        cell.append(f"\n({numbers.removesuffix('; ')})", "not bold dim")
    return cell


def _thousandths(value: float) -> str:
    return f"{value * 1e3:.2f}" if value > 1e-3 else f"{value * 1e3:.4f}"


def _print_total(console: Console, report) -> None:
    table = plain_table("format", *_FIGURES)
    # An amax a tensor is some thousandths of a bit: formats of one size are in the order of their errors.
    def place(entry):
        return round(entry[1].bits_per_value, 2), entry[1].normalized_mse

    for name, error in sorted(report.total.items(), key=place):
        table.add_row(name, *_figures(error))
    left = [t for t in report.tensors if t.status != "quantized"]
    before, rest = (size_of(sum(t.nbytes for t in tensors)) for tensors in (report.quantized, left))
    console.print(f"{report.source}")
    console.print(f"Total of {len(report.quantized)} tensors, {before} before; {len(left)} others stay ({rest})")
    console.print(table)
    console.print(_TERMS)


def _print_tensors(console: Console, report, every: bool) -> None:
    shown = sorted(report.quantized, key=_error_of, reverse=True)
    short = not every and len(shown) > 2 * _EACH
    console.print()
    if short:
        first = next(iter(report.total))
        console.print(f"The {_EACH} tensors with most error in {first}, and {_EACH} with least; --all prints every one")
        table = plain_table("tensor", "shape", *_FIGURES[2:])
        for t in (*shown[:_EACH], *shown[-_EACH:]):
            table.add_row(Text(t.name), "x".join(map(str, t.shape)), *_figures(t.errors[first])[2:])
        table.columns[0].overflow = "fold"
        console.print(table)
        return
    table = plain_table("tensor", "format", *_FIGURES)
    table.columns[0].overflow = "fold"
    table.columns[1].justify = "left"
    for t in report.quantized:
        columns = zip(*map(_figures, t.errors.values()), strict=True)
        shape = " x ".join(map(str, t.shape))
        name = Text(t.name).append(f"\n{shape} {t.dtype}, {size_of(t.nbytes)}", "dim")
        table.add_row(name, "\n".join(t.errors), *map("\n".join, columns), end_section=True)
    console.print(table)
    left = [t for t in report.tensors if t.status != "quantized"]
    if left:
        console.print("\nNot quantized")
        console.print(_left_table(left))


def _error_of(tensor) -> float:
    return next(iter(tensor.errors.values())).normalized_mse


_TERMS = """\
  SQNR dB       signal to quantization noise, 10 log10(sum x^2 / sum error^2): higher is better
  error %       square root of sum error^2 / sum x^2: lower is better
  other grid %  blocks that took another grid than the format's first; for IF formats, integers"""
_FIGURES = ("bits/value", "size", "SQNR dB", "error %", "other grid %")


def _figures(error) -> tuple[str, ...]:
    share = "" if error.choice_share is None else f"{100 * error.choice_share:.1f}"
    sqnr, relative = f"{error.sqnr_db:.2f}", f"{100 * error.relative_error:.3f}"
    return f"{error.bits_per_value:.3f}", size_of(error.nbytes), sqnr, relative, share


def _left_table(tensors) -> Table:
    table = plain_table("tensor", "count", "size")
    table.columns[0].overflow = "fold"
    table.add_column("why")
    groups: dict[tuple[str, str], list] = {}
    for t in tensors:  # layers that differ in their numbers only share a row; --json lists each tensor
        pattern = re.sub(r"\d+", "*", t.name)
        groups.setdefault((pattern, f"{t.status}: {t.reason}"), []).append(t)
    for (pattern, why), group in groups.items():
        name = group[0].name if len(group) == 1 else pattern
        table.add_row(Text(name), str(len(group)), size_of(sum(t.nbytes for t in group)), Text(why))
    return table
