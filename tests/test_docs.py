"""README and site: the reference names all that is public, and code in pages runs and prints what stands below it.

`mkdocs build --strict` finds links and names that lead nowhere.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
from pathlib import Path

import jax
import pytest

import ifjax
from ifjax import cli

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in DOCS.rglob("*.md")}
README = (ROOT / "README.md").read_text("utf-8")
WITH_CODE = {"README.md": README} | {name: page for name, page in PAGES.items() if "```python" in page}


def test_every_public_name_is_in_the_reference():
    named = set(re.findall(r"^::: ([\w.]+)$", "\n".join(PAGES.values()), re.MULTILINE))
    shown = {name.rsplit(".", 1)[-1] for name in named}
    # A module's page shows its functions; tables of records are told of in words.
    modules = {
        "recipes": "ifjax.training.recipes.Recipe",
        "analysis": "ifjax.measure.errors",
        "checkpoint": "ifjax.files",
    }  # fmt: skip
    told = {"FORMATS", "__version__"}
    missing = [n for n in ifjax.__all__ if n not in shown | told and modules.get(n) not in named]
    assert not missing
    assert "`ifjax.FORMATS`" in PAGES["formats.md"]


def test_every_page_is_in_the_navigation():
    configured = re.findall(r"^ +- [^:]+: ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text("utf-8"), re.MULTILINE)
    notebooks = {f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert len(set(configured)) == len(configured)
    made = {"cli.md", "changelog.md", "spec/layout.md"}  # by docs/_site.py
    assert set(configured) == set(PAGES) | notebooks | made


@pytest.mark.filterwarnings("default")
@pytest.mark.docs
@pytest.mark.parametrize("name", WITH_CODE)
def test_code_in_a_page_runs_and_prints_what_it_says(name, tmp_path, monkeypatch):
    """Blocks go on from those above. Lines of comment that end a block are what it prints."""
    for library in set(re.findall(r"^import (equinox)", WITH_CODE[name], re.MULTILINE)) | {"flax"}:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for language, block in re.findall(r"^```(python|bash)\n(.*?)^```$", WITH_CODE[name], re.MULTILINE | re.DOTALL):
        if language == "bash":
            for line in block.splitlines():
                assert line.startswith(("ifjax ", "python3 -m venv ")), line  # the latter are what CI runs
                if line.startswith("ifjax "):
                    assert cli.main(shlex.split(line)[1:]) == 0
            continue
        # As for users: the other tests make promotions an error.
        as_it_is = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
        with contextlib.redirect_stdout(io.StringIO()) as printed, as_it_is[0], as_it_is[1]:
            exec(compile(block, name, "exec"), names)
        expected = re.search(r"(?:^# .*\n)+\Z", block, re.MULTILINE)
        if expected:
            assert printed.getvalue() == re.sub(r"^# ", "", expected[0], flags=re.MULTILINE)


def test_the_readme_is_short_and_its_links_lead_to_files():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_page_of_the_command_line_has_every_command():
    pytest.importorskip("mkdocs")
    page = runpy.run_path(os.fspath(DOCS / "_site.py"))["command_line"]()
    assert {"formats", "dequantize", "export", "completion"} <= set(re.findall(r"^## ifjax (\w+)$", page, re.MULTILINE))


def test_every_result_is_listed_where_performance_is_told():
    results = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.md")}
    listed = PAGES["performance.md"].split("## All measurements")[1]
    assert set(re.findall(r"\(\.\./benchmarks/results/([\w-]+\.md)\)", listed)) == results


def test_the_gallery_has_every_format_as_it_is():
    made = runpy.run_path(os.fspath(DOCS / "_gallery.py"))
    rows = re.findall(r"^\| (\[`.*) \|$", PAGES["gallery.md"], re.MULTILINE)
    facts = [made["facts"](fmt) for fmt in made["distinct"]()]
    assert [[*cells[:2], *cells[4:]] for cells in (row.split(" | ") for row in rows)] == facts
    for fmt in made["distinct"]():
        assert f"## {fmt.name}\n\n{fmt.doc}\n" in PAGES["gallery.md"], "python docs/_gallery.py"
        assert (DOCS / "pictures" / "grids" / f"{fmt.name}.png").exists()
    figures = next(row for row in rows if "`mxfp4`" in row).split(" | ")
    assert figures[2] == made["error_of"](ifjax.get_format("mxfp4"), "normal")
