"""For mkdocstrings: docstrings here say `Example:` where the parser of Google style knows `Examples:` only."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Doctests under `Example:` become code, not paragraphs with `>>>` and brackets that look like links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
