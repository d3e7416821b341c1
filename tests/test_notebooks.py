"""The notebooks: what a reader on Colab needs is there, outputs are kept, and each runs in a clean kernel.

By default their structure alone is checked. `-m notebooks` executes them; the extra `notebooks` has what that needs.
"""

import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS = 900  # for one cell, on a busy machine

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def outputs(path):
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


def test_notebooks_are_numbered_and_listed():
    stems = [path.stem for path in NOTEBOOKS]
    assert stems and all(re.fullmatch(r"\d\d_[a-z0-9_]+", stem) for stem in stems)
    assert len({stem[:2] for stem in stems}) == len(stems)
    for file in ("README.md", "notebooks/README.md"):
        listed = re.findall(r"\((?:notebooks/)?(\d\d_\w+)\.ipynb\)", (ROOT / file).read_text("utf-8"))
        assert listed == stems, file


@each_notebook
def test_a_notebook_opens_in_colab_and_installs_only_where_ifjax_is_not(path):
    title = source(cells(path, "markdown")[0])
    assert title.startswith("# ")
    badge = re.search(r"\(https://colab\.research\.google\.com/github/([\w./-]+)\)", title)
    assert badge and badge[1].endswith(f"/blob/main/notebooks/{path.name}")
    install, *rest = (source(cell) for cell in cells(path, "code"))
    lines = install.splitlines()
    guard = lines.index('if importlib.util.find_spec("ifjax") is None:')
    assert any('"ifjax[' in line for line in lines[guard:])
    for line in lines:
        assert "pip install" not in line or (line.startswith("    %pip install -q ") and lines.index(line) > guard)
    assert not any("pip install" in code for code in rest)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for wanted in re.findall(r'"ifjax\[([\w,]+)\]', install):
        assert set(wanted.split(",")) <= set(extras)


@each_notebook
def test_a_notebook_is_short_and_keeps_its_outputs(path):
    code = cells(path, "code")
    assert sum(bool(line.strip()) for cell in code for line in source(cell).splitlines()) < 150
    counts = [cell["execution_count"] for cell in code]
    assert counts == list(range(1, len(code) + 1)), "run from the first cell to the last in a fresh kernel"
    assert any("image/png" in output.get("data", {}) for output in outputs(path))
    assert not [output for output in outputs(path) if output["output_type"] == "error"]
    assert not [output for output in outputs(path) if output.get("name") == "stderr"], "warnings"


@each_notebook
def test_a_notebook_names_no_machine(path):
    notebook = json.loads(path.read_text("utf-8"))
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])
    for text in [*map(source, notebook["cells"]), *(json.dumps(o) for o in outputs(path) if "image/png" not in o)]:
        assert not re.search(r"/(home|root|opt|work|tmp|usr|Users)/", text)


@pytest.mark.notebooks
@each_notebook
def test_a_notebook_runs(path, tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    kept = [bool(cell.get("outputs")) for cell in notebook.cells]
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    assert [bool(cell.get("outputs")) for cell in notebook.cells] == kept
