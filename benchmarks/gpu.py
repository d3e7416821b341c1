"""The time of products with packed weights on an NVIDIA GPU, compared with bfloat16 and other products.

    python benchmarks/gpu.py [--json FILE] [--minutes 7.5] [--shapes 4096x4096 ...] [--rows 1 16 ...] [--dry]

First the encoders' and decoders' bits are compared with golden vectors and with XLA's, and products with float64. If
one is wrong, nothing is timed and the exit code is 1. Then all
contenders of a cell (M rows of x, N x K weights) are timed in turn, round by round; a ratio is the median of the ratios
within a round. One call runs the product on many weights, each with its own x. Together they are several times larger
than the L2 cache, so that weights are read from memory, as in a model, and the cost of dispatch is shared. The calls
include reordering and padding of x; weights are packed before.

The contenders are IF4 and NVFP4 through the kernel, with x in float16 and bfloat16; `jnp.dot` in bfloat16, to which all
others are compared; dequantize and dot by XLA; and PyTorch's bfloat16 and int4 (groups of 32) if torch is installed.
The targets are: for up to 64 rows and the two large shapes, at least 2.5 times as fast as bfloat16; from 4096 rows on,
at least 0.85 times as fast, through the kernel or by XLA, whichever is faster. Finally quantize is timed, in GB/s of
the bytes that it must read and write, and compared with a copy. Cells that are not reached within the minutes are
listed.

The table is written to standard output as Markdown, progress to standard error. Without a GPU the program prints this
and exits with code 2. `--dry` tests the program without one: kernels are interpreted, XLA multiplies,
shapes are tiny.
"""

import argparse
import datetime
import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import jax
import jax.numpy as jnp
import numpy as np
from kernel_checks import faults_of_encoders, faults_of_golden, interpret_kernels

import ifjax
from pallas_kernels import gpu_blocks

SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 8192)
BYTES = 600e6  # bytes of packed weights in one call
ROUNDS = 7


class Machine(NamedTuple):
    """Where kernels are measured.

    Attributes:
        script: name of the script.
        platform: JAX's name of the platform.
        name: what the platform is called in messages.
        impl: name of the kernel for products.
        dtypes: dtypes of x in products, each with the bound on errors relative to the norm of the result. It covers a
            float32 sum and, in bfloat16, one rounding of each weight by at most 2^-8 of it.
        blocks: module of the kernels that encode and decode.
    """

    script: str
    platform: str
    name: str
    impl: str
    dtypes: tuple[tuple[Any, float], ...]
    blocks: Any


GPU = Machine(
    "gpu.py", "gpu", "an NVIDIA GPU", "hopper", ((jnp.bfloat16, 2.0**-8), (jnp.float16, 1e-5)), gpu_blocks
)  # fmt: skip


class Cell(NamedTuple):
    """The result of one contender: microseconds, and its speed relative to jnp.dot in bfloat16."""

    m: int
    n: int
    k: int
    contender: str
    microseconds: float
    speedup: float


def errors_of_kernels(
    machine: Machine, formats: tuple[str, ...] = ("if4", "nvfp4", "fouroversix", "nvint4")
) -> list[tuple[str, float, float]]:
    """Return (name, error, bound) of each kind of product, with errors relative to the result's norm."""
    rng, impl = np.random.default_rng(0), machine.impl
    found = []
    for fmt in formats:
        for m, n, k in ((1, 512, 1024), (5, 200, 1008), (64, 512, 2048), (300, 384, 1024), (1024, 256, 512)):
            w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
            for dtype, bound in machine.dtypes:
                q = ifjax.quantize(w.astype(dtype), fmt, axis=-2)
                x = jnp.asarray(rng.standard_normal((m, k)), dtype)
                y = ifjax.matmul(x, prepack(q, impl), preferred_element_type=jnp.float32, impl=impl)
                wanted = np.asarray(x, np.float64) @ np.asarray(q.dequantize(jnp.float32), np.float64)
                error = float(np.linalg.norm(np.asarray(y, np.float64) - wanted) / np.linalg.norm(wanted))
                found.append((f"{fmt} {m} x {n} x {k} {jnp.dtype(dtype).name}", error, bound))
    return found


def prepack(q, impl: str):
    return q if impl == "xla" else ifjax.prepack(q)


def copies(tree, count: int) -> list:
    """Return `count` copies of a tree's arrays, each in its own memory."""
    return [tree, *(jax.tree.map(jnp.copy, tree) for _ in range(count - 1))]


def over_all(product: Callable) -> Callable:
    """Return one program that computes the product of each x with its weights."""
    one = jax.jit(product)
    return jax.jit(lambda xs, ws: [one(x, w) for x, w in zip(xs, ws, strict=True)])


def contenders(m: int, n: int, k: int, machine: Machine) -> tuple[int, dict[str, Callable[[], Any]]]:
    """Return the number of products per call, and the calls by name."""
    count, impl = max(4, int(BYTES / (n * k * 0.5625))) if n * k >= 2**20 else 4, machine.impl
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((m, k)), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(0), (k, n), jnp.bfloat16)
    # x is copied only if it is small. A large x is read from memory in any case.
    xs = copies(x, count) if m <= 64 else [x] * count
    each_x = xs if m <= 64 else xs[:1]
    others = [[x.astype(dtype) for x in each_x] * (count // len(each_x)) for dtype, _ in machine.dtypes]
    calls = {"bfloat16": functools.partial(over_all(jnp.dot), xs, copies(w, count))}
    kernel = functools.partial(ifjax.matmul, impl=impl)
    # A product has the promoted dtype of x and of the quantized weights, so both have the same dtype.
    for fmt, inputs in (*(("if4", each) for each in others), ("nvfp4", xs)):
        dtype = inputs[0].dtype
        q = ifjax.quantize(w.astype(dtype), fmt, axis=-2)
        calls[f"{fmt}, {dtype.name}"] = functools.partial(over_all(kernel), inputs, copies(prepack(q, impl), count))
        if "if4, XLA" not in calls:
            xla = functools.partial(ifjax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), impl="xla")
            calls["if4, XLA"] = functools.partial(over_all(xla), inputs, copies(q, count))
    if importlib.util.find_spec("torch") is not None:
        calls |= torch_calls(m, n, k, count)
    return count, calls


def torch_calls(m: int, n: int, k: int, count: int) -> dict[str, Callable[[], Any]]:
    """Return the calls of the same products by PyTorch; {} if it has no GPU."""
    import torch

    if not torch.cuda.is_available():
        return {}
    x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
    weights = [torch.randn(n, k, dtype=torch.bfloat16, device="cuda") for _ in range(count)]

    def run(product, weights):
        for w in weights:
            product(w)
        torch.cuda.synchronize()

    calls = {"torch bfloat16": functools.partial(run, lambda w: torch.nn.functional.linear(x, w), weights)}
    try:
        codes = torch.randint(0, 255, (n, k // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.ones(k // 32, n, 2, dtype=torch.bfloat16, device="cuda")
        int4 = [packed.clone() for _ in range(count)]
        call = functools.partial(run, lambda w: torch.ops.aten._weight_int4pack_mm(x, w, 32, scales), int4)
        call()
        calls["torch int4"] = call
    except Exception as error:  # a private function of PyTorch, which differs between versions
        print(f"torch int4 left out: {str(error).splitlines()[0]}", file=sys.stderr)
    return calls


def seconds_in_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of each call in each round, after one call that compiles; calls that fail are left out."""
    for name, call in list(calls.items()):
        try:
            jax.block_until_ready(call())
        except Exception as error:
            print(f"  {name} left out: {str(error).splitlines()[0]}", file=sys.stderr)
            del calls[name]
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in times.items()}


def cells(m: int, n: int, k: int, machine: Machine, rounds: int = ROUNDS) -> list[Cell]:
    count, calls = contenders(m, n, k, machine)
    times = seconds_in_turn(calls, rounds)
    base = times["bfloat16"]
    return [
        Cell(m, n, k, name, float(np.median(seconds)) / count * 1e6, float(np.median(base / seconds)))
        for name, seconds in times.items()
    ]


def quantize_rates(
    size: int, rounds: int = ROUNDS, formats: tuple[str, ...] = ("if4", "nvfp4", "fouroversix")
) -> list[dict]:  # fmt: skip
    """Return the rates of quantize and of a copy, in GB/s of the bytes that they must move, and their ratio."""
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        xs = copies(jax.random.normal(jax.random.key(0), (size, size), dtype), 4)
        read = size * size * jnp.dtype(dtype).itemsize
        programs = {"copy": (jax.jit(lambda xs: [x + 1 for x in xs]), 2 * read)}
        for fmt in formats:
            quantize = functools.partial(ifjax.quantize, fmt=fmt)
            programs[fmt] = jax.jit(lambda xs, f=quantize: [f(x) for x in xs]), read + size * size * 0.5625
        times = seconds_in_turn({name: functools.partial(f, xs) for name, (f, _) in programs.items()}, rounds)
        rates = {name: 4 * programs[name][1] / seconds / 1e9 for name, seconds in times.items()}
        for name, rate in rates.items():
            part = float(np.median(rate / rates["copy"]))
            rows.append({"what": f"{name} {jnp.dtype(dtype).name}", "gbs": float(np.median(rate)), "of copy": part})
    return rows


def targets(results: list[Cell]) -> list[dict]:
    """Return for each target whether it is met; targets without measurements are left out."""
    found = []
    for m, n, k in dict.fromkeys((cell.m, cell.n, cell.k) for cell in results):
        here = {cell.contender: cell.speedup for cell in results if (cell.m, cell.n, cell.k) == (m, n, k)}
        ours = {name: value for name, value in here.items() if name.startswith("if4")}
        few = m <= 64 and n * k >= 8192 * 8192
        if ours and (few or m >= 4096):
            wanted, best = 2.5 if few else 0.85, max(ours, key=lambda name: ours[name])
            met = ours[best] >= wanted
            found.append({"m": m, "n": n, "k": k, "wanted": wanted, "got": ours[best], "by": best, "met": met})
    return found


def report(about: dict, results: list[Cell], rates: list[dict], skipped: list[str]) -> str:
    def table(*header: str) -> list[str]:
        return ["", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]

    lines = [f"# {about['script']} on {about['device']}, {about['date']}", ""]
    lines += [f"jax {about['jax']}; {about['rounds']} rounds."]
    lines += table("M", "N x K", "contender", "us", "times as fast as bfloat16", "TB/s of weights", "Tflop/s")
    for m, n, k, name, microseconds, speedup in results:
        bits = 16 if name in ("bfloat16", "torch bfloat16") else 4.5
        rates_ = f"{n * k * bits / 8 / microseconds / 1e6:.2f} | {2 * m * n * k / microseconds / 1e6:.0f}"
        lines.append(f"| {m} | {n} x {k} | {name} | {microseconds:.1f} | {speedup:.2f} | {rates_} |")
    lines += table("target", "wanted", "got", "by", "met")
    for row in targets(results):
        what, met = f"{row['m']} x {row['n']} x {row['k']}", "yes" if row["met"] else "**no**"
        lines.append(f"| {what} | {row['wanted']} | {row['got']:.2f} | {row['by']} | {met} |")
    lines += table("quantize", "GB/s", "of a copy")
    lines += [f"| {row['what']} | {row['gbs']:.0f} | {row['of copy']:.2f} |" for row in rates]
    return "\n".join([*lines, "", *(f"Not reached: {cell}" for cell in skipped)])


def faults(machine: Machine, dry: bool) -> int:
    """Compare all kernels with what they must give, and return the number of those that are wrong."""
    found = 0
    checks = [*faults_of_golden(("mxfp4",))] if dry else [*faults_of_golden(), *faults_of_encoders()]
    for name, fault in checks:
        print(f"{'bits' if fault is None else 'WRONG'} {name} {fault or ''}", file=sys.stderr)
        found += fault is not None
    for what, error, bound in errors_of_kernels(machine, ("nvfp4",)) if dry else errors_of_kernels(machine):
        wrong = not error <= bound
        print(f"{'WRONG' if wrong else 'error'} {error:.1e} of at most {bound:.1e} {what}", file=sys.stderr)
        found += wrong
    return found


def main(machine: Machine = GPU) -> int:
    """Check and measure the kernels; return the exit code: 1 if one is wrong, 2 if there is no such machine."""
    parser = argparse.ArgumentParser(f"python benchmarks/{machine.script}")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="of weights, NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="of x")
    parser.add_argument("--dry", action="store_true", help="interpret kernels, on tiny shapes, to test this program")
    args = parser.parse_args()
    with ifjax.kernels("never" if args.dry else "auto"):  # the interpreter is asked for where it is tested
        return measure(machine, args)


def measure(machine: Machine, args: argparse.Namespace) -> int:
    """Check and measure the kernels as `main` was asked to."""
    end = time.monotonic() + 60 * args.minutes
    device, rounds = jax.devices()[0], 1 if args.dry else ROUNDS
    if args.dry:
        interpret_kernels(machine.blocks)
        machine = machine._replace(impl="xla")
        args.shapes, args.rows = ["128x128"], [1]
    elif device.platform != machine.platform:
        print(f"{machine.script} measures on {machine.name}, and here is a {device.platform}: run it there.",
              file=sys.stderr)  # fmt: skip
        return 2
    if faults(machine, args.dry):
        return 1

    rates = quantize_rates(64, rounds, ("nvfp4",)) if args.dry else quantize_rates(8192, rounds)
    results, skipped, longest = [], [], 0.0
    # The largest weights come last. They take the longest, and if time runs out, smaller ones were measured at every M.
    for n, k in (map(int, shape.split("x")) for shape in args.shapes):
        for m in args.rows:
            if time.monotonic() + longest > end:
                skipped.append(f"{m} x {n} x {k}")
                continue
            start = time.monotonic()
            found = cells(m, n, k, machine, rounds)
            longest = max(longest, time.monotonic() - start)
            results += found
            print(
                f"{m} x {n} x {k}: {', '.join(f'{c.contender} {c.microseconds:.1f}' for c in found)}", file=sys.stderr
            )
    about = {
        "script": machine.script,
        "device": device.device_kind + ", dry: these are no figures" * args.dry,
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "rounds": rounds,
    }
    print(report(about, results, rates, skipped))
    if args.json:
        figures = {"cells": [cell._asdict() for cell in results], "quantize": rates, "targets": targets(results)}
        args.json.write_text(json.dumps(about | figures | {"not reached": skipped}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
