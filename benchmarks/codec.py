"""What do quantize and dequantize cost? Against a copy of the same array, against each other, and against others.

    python benchmarks/codec.py [--size 4096] [--pairs 20] [--processes 3] [--json FILE] [--only quantize memory ...]

Absolute times move from hour to hour on a shared machine, and a copy's from process to process. So whatever is compared
is timed in turn, round by round, in one process, and a figure is the median over rounds of the ratio within a round;
`--processes` repeats all of it in fresh processes and gives the median of these medians and their spread. The
tables go to standard output as Markdown, progress to standard error.

The copy is `x + 1` under jit: one pass that reads the array and writes a new one, to memory that was not there before.
Quantize and dequantize allocate theirs as well, and every result is dropped before the next call.

Peers are timed where they are installed, and need not be. `fouroversix` is the authors' code; its reference path on a CPU
needs torch, and neither a GPU nor a build for one: `SKIP_CUDA_BUILD=1 FORCE_BUILD=1 pip install --no-deps
--no-build-isolation fouroversix`, or `--reference DIR` with the folder that holds the package. `qwix`: `pip install qwix`.
"""

import argparse
import concurrent.futures
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import ifjax

FORMATS = ("if4", "if3", "if6", "nvfp4", "fouroversix")
SECTIONS = ("quantize", "dequantize", "search", "growth", "memory", "peers")


class Row(NamedTuple):
    """One figure. `bound` is what it may not exceed, or, if negative, what it may not fall below; None: no target."""

    section: str
    name: str
    unit: str
    value: float
    bound: float | None = None
    ms: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value <= self.bound if self.bound >= 0 else self.value >= -self.bound


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call, its result dropped afterwards."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    seconds = time.perf_counter() - start
    del result
    return seconds


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds [rounds] of each, called in turn after two calls that compile and warm up."""
    for run in runs.values():
        timed(run)
        timed(run)
    times = [[timed(run) for run in runs.values()] for _ in range(rounds)]
    return dict(zip(runs, np.array(times).T, strict=True))


def ratio(times: dict[str, np.ndarray], name: str, against: str) -> float:
    return float(np.median(times[name] / times[against]))


def milliseconds(times: dict[str, np.ndarray], name: str) -> float:
    return 1e3 * float(np.median(times[name]))


def quantizer(fmt: str, **settings):
    """As users call it: inside one jit."""
    return jax.jit(lambda x: ifjax.quantize(x, fmt, **settings))


def inputs(size: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (size, size), jnp.float32)


def copy_of(x: jax.Array) -> Callable[[], jax.Array]:
    copy = jax.jit(lambda x: x + 1)
    return lambda: copy(x)


# --- sections --------------------------------------------------------------------------------------------------------


def quantize_rows(args):
    x = inputs(args.size)
    plain = quantizer("if4")
    base = {"copy": copy_of(x), "if4": lambda: plain(x)}
    times = alternate(base, args.pairs)
    yield Row("quantize", "if4", "x copy", ratio(times, "if4", "copy"), 1.3, milliseconds(times, "if4"))

    wide = x.astype(jnp.bfloat16)
    slices = x.reshape(4, args.size // 4, args.size)
    vmapped = jax.jit(jax.vmap(lambda x: ifjax.quantize(x, "if4")))
    cases = [(fmt, quantizer(fmt), x, 1.0 if fmt == "nvfp4" else 1.5) for fmt in FORMATS[1:]]
    cases += [
        ("if4, bfloat16 input", plain, wide, 1.5),
        ("if4, axis=-2", quantizer("if4", axis=-2), x, 2.0),
        ("if4, vmap over 4 slices", vmapped, slices, 1.5),
    ]
    for name, function, argument, bound in cases:
        times = alternate(base | {name: lambda f=function, a=argument: f(a)}, args.pairs)
        ms = milliseconds(times, name)
        yield Row("quantize", name, "x if4", ratio(times, name, "if4"), bound, ms)
        yield Row("quantize", name, "x copy", ratio(times, name, "copy"), None, ms)


def dequantize_rows(args):
    x = inputs(args.size)
    copy = copy_of(x)
    for fmt in FORMATS:
        q = quantizer(fmt)(x)
        for dtype, bound in (("float32", 1.0), ("bfloat16", 0.8)):
            run = jax.jit(lambda q, dtype=dtype: ifjax.dequantize(q, dtype))
            times = alternate({"copy": copy, "run": lambda run=run, q=q: run(q)}, args.pairs)
            name = f"{fmt} to {dtype}"
            yield Row("dequantize", name, "x copy", ratio(times, "run", "copy"), bound, milliseconds(times, "run"))


def search_rows(args):
    x = inputs(min(args.size, 1024))
    for fmt in ("if4", "nvfp4"):
        runs = {str(s): lambda f=quantizer(fmt, search=s): f(x) for s in (None, "fast", "exhaustive")}
        times = alternate(runs, min(args.pairs, 5))
        for search in ("fast", "exhaustive"):
            name = f'{fmt}, search="{search}"'
            yield Row("search", name, "x plain", ratio(times, search, "None"), None, milliseconds(times, search))


def growth_rows(args):
    plain = quantizer("if4")
    for power in range(4, 9):
        size = 10**power
        x = jax.random.normal(jax.random.key(power), (size,), jnp.float32)
        seconds = statistics.median(alternate({"if4": lambda x=x: plain(x)}, args.pairs if power < 8 else 5)["if4"])
        yield Row("growth", f"if4, 1e{power} values", "ns a value", 1e9 * seconds / size, None, 1e3 * seconds)


def memory_rows(args):
    x = jax.ShapeDtypeStruct((args.size, args.size), jnp.float32)
    cases = [(fmt, fmt, x, {}) for fmt in FORMATS]
    cases += [("if4, bfloat16 input", "if4", x.update(dtype=jnp.bfloat16), {}), ("if4, axis=-2", "if4", x, {"axis": -2})]
    for name, fmt, shape, settings in cases:
        spent = quantizer(fmt, **settings).lower(shape).compile().memory_analysis().temp_size_in_bytes
        yield Row("memory", f"{name}: temporaries", "x input", spent / (shape.size * shape.dtype.itemsize), 0.5)
    for fmt in ("if4", "fouroversix"):
        # A fresh process each: the high-water mark of memory never falls.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            peak = pool.submit(peak_memory, fmt, 2 * args.size).result()
        yield Row("memory", f"{fmt}: peak, input and result included", "x input", peak, 3.0)


def peak_memory(fmt: str, size: int) -> float:
    """Peak resident memory of quantizing [size, size], without what the process held before the input, over the input's."""
    make = jax.jit(lambda: jnp.sin(jnp.arange(size * size, dtype=jnp.float32)).reshape(size, size)).lower().compile()
    run = quantizer(fmt).lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).compile()
    statm = Path("/proc/self/statm")
    unit = 1 if sys.platform == "darwin" else 1024
    if statm.exists():
        before = int(statm.read_text().split()[1]) * resource.getpagesize()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    x = jax.block_until_ready(make())
    q = jax.block_until_ready(run(x))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    del q
    return (peak - before) / x.nbytes


def peer_rows(args):
    x = inputs(args.size)
    yield from reference_rows(args, x)
    if importlib.util.find_spec("qwix") is None:
        yield Row("peers", "qwix, nvfp4", "x ours", float("nan"), note="not installed")
        return
    qwix = importlib.import_module("qwix")
    theirs = jax.jit(lambda x: qwix.quantize(x, "nvfp4", channelwise_axes=(0,), tiled_axes={1: 16}))
    ours = quantizer("nvfp4")
    times = alternate({"ours": lambda: ours(x), "theirs": lambda: theirs(x)}, args.pairs)
    note = f"qwix {importlib.metadata.version('qwix')}: no tensor scale, unpacked, float32 scales"
    yield Row("peers", "qwix, nvfp4", "x ours", ratio(times, "theirs", "ours"), None, milliseconds(times, "theirs"), note)


def reference_rows(args, x):
    """The authors' PyTorch code on the same values, and whether its bytes are ours."""
    names = {"if4": ("if4", "mse"), "fouroversix": ("nvfp4", "mse"), "nvfp4": ("nvfp4", "static_6")}
    reference, missing = import_reference(args.reference)
    if reference is None:
        for fmt in names:
            yield Row("peers", f"reference, {fmt}", "x ours", float("nan"), note=missing)
        return
    import torch

    values = torch.from_numpy(np.array(x))
    version = f"{reference.version} on torch {torch.__version__}"
    for fmt, (dtype, rule) in names.items():
        settings = {"fp4_format": reference.DataType(dtype), "scale_rule": reference.ScaleRule(rule)}

        def theirs(settings=settings):
            return reference.quantize_to_fp4(values, use_blackwell_scale_layout=False, **settings)

        ours = quantizer(fmt)
        q, (codes, scales, _) = ours(x), theirs()
        same_codes = np.mean(np.asarray(q.codes) == codes.numpy())
        same_scales = np.mean(np.asarray(q.scale_bytes()).ravel() == scales.view(torch.uint8).numpy().ravel())
        times = alternate({"ours": lambda ours=ours: ours(x), "theirs": theirs}, 3)
        note = f"{version}; equal bytes: codes {same_codes:.7%}, scales {same_scales:.7%}"
        bound = -60 if fmt == "if4" else None
        found = ratio(times, "theirs", "ours")
        yield Row("peers", f"reference, {fmt}", "x ours", found, bound, milliseconds(times, "theirs"), note)


def import_reference(folder: str | None):
    """(the reference path's module, why not). Its packages are entered without their own imports, which want a GPU's."""
    if folder is None:
        spec = importlib.util.find_spec("fouroversix")
        if spec is None:
            return None, "not installed"
        folder = str(Path(spec.submodule_search_locations[0]).parent)
    root = Path(folder, "fouroversix")
    for name in ("fouroversix", "fouroversix.quantize", "fouroversix.quantize.pytorch"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    try:
        reference = importlib.import_module("fouroversix.quantize.pytorch.reference")
    except ImportError as error:
        return None, f"not importable: {error}"
    try:
        reference.version = f"fouroversix {importlib.metadata.version('fouroversix')}"
    except importlib.metadata.PackageNotFoundError:
        reference.version = "fouroversix, unknown version"
    return reference, ""


# --- report ----------------------------------------------------------------------------------------------------------


def measure(args) -> list[Row]:
    sections = {
        "quantize": quantize_rows,
        "dequantize": dequantize_rows,
        "search": search_rows,
        "growth": growth_rows,
        "memory": memory_rows,
        "peers": peer_rows,
    }
    rows = []
    for section in args.only:
        for row in sections[section](args):
            rows.append(row)
            print(f"{row.section}: {row.name}: {row.value:.3g} {row.unit}", file=sys.stderr, flush=True)
    return rows


def measure_in_children(args) -> list[list[Row]]:
    """The same rows from each of several processes, one after the other."""
    runs = []
    for _ in range(args.processes):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rows.json")
            command = [sys.executable, __file__, "--size", args.size, "--pairs", args.pairs, "--json", file]
            command += ["--only", *args.only]
            command += ["--reference", args.reference] if args.reference else []
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            found = json.loads(file.read_text())["rows"]
        runs.append([Row(**{field: row[field] for field in Row._fields}) for row in found])
    return runs


def merged(rows: tuple[Row, ...]) -> Row:
    values = [row.value for row in rows]
    ms = [row.ms for row in rows if row.ms is not None]
    return rows[0]._replace(value=statistics.median(values), ms=statistics.median(ms) if ms else None)


def machine() -> dict:
    model = platform.processor() or "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    about = {"date": datetime.date.today().isoformat(), "processor": model, "cores": os.cpu_count()}
    about |= {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
    about |= {"ifjax": ifjax.__version__, **versions, "backend": jax.default_backend()}
    return about | {"load average before": load}


def number(value: float | None, places: int = 3) -> str:
    return "" if value is None or value != value else f"{value:.{places}g}"


def report(about: dict, args, rows: list[Row], runs: list[list[Row]]) -> str:
    lines = [f"`benchmarks/codec.py`, {args.size} x {args.size}, median ratio of {args.pairs} rounds, of {len(runs)} processes:"]
    lines += ["", ", ".join(f"{key} {value}" for key, value in about.items() if value is not None), ""]
    lines += ["| section | case | ms | figure | between processes | target | |", "|---|---|---|---|---|---|---|"]
    for i, row in enumerate(rows):
        values = [run[i].value for run in runs]
        spread = f"{number(min(values))}-{number(max(values))}" if len(runs) > 1 and row.value == row.value else ""
        target = "" if row.bound is None else f"{'<=' if row.bound >= 0 else '>='} {abs(row.bound):g}"
        met = {None: "", True: "met", False: "MISSED"}[row.met if row.value == row.value else None]
        figure = f"{number(row.value)} {row.unit}".strip() if row.value == row.value else ""
        note = " ".join(filter(None, (met, row.note)))
        lines.append(f"| {row.section} | {row.name} | {number(row.ms)} | {figure} | {spread} | {target} | {note} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns; a multiple of 64")
    parser.add_argument("--pairs", type=int, default=20, help="rounds of alternating calls for each figure")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes that each measure everything")
    parser.add_argument("--json", type=Path, help="write the figures, the machine and the versions to this file")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help=str(SECTIONS))
    parser.add_argument("--reference", help="folder that holds the package fouroversix, if it is not installed")
    args = parser.parse_args()
    if args.size % 64 or args.size < 64:
        parser.error(f"--size must be a multiple of 64, got {args.size}")

    about = machine()
    runs = [measure(args)] if args.processes == 1 else measure_in_children(args)
    rows = [merged(rows) for rows in zip(*runs, strict=True)]
    print(report(about, args, rows, runs))
    if args.json:
        settings = {"size": args.size, "pairs": args.pairs, "processes": len(runs)}
        listed = [
            row._asdict() | {"met": row.met, "processes": [run[i].value for run in runs]} for i, row in enumerate(rows)
        ]
        args.json.write_text(json.dumps({"machine": about, "settings": settings, "rows": listed}, indent=1) + "\n")


if __name__ == "__main__":
    main()
