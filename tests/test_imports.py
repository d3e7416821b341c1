"""The house stands on its floors: what each module may import, read from the sources with `ast`.

A module imports lower floors only. Within a floor the few arrows are listed one by one: a new one is a decision.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS = {
    "_xla": -1,  # the ground: what the compiler must not be allowed to do
    "grids": 0, "scales": 0, "packing": 0, "rounding": 0, "_hadamard": 0, "layouts": 0,
    "formats": 1,
    "codec": 2,
    "qtensor": 3,
    "_kernels": 4, "_matmul": 4,
    "_gptq": 4, "_mseden": 4, "recipes": 5, "rules": 5, "report": 6, "ptq": 6,
    "flax": 6, "optim": 6, "checkpoint": 6, "analysis": 6, "plots": 6, "mac": 6, "cli": 6, "__main__": 6,
    "_files": 6, "_pieces": 6, "convert": 6, "exchange": 6,
}  # fmt: skip
SAME_FLOOR = {
    ("scales", "grids"), ("rounding", "grids"),
    ("_matmul", "_kernels"),
    ("rules", "recipes"),
    ("ptq", "report"), ("ptq", "flax"),  # what a Flax model says of its parameters
    ("cli", "analysis"), ("cli", "plots"), ("__main__", "cli"),
    # Checkpoints: bytes in files and matrices in pieces, then trees, then what goes from file to file.
    ("_files", "analysis"), ("_pieces", "analysis"),
    ("checkpoint", "_files"), ("checkpoint", "analysis"), ("checkpoint", "ptq"),
    ("convert", "_files"), ("convert", "_pieces"), ("convert", "analysis"), ("convert", "checkpoint"),
    ("convert", "ptq"), ("convert", "report"),
    ("cli", "_files"), ("cli", "checkpoint"), ("cli", "convert"),
    ("exchange", "_files"),
}  # fmt: skip
TOP = max(FLOORS.values())

# Everything else is imported inside the function that needs it: `import ifjax` is light and works without extras.
AT_MODULE_LEVEL = {"ifjax", "pallas_kernels", "jax", "jaxtyping", "ml_dtypes", "numpy", "opt_einsum", "rich"}
ONLY_IN = {"flax": {"flax"}, "optax": {"flax", "optim"}, "pallas_kernels": {"_kernels"}}


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


def find_faults(file: str, source: str) -> list[str]:
    """What is wrong with the imports of `file` (its path from the root), one sentence a fault."""
    package, *inner = Path(file).with_suffix("").parts
    imports = list(read_imports(source, ".".join([package, *inner[:-1]])))
    if package == "pallas_kernels":
        allowed = {"jax", "pallas_kernels"} | sys.stdlib_module_names
        return [
            f"{file}:{line} imports {name}: kernels import jax and the standard library only"
            for name, line, _ in imports
            if name.split(".")[0] not in allowed
        ]

    module = inner[0]
    if module == "__init__":  # the shop window: it shows every floor
        floor = TOP + 1
    elif module in FLOORS:
        floor = FLOORS[module]
    else:
        return [f"{file}: give {module} a floor in {Path(__file__).name}"]

    faults = []
    for name, line, on_import in imports:
        first, *rest = name.split(".")
        if first == "ifjax":
            # A name that is no module comes from ifjax/__init__, which imports the whole house.
            other = rest[0] if rest and rest[0] in FLOORS else "__init__"
            below = FLOORS[other] < floor if other in FLOORS else floor >= TOP
            if not (below or other == module or (module, other) in SAME_FLOOR):
                faults.append(f"{file}:{line} imports {name}: {module} (floor {floor}) may import lower floors only")
        elif first in ONLY_IN and module not in ONLY_IN[first]:
            faults.append(f"{file}:{line} imports {name}: only {sorted(ONLY_IN[first])} may")
        elif first in ONLY_IN or first in AT_MODULE_LEVEL or first in sys.stdlib_module_names:
            pass
        elif on_import:
            faults.append(f"{file}:{line} imports {name} at module level: import it in the function that needs it")
    return faults


PACKAGES = ("ifjax", "pallas_kernels")
FILES = sorted(path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("file", FILES)
def test_each_module_imports_lower_floors_only(file):
    assert find_faults(file, (ROOT / file).read_text(encoding="utf-8")) == []


def test_import_ifjax_leaves_the_extras_alone():
    heavy = {"flax", "optax", "matplotlib", "safetensors", "orbax", "torch", "yaml"}
    code = f"import sys, ifjax; print(sorted({heavy!r} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, "[]"), ran.stderr


def test_arrows_within_a_floor_stay_on_it():
    assert all(FLOORS[a] == FLOORS[b] for a, b in SAME_FLOOR)


@pytest.mark.parametrize(
    "file, source",
    [
        ("ifjax/codec.py", "from ifjax.formats import Format"),
        ("ifjax/codec.py", "from . import grids, scales"),
        ("ifjax/codec.py", "from .rounding import round_to_grid"),
        ("ifjax/codec.py", "import functools\nimport jax.numpy as jnp\nfrom jaxtyping import Array"),
        ("ifjax/cli.py", "import ifjax\nfrom ifjax import analysis"),
        ("ifjax/cli.py", "def read():\n    from safetensors import safe_open"),
        ("ifjax/plots.py", "def show():\n    import matplotlib.pyplot as plt"),
        ("ifjax/plots.py", "if TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("ifjax/_kernels.py", "from pallas_kernels import tiles"),
        ("ifjax/flax/__init__.py", "from .linen import quantize_params"),
        ("ifjax/flax/linen.py", "import flax.linen as nn\nimport optax\nfrom .. import rules\nfrom ..codec import x"),
        ("ifjax/__init__.py", "from ifjax.cli import main\nfrom .codec import encode"),
        ("pallas_kernels/gpu_matmul.py", "import math\nfrom jax.experimental import pallas\nfrom . import tiles"),
    ],
)
def test_checker_accepts(file, source):
    assert find_faults(file, source) == []


@pytest.mark.parametrize(
    "file, source, fault",
    [
        ("ifjax/tricks.py", "", "give tricks a floor"),
        ("ifjax/grids.py", "from ifjax.codec import encode", "lower floors only"),
        ("ifjax/grids.py", "from ifjax import codec", "lower floors only"),
        ("ifjax/grids.py", "from . import codec", "lower floors only"),
        ("ifjax/grids.py", "from .codec import encode", "lower floors only"),
        ("ifjax/grids.py", "import ifjax.codec as c", "lower floors only"),
        ("ifjax/grids.py", "def late():\n    from ifjax.codec import encode", "lower floors only"),
        ("ifjax/grids.py", "try:\n    from ifjax import scales\nexcept ImportError:\n    pass", "lower floors only"),
        ("ifjax/codec.py", "import ifjax", "lower floors only"),
        ("ifjax/codec.py", "from ifjax import quantize", "lower floors only"),
        ("ifjax/codec.py", "from ifjax import *", "lower floors only"),
        ("ifjax/rules.py", "from .flax import linen", "lower floors only"),
        ("ifjax/plots.py", "from ifjax import analysis", "lower floors only"),
        ("ifjax/flax/linen.py", "from ..cli import main", "lower floors only"),
        ("ifjax/ptq.py", "def late():\n    import flax", "only ['flax'] may"),
        ("ifjax/recipes.py", "from optax import tree_utils", "only ['flax', 'optim'] may"),
        ("ifjax/qtensor.py", "def late():\n    from pallas_kernels import tiles", "only ['_kernels'] may"),
        ("ifjax/__init__.py", "import pallas_kernels", "only ['_kernels'] may"),
        ("ifjax/plots.py", "import matplotlib.pyplot as plt", "at module level"),
        ("ifjax/checkpoint.py", "if True:\n    from safetensors import safe_open", "at module level"),
        ("ifjax/checkpoint.py", "class A:\n    import torch", "at module level"),
        ("ifjax/cli.py", "import pandas", "at module level"),
        ("pallas_kernels/tiles.py", "def late():\n    import ifjax", "standard library only"),
        ("pallas_kernels/tiles.py", "import numpy", "standard library only"),
    ],
)
def test_checker_finds(file, source, fault):
    faults = find_faults(file, source)
    assert len(faults) == 1 and fault in faults[0], faults
