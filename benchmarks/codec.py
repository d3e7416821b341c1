"""The time and memory of quantize and dequantize, compared with a copy of the same array and with other libraries.

    python benchmarks/codec.py [--size 4096] [--pairs 20] [--processes 3] [--json FILE] [--only quantize memory ...]

On a shared machine absolute times change from hour to hour, and those of a copy from process to process. Therefore the
programs that are compared are timed in turn, round by round, in one process. A figure is the median over rounds of the
ratio within a round. `--processes` repeats the measurement in fresh processes and reports the median of their medians
and the spread. The ratio of processor time, of all threads together, is reported too; other load on the machine affects
it less. Tables go to standard output as Markdown, progress to standard error.

The copy is `x + 1` under jit: one pass that reads the array and writes a new one, to newly allocated memory. Quantize
and dequantize allocate their results too. Each result is dropped before the next call.

Other libraries are timed if they are installed. `fouroversix` is the code of that method's authors. Its reference path
on a CPU needs torch, but neither a GPU nor a build for one: `SKIP_CUDA_BUILD=1 FORCE_BUILD=1 pip install --no-deps
--no-build-isolation fouroversix`, or `--reference DIR` with the folder that contains the package. The other library is
`qwix`.
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
    """One figure of the report.

    `bound` is its upper bound, or if negative the negated lower bound; None means no target. `ms` is the time in
    milliseconds, and `processor` the same figure for processor time.
    """

    section: str
    name: str
    unit: str
    value: float
    bound: float | None = None
    ms: float | None = None
    processor: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.bound is None:
            return None
        return self.value <= self.bound if self.bound >= 0 else self.value >= -self.bound


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds and the processor seconds of one call; its result is dropped afterwards."""
    start, processors = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(run())
    seconds = time.perf_counter() - start, time.process_time() - processors
    del result
    return seconds


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """Return seconds and processor seconds [rounds, 2] of each run, timed in turn after two calls that warm up."""
    for run in runs.values():
        timed(run)
        timed(run)
    times = np.array([[timed(run) for run in runs.values()] for _ in range(rounds)])
    return {name: times[:, i] for i, name in enumerate(runs)}


def row_of(times, section, name, run, against, unit, bound=None, note="") -> Row:
    """Return the row with the ratio of the times of `run` and `against`."""
    wall, processor = np.median(times[run] / times[against], axis=0).tolist()
    ms = 1e3 * float(np.median(times[run][:, 0]))
    return Row(section, name, unit, wall, bound, ms, processor, note)


def quantizer(fmt: str, **settings):
    """Return a jitted `ifjax.quantize` with these settings, as users call it."""
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
    yield row_of(times, "quantize", "if4", "if4", "copy", "x copy", 1.3)

    for name, function, argument, bound in quantize_cases(x)[1:]:
        times = alternate(base | {name: lambda f=function, a=argument: f(a)}, args.pairs)
        yield row_of(times, "quantize", name, name, "if4", "x if4", bound)
        yield row_of(times, "quantize", name, name, "copy", "x copy")


def quantize_cases(x):
    """Return (name, function, argument, bound on its time over the first one's) of each case, all with x's values."""
    slices = x.reshape(4, -1, x.shape[-1])
    vmapped = jax.jit(jax.vmap(lambda x: ifjax.quantize(x, "if4")))
    return [
        *((fmt, quantizer(fmt), x, 1.0 if fmt == "nvfp4" else 1.5) for fmt in FORMATS),
        ("if4, bfloat16 input", quantizer("if4"), x.astype(jnp.bfloat16), 1.5),
        ("if4, axis=-2", quantizer("if4", axis=-2), x, 2.0),
        ("if4, vmap over 4 slices", vmapped, slices, 1.5),
    ]


def dequantize_rows(args):
    x = inputs(args.size)
    copy = copy_of(x)
    for fmt in FORMATS:
        q = quantizer(fmt)(x)
        for dtype, bound in (("float32", 1.0), ("bfloat16", 0.8)):
            run = jax.jit(lambda q, dtype=dtype: ifjax.dequantize(q, dtype))
            times = alternate({"copy": copy, "run": lambda run=run, q=q: run(q)}, args.pairs)
            yield row_of(times, "dequantize", f"{fmt} to {dtype}", "run", "copy", "x copy", bound)


def search_rows(args):
    x = inputs(min(args.size, 1024))
    for fmt in ("if4", "nvfp4"):
        functions = {str(search): quantizer(fmt, search=search) for search in (None, "fast", "exhaustive")}
        runs = {search: lambda function=function: function(x) for search, function in functions.items()}
        times = alternate(runs, min(args.pairs, 5))
        for search in ("fast", "exhaustive"):
            yield row_of(times, "search", f'{fmt}, search="{search}"', search, "None", "x plain")


def growth_rows(args):
    plain = quantizer("if4")
    for power in range(4, 9):
        size = 10**power
        x = jax.random.normal(jax.random.key(power), (size,), jnp.float32)
        times = alternate({"if4": lambda x=x: plain(x)}, args.pairs if power < 8 else 5)["if4"]
        wall, processor = np.median(times, axis=0).tolist()
        ns = 1e9 / size
        yield Row("growth", f"if4, 1e{power} values", "ns a value", ns * wall, None, 1e3 * wall, ns * processor)


def memory_rows(args):
    for name, function, argument, _ in quantize_cases(inputs(args.size)):
        spent = function.lower(argument).compile().memory_analysis().temp_size_in_bytes
        yield Row("memory", f"{name}: temporaries", "x input", spent / argument.nbytes, 0.5)
    for fmt in FORMATS:
        # Each measurement has a fresh process, because a process's peak memory never falls.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            peak = pool.submit(peak_memory, fmt, 2 * args.size).result()
        yield Row("memory", f"{fmt}: peak, with input and result", "x input", peak, 3.0)


def peak_memory(fmt: str, size: int) -> float:
    """Return the peak resident memory that quantizing [size, size] adds, divided by the input's bytes."""
    make = jax.jit(lambda: jnp.sin(jnp.arange(size * size, dtype=jnp.float32)).reshape(size, size)).lower().compile()
    run = quantizer(fmt).lower(jax.ShapeDtypeStruct((size, size), jnp.float32)).compile()
    before, _ = resident()
    x = jax.block_until_ready(make())
    q = jax.block_until_ready(run(x))
    _, peak = resident()
    del q
    return (peak - before) / x.nbytes


def resident() -> tuple[int, int]:
    """Return the present and the peak bytes of resident memory."""
    status = Path("/proc/self/status")
    if not status.exists():
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, peak
    # On Linux a process inherits ru_maxrss from the process that starts it; these two values start anew.
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith(("VmRSS", "VmHWM")))
    now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
    return now, peak


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
    note = f"qwix {importlib.metadata.version('qwix')}; no tensor scale, codes not packed"
    yield row_of(times, "peers", "qwix, nvfp4", "theirs", "ours", "x ours", None, note)


def reference_rows(args, x):
    """Time the authors' PyTorch code on the same values, and compare its bytes with those of ifjax."""
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
        same_scales = np.mean(np.asarray(q.scales).ravel() == scales.view(torch.uint8).numpy().ravel())
        times = alternate({"ours": lambda ours=ours: ours(x), "theirs": theirs}, 3)
        note = f"{version}; equal bytes: codes {same_codes:.7%}, scales {same_scales:.7%}"
        bound = -60 if fmt == "if4" else None
        yield row_of(times, "peers", f"reference, {fmt}", "theirs", "ours", "x ours", bound, note)


def import_reference(folder: str | None):
    """Return (the module of the reference path or None, the reason why there is none)."""
    if folder is None:
        spec = importlib.util.find_spec("fouroversix")
        if spec is None:
            return None, "not installed"
        folder = str(Path(spec.submodule_search_locations[0]).parent)
    root = Path(folder, "fouroversix")
    # Empty packages replace the package's own ones, whose imports need transformers and others.
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
    """Return the rows that each of several processes measures, one process after the other."""
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
    ms, processor = (
        statistics.median(found) if None not in found else None
        for found in ([row.ms for row in rows], [row.processor for row in rows])
    )
    return rows[0]._replace(value=statistics.median(values), ms=ms, processor=processor)


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
    times = f"medians of {args.pairs} rounds in each of {len(runs)} processes"
    lines = [f"`python benchmarks/codec.py`: {args.size} x {args.size}, {times}."]
    lines += ["", ", ".join(f"{key} {value}" for key, value in about.items() if value is not None), ""]
    lines += ["| section | case | ms | figure | between processes | processor time | target | |", "|---" * 8 + "|"]
    for i, row in enumerate(rows):
        values = [run[i].value for run in runs]
        spread = f"{number(min(values))}-{number(max(values))}" if len(runs) > 1 and row.value == row.value else ""
        target = "" if row.bound is None else f"{'<=' if row.bound >= 0 else '>='} {abs(row.bound):g}"
        met = {None: "", True: "met", False: "MISSED"}[row.met if row.value == row.value else None]
        figure = f"{number(row.value)} {row.unit}".strip() if row.value == row.value else ""
        note = " ".join(filter(None, (met, row.note)))
        cells = [row.section, row.name, number(row.ms), figure, spread, number(row.processor), target, note]
        lines.append("| " + " | ".join(cells) + " |")
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
