"""What tests are run over: one format of every kind, and tables in which any two settings meet at least once."""

import itertools
from typing import Any

# What an encoder or decoder may treat differently, by the least format that shows it.
KINDS = {
    "nvfp4": "one grid under a tensor's factor",
    "if4": "two grids of one scale, and a selector",
    "fouroversix": "one grid at two scales",
    "mxfp4": "powers of two, rounded up, and no tensor's factor",
    "if3": "codes that cross bytes",
    "nvfp6_e2m3": "codes of six bits",
    "nvint4": "two's complement",
    "fp4_ue5m3_pz": "absolute scales of a byte, never zero",
    "mixfp4": "a scale for each candidate; a tie takes the last",
    "quad": "four grids of any values",
    "sfp4": "moved grids",
    "razer": "a special value in place of -0",
    "hifloat4": "factors for the runs of a block",
}


def pairwise(**choices: list[Any]) -> list[tuple]:
    """Return rows, a value of each choice in the order given, such that any two values of two choices share a row.

    Greedy and deterministic: the next row is the one with the most pairs that no row has yet.
    """
    names = list(choices)
    values = [list(range(len(choices[name]))) for name in names]
    wanted = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i, j in itertools.product(values[a], values[b])
    }
    rows = []
    while wanted:
        first = min(wanted)
        row: list[int | None] = [None] * len(names)
        row[first[0]], row[first[2]] = first[1], first[3]
        for at in range(len(names)):
            if row[at] is None:
                known = [(b, j) for b, j in enumerate(row) if j is not None]
                row[at] = max(
                    values[at],
                    key=lambda i, at=at, known=known: sum(
                        ((at, i, b, j) if at < b else (b, j, at, i)) in wanted for b, j in known
                    ),
                )
        wanted -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)}
        rows.append(tuple(choices[name][i] for name, i in zip(names, row, strict=True)))
    return rows
