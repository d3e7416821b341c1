"""The time of products with packed weights on a CPU, compared with decoding first and with dense weights.

    python benchmarks/matmul.py [--size 4096] [--pairs 20] [--processes 3] [--json FILE] [--fmt if4]

x [M, K] times weights W [N, K] ("rows") or [K, N] ("columns"), N = K = size, everything jitted:

    dot         dense weights of x's dtype
    dequantize  `x @ q.dequantize()`: the decoded matrix is written and read again
    packed      `ifjax.einsum`

The three are timed in turn, round by round, in one process, in each of `--processes` fresh processes. A figure is the
median over rounds of the ratio within a round, and then the median over processes, with the spread. The ratio of
processor time is reported too; other load on the machine affects it less.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from codec import alternate, machine

import ifjax

ROWS = (1, 2, 4, 16, 512)
# Upper bounds on the packed product's time, relative to decoding first for one row and to the bf16 dot for many rows.
TARGETS = {("dequantize", 1, "float32"): 0.3, ("dot", 512, "bfloat16"): 1.15}


def products(layout: str, rows: int, dtype: str, size: int, fmt: str):
    """Return the three products as functions without arguments."""
    spec, axis = {"rows": ("mk,nk->mn", 1), "columns": ("mk,kn->mn", 0)}[layout]
    x, w = (jax.random.normal(jax.random.key(i), s).astype(dtype) for i, s in enumerate([(rows, size), (size, size)]))
    q = jax.block_until_ready(ifjax.quantize(w, fmt, axis=axis))
    dot = jax.jit(lambda x, w: jnp.einsum(spec, x, w))
    dequantize = jax.jit(lambda x, q: jnp.einsum(spec, x, q.dequantize()))
    packed = jax.jit(lambda x, q: ifjax.einsum(spec, x, q))
    runs = {"dot": (dot, w), "dequantize": (dequantize, q), "packed": (packed, q)}
    return {name: lambda f=f, weights=weights: f(x, weights) for name, (f, weights) in runs.items()}


def measure(args) -> list[dict]:
    """Return the figures of one process."""
    figures = []
    for layout in ("rows", "columns"):
        for dtype in ("float32", "bfloat16"):
            for rows in ROWS:
                times = alternate(products(layout, rows, dtype, args.size, args.fmt), args.pairs)
                case = {"layout": layout, "type": dtype, "M": rows}
                case |= {f"{name} ms": 1e3 * float(np.median(t[:, 0])) for name, t in times.items()}
                for against in ("dequantize", "dot"):
                    wall, processor = np.median(times["packed"] / times[against], axis=0).tolist()
                    case |= {f"packed / {against}": wall, f"packed / {against}, processor": processor}
                figures.append(case)
                print(case, file=sys.stderr)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--fmt", default="if4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args)))
        return
    command = [sys.executable, __file__, "--child", "--size", str(args.size), "--pairs", str(args.pairs)]
    runs = []
    for _ in range(args.processes):
        done = subprocess.run([*command, "--fmt", args.fmt], stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout))
    described = machine()
    print(f"{args.fmt}, N = K = {args.size}, {args.processes} processes of {args.pairs} rounds. {described}\n")
    print("| W | type | M | dot, ms | dequantize, ms | packed, ms | packed / dequantize | packed / dot | target |")
    print("|---|---|---|---|---|---|---|---|---|")
    for cases in zip(*runs, strict=True):
        case = cases[0]
        cells = [case["layout"], case["type"], str(case["M"])]
        for name in ("dot", "dequantize", "packed"):
            cells.append(f"{statistics.median(c[f'{name} ms'] for c in cases):.1f}")
        target = ""
        for against in ("dequantize", "dot"):
            ratios = [c[f"packed / {against}"] for c in cases]
            processor = statistics.median(c[f"packed / {against}, processor"] for c in cases)
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f}; {processor:.2f})")
            if bound := TARGETS.get((against, case["M"], case["type"])):
                target = f"{bound} of {against}: {'met' if statistics.median(ratios) <= bound else 'missed'}"
        print("| " + " | ".join([*cells, target]) + " |")
    if args.json:
        args.json.write_text(json.dumps({"machine": described, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
