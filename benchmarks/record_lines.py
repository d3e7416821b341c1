"""Lines of the records of formats since IF4, and of what they name that no format of the IF paper needs.

    python benchmarks/record_lines.py

Reads ifjax/formats by its syntax: a record's statement in named.py, then the statements, functions and classes of that
folder that it names, and what these name.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

FORMATS = Path(__file__).resolve().parent.parent / "ifjax" / "formats"
FILES = ("grids.py", "scales.py", "hifloat4.py", "named.py")
SINCE = "# --- since IF4"
METHODS = ("mirrored", "replaced")  # of Grid: what only newer formats call
RECORDS = (
    "HIFLOAT4", "HIFLOAT4_HALF_EVEN", "NVFP4_UE5M3", "FP4_UE5M3", "FP4_E4M3", "FP4_E4M3_46", "NF4_E4M3", "NF4_MIRROR",
    "SPLIT87_PAIR", "QUAD", "OCTET_8", "SFP4", "RAZER", "RAZER_ACT", "MIXFP4",
)  # fmt: skip


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def definitions(file: str) -> Iterator[tuple[str, ast.stmt]]:
    """Yield the names that a file of ifjax/formats defines, each with its statement."""
    for node in ast.parse((FORMATS / file).read_text()).body:
        if isinstance(node, ast.Assign):
            yield from ((n.id, node) for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef) and method.name in METHODS:
                    yield method.name, method


def reach(name: str, known: dict[str, ast.stmt], seen: set[str]) -> set[str]:
    """Add to `seen` all that the definition of a name needs, by name."""
    for node in ast.walk(known[name]):
        other = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if other in known and other not in seen:
            seen.add(other)
            if other != "Grid":  # its methods are counted where they are called
                reach(other, known, seen)
    return seen


def main() -> None:
    known = {name: node for file in FILES for name, node in definitions(file)}
    start = (FORMATS / "named.py").read_text().split(SINCE)[0].count("\n")
    of_paper = {name for name, node in definitions("named.py") if node.lineno <= start}
    of_paper |= {other for name in set(of_paper) for other in reach(name, known, set())}
    print("| format | record | what it needed besides |\n|---|---|---|")
    for record in RECORDS:
        needed = sorted(reach(record, known, set()) - of_paper - {record})
        print(f"| {record} | {lines(known[record])} | {', '.join(f'{n} {lines(known[n])}' for n in needed)} |")


if __name__ == "__main__":
    main()
