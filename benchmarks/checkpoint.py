"""The cost of converting, storing and loading packed checkpoints, compared with copying and reading the file.

    python benchmarks/checkpoint.py [FILE ...] [--synthetic 4] [--dtypes F32 BF16] [--rounds 3] [--folder DIR]

For each FILE, and for a synthetic checkpoint in shards of the given number of GB (matrices of a transformer and an
embedding), which is removed afterwards, the benchmark measures

- the rate of `ifjax quantize --embeddings` (if4, round to nearest), with and without measuring errors, relative to a
  plain copy of the file plus reading all of its tensors to memory as float32. The conversion is synced to disk, the
  copy is not. All are timed in turn in one process, after the conversion of a small file, which compiles. A figure is
  the median over rounds. On a busy machine the ratios of processor time, of all threads together, are more reliable;
- seconds and peak memory of the whole command in its own process, which includes starting Python and compiling;
- the size on disk, relative to 4.5 bits per quantized value;
- the time of `ifjax.load_file` for the packed file and the original.

Files that fit are in the page cache when they are read. The tables are written to stdout as Markdown.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from codec import machine

import ifjax
from ifjax import convert
from ifjax.convert import verify
from ifjax.files import checkpoint
from ifjax.files import safetensors as _files
from ifjax.files.pieces import as_float32

RULES = ifjax.Rule(".*", "if4", optional=True)
TARGET = 3.0

COMMAND = """
import re, sys
from ifjax import cli
code = cli.main(sys.argv[1:])
# Not getrusage: Linux hands the peak of the process that started this one down to it.
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024, file=sys.stderr)
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE")
    parser.add_argument("--synthetic", type=float, default=0, metavar="GB")
    parser.add_argument("--dtypes", nargs="+", default=["F32", "BF16"], help="of the checkpoint that is made up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for temporary files; they are removed")
    args = parser.parse_args()
    about = machine()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        warm_up(Path(folder))
        for path in args.files:
            rows.append(measure(path.name, path, Path(folder), args.rounds))
        for dtype in args.dtypes if args.synthetic else ():
            path = make_up(Path(folder), args.synthetic, dtype)
            rows.append(measure(f"made up, {args.synthetic:g} GB of {dtype}", path, Path(folder), args.rounds))
            for file in {*ifjax.open_file(path).files, path}:
                file.unlink()
    print_tables(rows, about)


def warm_up(folder: Path) -> None:
    x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    small = ifjax.save_file({"w": x}, folder / "small.safetensors")
    for measured in (False, True):
        convert.quantize_file(small, folder / "small-packed.safetensors", RULES, measured=measured)
    convert.dequantize_file(folder / "small-packed.safetensors", folder / "small-back.safetensors")


def make_up(folder: Path, gigabytes: float, dtype: str) -> Path:
    """Write shards of 1 GB: an embedding of 128 MB in BF16, then layers up to the size; no tensor is in memory."""
    item = _files.numpy_dtype(dtype).itemsize
    shapes, left = {"embed_tokens.weight": (16_384, 4096)}, gigabytes * 1e9 - 16_384 * 4096 * item
    inner = {"q_proj": (4096, 4096), "up_proj": (11_008, 4096), "down_proj": (4096, 11_008)}
    for i in range(1000):
        for name, shape in inner.items():
            if left > 0:
                shapes[f"layers.{i}.{name}.weight"] = shape
                left -= math.prod(shape) * item
    some = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(_files.numpy_dtype(dtype))

    def item_of(name, shape):
        def fill(write):
            size = math.prod(shape)
            for start in range(0, size, some.size):
                write(name, some[: min(some.size, size - start)])

        slot = _files.Slot(name, dtype, shape)
        return checkpoint.Item(name, (slot,), None, fill)

    items = [item_of(name, shape) for name, shape in shapes.items()]
    return checkpoint.write_items(folder / f"{dtype}.safetensors", items, max_shard_bytes=10**9)


def measure(name: str, path: Path, folder: Path, rounds: int) -> dict:
    source = ifjax.open_file(path, check=False)
    packed, copy = folder / "packed.safetensors", folder / "copy.bin"
    nbytes = sum(entry.nbytes for entry in source.entries.values())
    largest = max(entry.nbytes for entry in source.entries.values())

    def plain_copy():
        for file in source.files:
            with file.open("rb") as old, copy.open("wb") as new:
                while chunk := old.read(2**22):
                    new.write(chunk)

    def read():
        for name in source:
            with source.reader(name) as reader:
                as_float32(reader.values(0, math.prod(source.entries[name].shape)))

    runs: dict[str, Callable] = {
        "copy": plain_copy, "read": read,
        "quantize": lambda: convert.quantize_file(source, packed, RULES, measured=False),
        "measured": lambda: convert.quantize_file(source, packed, RULES),
    }  # fmt: skip
    times = alternate(runs, rounds)
    copy.unlink()
    ratios = {}
    for run in ("quantize", "measured"):
        rounds_of = zip(times[run], times["copy"], times["read"], strict=True)
        pairs = [[a[i] / (b[i] + c[i]) for i in (0, 1)] for a, b, c in rounds_of]
        ratios[run] = [statistics.median(p[i] for p in pairs) for i in (0, 1)]
    print(f"{name}: {ratios} {medians(times)}", file=sys.stderr)

    report = convert.contents(ifjax.open_file(packed))
    ideal = sum(4.5 * e.values / 8 for e in report.quantized) + sum(e.bytes_after for e in report.others)
    loading = {"packed": packed, "original": path}
    loads = alternate({k: lambda p=p: jax.block_until_ready(ifjax.load_file(p)) for k, p in loading.items()}, rounds)
    back = folder / "back.safetensors"
    others = alternate({"verify": lambda: list(verify(ifjax.open_file(packed))),
                        "against": lambda: list(verify(ifjax.open_file(packed), source)),
                        "dequantize": lambda: convert.dequantize_file(packed, back)}, 1)  # fmt: skip
    back.unlink()
    size = packed.stat().st_size
    packed.unlink()
    command = [sys.executable, "-c", COMMAND, "quantize", os.fspath(path), os.fspath(packed), "--embeddings", "--json"]
    started = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    packed.unlink()
    return {
        "name": name, "nbytes": nbytes, "largest": largest, "size": size, "over": size / ideal - 1,
        "median": medians(times), "ratios": ratios, "load": medians(loads), "others": medians(others),
        "seconds": seconds,
        "peak": int(ran.stderr.split()[-1]), "sqnr": json.loads(ran.stdout)["entries"][0]["sqnr_db"],
        "bits": report.totals.quantized_bits_per_value,
    }  # fmt: skip


def alternate(runs: dict[str, Callable], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Time the runs in turn; return for each run and round its seconds and its processor seconds."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started, processors = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - started, time.process_time() - processors))
    return times


def medians(times: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    return {run: statistics.median(seconds for seconds, _ in t) for run, t in times.items()}


def print_tables(rows: list[dict], about: dict) -> None:
    about = about | {"safetensors": metadata.version("safetensors"), "load average after": os.getloadavg()[0]}
    print(f"# checkpoint.py on a {about['cores']}-core CPU, {about['date']}\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print("Conversion in a warm process. x: of the time of copy + read; processor: of its processor time. Target: x at")
    print("most 3 without errors measured.\n")
    print("| checkpoint | copy | read as float32 | quantize | x | processor | target | with errors | x | processor |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        m, x = r["median"], r["ratios"]
        rate = {run: f"{t:.2f} s, {r['nbytes'] / 1e6 / t:.0f} MB/s" for run, t in m.items()}
        met = "met" if x["quantize"][0] <= TARGET else "MISSED"
        wall, processor = ({run: f"{pair[i]:.2f}" for run, pair in x.items()} for i in (0, 1))
        print(f"| {r['name']} | {rate['copy']} | {rate['read']} | {rate['quantize']} | {wall['quantize']} | "
              f"{processor['quantize']} | {met} | {rate['measured']} | {wall['measured']} | {processor['measured']} |"
              )  # fmt: skip
    print("\nThe whole command, with the start of Python, compilation and errors measured.\n")
    print("| checkpoint | size | largest tensor | seconds | peak memory |")
    print("|---|---|---|---|---|")
    for r in rows:
        print(f"| {r['name']} | {r['nbytes'] / 1e6:.0f} MB | {r['largest'] / 1e6:.0f} MB | {r['seconds']:.1f} | "
              f"{r['peak'] / 1e6:.0f} MB |")  # fmt: skip
    print("\nOn disk and back. Over: beyond 4.5 bits for each quantized value and the bytes of what stays.\n")
    print("| checkpoint | packed | bits a value | over | load packed | load original | verify | verify --against | "
          "dequantize |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        seconds = " | ".join(f"{t:.2f} s" for t in (*r["load"].values(), *r["others"].values()))
        print(f"| {r['name']} | {r['size'] / 1e6:.1f} MB | {r['bits']:.4f} | {100 * r['over']:.2f}% | {seconds} |")


if __name__ == "__main__":
    main()
