"""ifjax completion."""

import argparse
import functools
import itertools
from collections.abc import Iterable
from pathlib import Path

from ifjax.cli.terminal import add_command
from ifjax.formats import FORMATS

_SHELLS = ("bash", "zsh", "fish", "tcsh")
_OF_FORMATS = ("FORMAT", "NAMES")  # how options that take formats call them


def add_completion(commands, whole: argparse.ArgumentParser) -> None:
    """Add the parser of `ifjax completion`."""
    parser = add_command(
        commands, "completion", functools.partial(_completion, whole, commands.choices.values()),
        "completes commands, options and formats on TAB",
        "Print a script for your shell that completes commands, options, names of formats and files. It needs shtab\n"
        "to print it: pip install 'ifjax[completion]'.",
        "ifjax completion bash >> ~/.bashrc",
        "ifjax completion zsh > ~/.zsh/_ifjax    # with that folder in fpath",
        "ifjax completion fish > ~/.config/fish/completions/ifjax.fish",
    )  # fmt: skip
    parser.add_argument("shell", choices=_SHELLS, help="for which shell")


def _completion(
    whole: argparse.ArgumentParser, commands: Iterable[argparse.ArgumentParser], options: argparse.Namespace
) -> None:
    try:
        import shtab
    except ImportError:
        raise OSError("completion needs shtab, which is not installed: pip install 'ifjax[completion]'") from None
    formats = shtab.cmd(f"echo {' '.join(FORMATS)}")
    for action in itertools.chain.from_iterable(command._actions for command in commands):
        if action.type is Path or action.metavar in _OF_FORMATS:  # an attribute that shtab looks for
            setattr(action, "complete", shtab.FILE if action.type is Path else formats)  # noqa: B010
    print(shtab.complete(whole, options.shell))
