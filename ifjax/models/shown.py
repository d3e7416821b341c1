"""Display of results and progress: tables as text, progress bars on stderr."""

import io
import sys
from typing import Any

from rich.console import Console
from rich.progress import Progress


def as_text(shown: Any, width: int) -> str:
    """Return what rich prints of an object, without colours and trailing spaces."""
    file = io.StringIO()
    console = Console(
        file=file, width=width, color_system=None, markup=False, highlight=False, emoji=False, force_jupyter=False,
    )  # fmt: skip
    console.print(shown)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def bar_on_stderr(progress: bool | None) -> Progress:
    """Return a progress bar on stderr that disappears at its end; None shows it only if stderr is a terminal."""
    shown = sys.stderr.isatty() if progress is None else progress
    # In notebooks rich would draw with ipywidgets, and warn if they are not installed.
    console = Console(file=sys.stderr, force_jupyter=False)
    return Progress(console=console, disable=not shown, transient=True)
