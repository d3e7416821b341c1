"""The command line."""

import argparse
import os
import sys
from collections.abc import Sequence

from ifjax.cli.compare import add_compare
from ifjax.cli.completion import add_completion
from ifjax.cli.convert import add_dequantize, add_quantize
from ifjax.cli.doctor import add_doctor
from ifjax.cli.exchange import add_export, add_import
from ifjax.cli.formats import add_formats
from ifjax.cli.inspect import add_inspect, add_verify
from ifjax.cli.plan import add_plan
from ifjax.cli.terminal import Misused, Parser, sentence
from ifjax.files import FileError
from ifjax.version import __version__


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
    except (FileError, OSError, Misused) as error:
        print(f"ifjax: error: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, Misused) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ifjax", description="Adaptive block-scaled number formats for JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="where to begin:\n"
        "  ifjax formats                      the formats there are: bits, error, bytes\n"
        "  ifjax compare                      what each format costs, on samples\n"
        "  ifjax quantize IN OUT --dry-run    what would be packed, and why not the rest\n"
        "  ifjax import SRC OUT               another tool's 4-bit checkpoint\n"
        "  ifjax COMMAND --help               options and examples\n"
        "  python -m pydoc ifjax              what to call from Python",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ifjax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_formats(commands)
    add_compare(commands)
    add_plan(commands)
    add_quantize(commands)
    add_inspect(commands)
    add_verify(commands)
    add_dequantize(commands)
    add_import(commands)
    add_export(commands)
    add_doctor(commands)
    add_completion(commands, parser)
    return parser
