"""The command line."""

import argparse
import os
import sys
from collections.abc import Sequence

from ifjax import __version__
from ifjax import measure as analysis
from ifjax.cli.compare import _add_compare
from ifjax.cli.convert import _add_dequantize, _add_quantize
from ifjax.cli.inspect import _add_inspect, _add_verify
from ifjax.cli.terminal import _Misused, _sentence


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
    except (analysis.FileError, OSError, _Misused) as error:
        print(f"ifjax: error: {_sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, _Misused) else 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ifjax", description="Adaptive block-scaled number formats for JAX.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="where to begin:\n"
        "  ifjax compare                      what each format costs, on samples\n"
        "  ifjax quantize IN OUT --dry-run    what would be packed in a checkpoint, and why not the rest\n"
        "  ifjax COMMAND --help               options and examples\n"
        "  python -m pydoc ifjax              what to call from Python, such as ifjax.quantize(x, fmt='if4')",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"ifjax {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_compare(commands)
    _add_quantize(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_dequantize(commands)
    return parser
