"""ifjax plan."""

import argparse
import math
import re
from pathlib import Path

from rich.text import Text

from ifjax.cli.compare import formats_of, measured
from ifjax.cli.files import IN_HELP, check_report
from ifjax.cli.terminal import (
    Misused,
    add_command,
    add_search,
    as_file_error,
    one_line,
    plain_table,
    printable,
    progress_bar,
    terminal_console,
)
from ifjax.files import FileError
from ifjax.formats import get_format
from ifjax.models.budget import choose
from ifjax.models.names import site_of_tensor
from ifjax.models.rule_files import save_rules, suffix_of
from ifjax.models.rules import Rule


def add_plan(commands) -> None:
    """Add the parser of `ifjax plan`."""
    parser = add_command(
        commands, "plan", _plan, "choose a format for each tensor under a budget of bits",
        "Measure what each format costs each weight of a checkpoint, and write rules that take the least sum of\n"
        "relative errors within a budget, for `ifjax quantize --rules`. No data is needed, and every tensor counts\n"
        "the same; ifjax.plan_formats plans by a model's own loss.",
        "ifjax plan model.safetensors --budget 4.6 --out rules.yaml",
        "ifjax plan model.safetensors --budget 5 --formats if3,if4,if6 --out rules.json",
    )  # fmt: skip
    parser.add_argument("file", type=Path, metavar="FILE", help=IN_HELP)
    parser.add_argument("--budget", type=float, required=True, metavar="BITS", help="mean bits a value")
    parser.add_argument("--formats", type=formats_of, default=["if3", "if4", "if6"], metavar="NAMES",
                        help="to choose from, with commas between (if3,if4,if6)")  # fmt: skip
    parser.add_argument("--axis", type=int, default=-1, choices=(-1, -2), help="as for `ifjax quantize` (-1)")
    parser.add_argument("--out", type=Path, required=True, metavar="RULES", help="YAML or JSON file to write")
    add_search(parser)
    parser.set_defaults(vectors=False)


def _plan(options: argparse.Namespace) -> None:
    if len(options.formats) < 2:
        raise Misused("--formats needs two at least, to choose from")
    if not math.isfinite(options.budget):
        raise Misused(f"--budget must be a number of bits, such as 4.5, got {options.budget}")
    check_report(options.out)
    with as_file_error():
        suffix_of(options.out)
    with progress_bar() as progress, as_file_error():
        report = measured(options, tuple(options.formats), options.file, options.file.name, progress)
    tensors = report.quantized
    if not tensors:
        raise FileError(f"{options.file} has nothing to plan: no tensor would be quantized by default")
    errors = [[t.errors[name] for name in options.formats] for t in tensors]
    values = [row[0].values for row in errors]
    amax = [32 * get_format(name).has_tensor_scale for name in options.formats]  # not counted, as by ifjax.plan_formats
    costs = [[8 * e.nbytes - bits for e, bits in zip(row, amax, strict=True)] for row in errors]
    losses = [[e.normalized_mse for e in row] for row in errors]
    try:
        chosen = choose(costs, losses, options.budget * sum(values))
    except ValueError as error:
        raise Misused(f"--budget {options.budget:g}: {error}") from None
    table = plain_table("tensor", "format", "bits", "relative error, x 1e-3")
    rules = []  # one for each: the paths of a large model are too many for one expression
    for t, c, cost, loss, n in zip(tensors, chosen.choices, costs, losses, values, strict=True):
        name = options.formats[c]
        path = site_of_tensor(t.name, t.shape, options.axis).path
        rules.append(Rule(re.escape(path), name, search=options.search))
        table.add_row(Text(one_line(t.name) or ""), name, f"{cost[c] / n:.2f}", f"{1e3 * loss[c]:.2f}")
    save_rules((*rules, Rule(".*", None, optional=True)), options.out)
    console = terminal_console()
    console.print(table)
    console.print(f"{chosen.cost / sum(values):.3f} bits a value; wrote {printable(str(options.out))}", highlight=False)
