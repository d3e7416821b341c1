"""The house stands on its rooms: what each file may import, read from the sources with `ast`.

One ordered list and no list of exceptions. A file imports its own room and lower ones; no name with a leading
underscore leaves its file; no files import each other in a circle; a room's `__init__` lists what it shows.
"""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up. The first three are single files.
ROOMS = (
    "version", "lookup", "atomic", "numerics", "formats", "codec", "arrays", "products", "training", "models", "files",
    "exchange", "convert", "measure", "cli",
)  # fmt: skip
FLOORS = {room: floor for floor, room in enumerate(ROOMS)} | {"__main__": len(ROOMS), "__init__": len(ROOMS)}

# Everything else is imported inside the function that needs it: `import ifjax` is light and works without extras.
AT_MODULE_LEVEL = {"ifjax", "pallas_kernels", "jax", "jaxtyping", "ml_dtypes", "numpy", "opt_einsum", "rich"}
# Folders and files that may import these.
ONLY_IN = {
    "flax": ("ifjax/models/flax/",), "optax": ("ifjax/models/flax/", "ifjax/training/optim.py"),
    "pallas_kernels": ("ifjax/arrays/encoders.py", "ifjax/products/"),
}  # fmt: skip


class Import(NamedTuple):
    name: str  # absolute and dotted, down to the imported name
    line: int
    on_import: bool  # runs when the module is imported, not when a function is called


def read_imports(source: str, package: str) -> Iterator[Import]:
    """Every import of a module of `package`, wherever in the source it stands."""

    def visit(node: ast.AST, on_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, on_import)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{stem}.{alias.name}", node.lineno, on_import)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, on_import)
        else:
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, on_import and not in_function)

    return visit(ast.parse(source), True)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def borrowed(source: str, package: str) -> Iterator[tuple[str, int]]:
    """Names with a leading underscore that come from another file of ours, by import or as an attribute."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                modules.add((alias.asname or alias.name).split(".")[0])
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in modules:
                yield f"{ast.unparse(node.value)}.{node.attr}", node.lineno
    for name, line, _ in read_imports(source, package):
        if name.split(".")[0] in PACKAGES and any(is_private(part) for part in name.split(".")):
            yield name, line


def find_faults(file: str, source: str) -> list[str]:
    """What is wrong with the imports of `file` (its path from the root), one sentence a fault."""
    package, *inner = Path(file).with_suffix("").parts
    dotted = ".".join([package, *inner[:-1]])
    imports = list(read_imports(source, dotted))
    faults = [f"{file}:{line} uses {name}, which is private to its file" for name, line in borrowed(source, dotted)]
    if package == "pallas_kernels":
        allowed = {"jax", "pallas_kernels"} | sys.stdlib_module_names
        return faults + [
            f"{file}:{line} imports {name}: kernels import jax and the standard library only"
            for name, line, _ in imports
            if name.split(".")[0] not in allowed
        ]
    if inner[0] not in FLOORS:
        return [*faults, f"{file}: give {inner[0]} a place in ROOMS of {Path(__file__).name}"]

    room = inner[0]
    for name, line, on_import in imports:
        first, *rest = name.split(".")
        if first == "ifjax":
            # A name that is no room comes from ifjax/__init__, which imports the whole house.
            other = rest[0] if rest and rest[0] in FLOORS else "__init__"
            if FLOORS[other] > FLOORS[room]:
                lower = ", ".join(ROOMS[: FLOORS[room]])
                faults.append(f"{file}:{line} imports {name}: {room} may import {lower} only")
        elif first in ONLY_IN and not file.startswith(ONLY_IN[first]):
            faults.append(f"{file}:{line} imports {name}: only {', '.join(ONLY_IN[first])} may")
        elif first in ONLY_IN or first in AT_MODULE_LEVEL or first in sys.stdlib_module_names:
            pass
        elif on_import:
            faults.append(f"{file}:{line} imports {name} at module level: import it in the function that needs it")
    return faults


PACKAGES = ("ifjax", "pallas_kernels")
FILES = sorted(path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


def test_rooms_are_those_on_disk():
    paths = (ROOT / "ifjax").iterdir()
    assert {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()} == set(FLOORS)


@pytest.mark.parametrize("file", FILES)
def test_each_file_imports_its_room_and_lower_ones(file):
    assert find_faults(file, (ROOT / file).read_text(encoding="utf-8")) == []


def test_no_files_import_each_other_in_a_circle():
    def module_of(file):
        parts = Path(file).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    modules = {module_of(file): file for file in FILES}
    arrows = {}
    for module, file in modules.items():
        package = module if file.endswith("__init__.py") else module.rpartition(".")[0]
        imported = read_imports((ROOT / file).read_text(encoding="utf-8"), package)
        names = {name for i in imported if i.on_import for name in (i.name, i.name.rpartition(".")[0])}
        arrows[module] = {name for name in names if name in modules and name != module}
        # "from ifjax.x import y" where y is a file is an arrow to that file, not to the room's window.
        arrows[module] -= {name for name in arrows[module] if any(n.startswith(f"{name}.") for n in arrows[module])}
    state = {}

    def visit(module, path):
        assert state.get(module) != "open", " -> ".join([*path, module])
        if module not in state:
            state[module] = "open"
            for other in arrows[module]:
                visit(other, [*path, module])
            state[module] = "done"

    for module in modules:
        visit(module, [])


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / "ifjax" / room).is_dir()])
def test_a_room_lists_what_it_shows(room):
    module = importlib.import_module(f"ifjax.{room}")
    assert module.__doc__, f"ifjax.{room} needs a docstring"
    shown = module.__all__
    assert len(set(shown)) == len(shown) and not [name for name in shown if name.startswith("_")]
    for name in shown:
        assert getattr(module, name) is not None
    source = (ROOT / "ifjax" / room / "__init__.py").read_text(encoding="utf-8")
    names = [name for name, _, _ in read_imports(source, f"ifjax.{room}")]
    imported = {name.rpartition(".")[2] for name in names if name.startswith("ifjax")}
    assert imported <= set(shown), f"imported, but not in __all__: {sorted(imported - set(shown))}"


def test_import_ifjax_leaves_the_extras_alone():
    heavy = {"flax", "optax", "matplotlib", "safetensors", "orbax", "torch", "yaml"}
    code = f"import sys, ifjax; print(sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_what_the_package_shows_by_name_is_there():
    import ifjax

    for name in ifjax.__all__:
        assert getattr(ifjax, name) is not None


@pytest.mark.parametrize(
    "file, source",
    [
        ("ifjax/codec/encode.py", "from ifjax.formats import Format"),
        ("ifjax/codec/encode.py", "from . import blocks, decode"),
        ("ifjax/codec/encode.py", "from .rounding import NEAREST"),
        ("ifjax/codec/encode.py", "import functools\nimport jax.numpy as jnp\nfrom jaxtyping import Array"),
        ("ifjax/codec/encode.py", "class A:\n    def f(self):\n        return self._x + other._y"),
        ("ifjax/cli/main.py", "from ifjax import measure"),
        ("ifjax/files/orbax.py", "def read():\n    from safetensors import safe_open"),
        ("ifjax/measure/plots.py", "def show():\n    import matplotlib.pyplot as plt"),
        ("ifjax/measure/plots.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("ifjax/products/backends.py", "from pallas_kernels import tiles"),
        ("ifjax/models/flax/linen.py", "import flax.linen as nn\nimport optax\nfrom ...codec import x"),
        ("ifjax/__init__.py", "from ifjax.cli import main\nfrom .codec import encode"),
        ("pallas_kernels/gpu_matmul.py", "import math\nfrom jax.experimental import pallas\nfrom . import tiles"),
    ],
)
def test_checker_accepts(file, source):
    assert find_faults(file, source) == []


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("ifjax/tricks.py", "", "give tricks a place"),
        ("ifjax/formats/grids.py", "from ifjax.codec import encode", "formats may import"),
        ("ifjax/formats/grids.py", "from ifjax import codec", "formats may import"),
        ("ifjax/formats/grids.py", "from .. import codec", "formats may import"),
        ("ifjax/formats/grids.py", "from ..codec import encode", "formats may import"),
        ("ifjax/formats/grids.py", "import ifjax.codec as c", "formats may import"),
        ("ifjax/formats/grids.py", "def late():\n    from ifjax.codec import encode", "formats may import"),
        ("ifjax/formats/grids.py", "try:\n    from ifjax import arrays\nexcept ImportError:\n    pass", "may import"),
        ("ifjax/codec/encode.py", "import ifjax", "codec may import"),
        ("ifjax/codec/encode.py", "from ifjax import quantize", "codec may import"),
        ("ifjax/codec/encode.py", "from ifjax import *", "codec may import"),
        ("ifjax/codec/encode.py", "from ifjax.formats.grids import _hidden", "private to its file"),
        ("ifjax/codec/encode.py", "from ifjax.codec import search\nsearch._word(1)", "private to its file"),
        ("ifjax/models/rules.py", "from ifjax.measure import plots", "models may import"),
        ("ifjax/models/flax/linen.py", "from ...cli import main", "models may import"),
        ("ifjax/models/ptq.py", "def late():\n    import flax", "only ifjax/models/flax/ may"),
        ("ifjax/training/recipes.py", "from optax import tree_utils", "ifjax/training/optim.py may"),
        ("ifjax/arrays/qtensor.py", "def late():\n    from pallas_kernels import tiles", "ifjax/products/ may"),
        ("ifjax/__init__.py", "import pallas_kernels", "ifjax/products/ may"),
        ("ifjax/measure/plots.py", "import matplotlib.pyplot as plt", "at module level"),
        ("ifjax/files/orbax.py", "if True:\n    from safetensors import safe_open", "at module level"),
        ("ifjax/files/orbax.py", "class A:\n    import torch", "at module level"),
        ("ifjax/cli/main.py", "import pandas", "at module level"),
        ("pallas_kernels/tiles.py", "def late():\n    import ifjax", "standard library only"),
        ("pallas_kernels/tiles.py", "import numpy", "standard library only"),
    ],
)
def test_checker_finds(file, source, fault):
    faults = find_faults(file, source)
    assert len(faults) == 1 and fault in faults[0], faults
