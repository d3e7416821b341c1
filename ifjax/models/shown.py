"""How results and progress are shown: tables as text, bars on stderr."""

import io
import sys
from typing import Any

from rich.console import Console
from rich.progress import Progress


def as_text(shown: Any, width: int) -> str:
    """What rich prints of something, without colours and without spaces at the ends of lines."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, color_system=None, markup=False, highlight=False, emoji=False, force_jupyter=False,
    )  # fmt: skip
    console.print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def bar_on_stderr(progress: bool | None) -> Progress:
    """A bar that is gone when it is done: if it is asked for, and where stderr is a terminal unless told."""
    shown = sys.stderr.isatty() if progress is None else progress
    return Progress(console=Console(file=sys.stderr), disable=not shown, transient=True)
