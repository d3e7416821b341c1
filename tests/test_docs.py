"""The reference names everything that is public. `mkdocs build --strict` finds what it names wrongly."""

import re
from pathlib import Path

import ifjax

ROOT = Path(__file__).resolve().parent.parent
PAGES = {path.name: path.read_text("utf-8") for path in (ROOT / "docs").glob("*.md")}


def test_every_public_name_is_in_the_reference():
    named = set(re.findall(r"^::: ([\w.]+)$", "\n".join(PAGES.values()), re.MULTILINE))
    shown = {name.rsplit(".", 1)[-1] for name in named}
    # A module's page shows its functions; tables of records are told of in words.
    modules = {
        "recipes": "ifjax.training.recipes.Recipe",
        "analysis": "ifjax.measure.errors",
    }  # fmt: skip
    told = {"FORMATS", "__version__"}
    missing = [n for n in ifjax.__all__ if n not in shown | told and modules.get(n) not in named]
    assert not missing
    assert "`ifjax.FORMATS`" in PAGES["formats.md"]


def test_every_page_is_in_the_navigation():
    configured = re.findall(r"^ +- [\w ]+: (\w+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    assert sorted(configured) == sorted(PAGES)
