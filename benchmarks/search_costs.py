"""Error, temporaries and time of the searches of scales, against plain encoding.

    python benchmarks/search_costs.py [--formats nvfp4 quad] [--searches fast joint soar ...] [--rounds 5]

One matrix of 512 x 1024 normal numbers in float32. Errors are squared errors over the squared signal, x 1e-3;
temporaries those of the compiled program, in bytes a value; seconds are processor seconds of all threads, medians of
rounds in each of which every search and plain encoding are called in turn.
"""

import argparse
import functools

import jax
import numpy as np
from codec import alternate

import ifjax

SEARCHES = ("fast", "joint", "soar", "least_squares", "soar_least_squares")


def rows(fmt: str, searches: list[str], rounds: int) -> list[str]:
    """Return a Markdown row for plain encoding and one for each search."""
    x = jax.random.normal(jax.random.key(1), (512, 1024))
    programs, runs, found = {}, {}, []
    for search in (None, *searches):
        quantize = jax.jit(functools.partial(ifjax.quantize, fmt=fmt, search=search)).lower(x).compile()
        programs[str(search)], runs[str(search)] = quantize, functools.partial(quantize, x)
    seconds = {name: float(np.median(each[:, 1])) for name, each in alternate(runs, rounds).items()}
    for name, program in programs.items():
        error = float(np.square(program(x).dequantize() - x).sum() / np.square(x).sum())
        size = program.memory_analysis().temp_size_in_bytes / x.size
        ratio = seconds[name] / seconds["None"]
        found.append(f"| {fmt} | {name} | {1e3 * error:.2f} | {size:.1f} | {seconds[name]:.4f} | {ratio:.0f} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "quad"])
    parser.add_argument("--searches", nargs="+", default=SEARCHES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print("| format | search | error | temporaries | processor seconds | of plain encoding |\n" + "|---" * 6 + "|")
    for fmt in args.formats:
        for row in rows(fmt, args.searches, args.rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
