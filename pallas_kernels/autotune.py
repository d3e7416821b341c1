"""Measurement of the fastest tiles on the local GPU, written to the table that `tiles.choose` reads.

    python -m pallas_kernels.autotune --out pallas_kernels/tiles.json [--device-kind H200] [--shapes 4096x4096 ...]
                                      [--rows 1 16 64 ...] [--dtypes bfloat16 ...]

Each candidate's result is first compared with the reference. A candidate that is wrong or fails is reported and left
out. A time is the median over runs of the mean time of consecutive calls, each on its own weights, which together
exceed the L2 cache. The table is written at the end, completely or not at all. Entries of other devices are kept. This
device's unmeasured entries are kept after the measured ones. Without a GPU of the requested kind the program prints
this and exits with code 2.
"""

import argparse
import datetime
import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from pallas_kernels import gpu_matmul, tiles
from pallas_kernels.decoding import Decoding
from pallas_kernels.tiles import Entry, Tiles

IF4 = Decoding(((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)), (7, 6), "e4m3", 16)
SHAPES = ((4096, 4096), (8192, 8192), (28672, 8192))
ROWS = (8, 16, 32, 64, 256, 1024, 8192)
BEYOND_CACHE = 300e6  # bytes


def candidates(m: int, n: int, k: int, out_dtype, blocks: int) -> Iterator[Tiles]:
    """Yield tiles that fit m rows of x, with as many stages as memory allows and with about half as many."""
    heights = [height for height in (8, 16, 32, 64, 128, 192, 256) if height < 2 * m or height == 8]
    heights = heights[-3 if m > 64 else -2 :]
    bands = (2, 4, 8) if m >= 1024 else (4,)
    shares = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2))
    for cluster, height, (across, along), units, band in itertools.product((1, 2), heights, shares, (1, 2), bands):
        if across * along == 1 and height > 64:
            continue  # a single warpgroup cannot overlap decoding and multiplying
        cuts = [Tiles(height, across, along, units, stages, blocks, band, cluster) for stages in range(8, 1, -1)]
        cuts = [cut for cut in cuts if cut.misfit(n, k, out_dtype) is None]
        yield from {cuts[0], cuts[len(cuts) // 2]} if cuts else ()


def measure(m: int, n: int, k: int, dtype, blocks: int) -> list[tuple[float, Tiles]]:
    """Return (microseconds, tiles) of each candidate with a correct result, fastest first."""
    copies = max(2, int(BEYOND_CACHE / (n * k * 0.5625)))
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (m, k), dtype)
    factor = jnp.float32(1 / 7)
    nibbles = jax.random.randint(keys[1], (n, k), 0, 16, jnp.uint8)
    # Scales from 2^-3 to 2^3, in both modes.
    scales = jax.random.randint(keys[2], (n, k // 16), 32, 80, jnp.uint8)
    scales |= jax.random.randint(keys[3], (n, k // 16), 0, 2, jnp.uint8) << 7
    weights = [jax.jit(gpu_matmul.pack, static_argnums=2)(nibbles, scales, IF4)]
    wanted = jax.jit(gpu_matmul.reference, static_argnums=4)(x, nibbles, scales, factor, IF4)
    weights += [tuple(jnp.roll(a, i, 0) for a in weights[0]) for i in range(1, copies)]

    results = []
    for cut in candidates(m, n, k, dtype, blocks):
        one = jax.jit(functools.partial(gpu_matmul.matmul, n=n, k=k, decoding=IF4, out_dtype=dtype, tiles=cut))
        every = jax.jit(lambda x, factor, weights, one=one: [one(x, *w, factor) for w in weights])
        try:
            error = jnp.max(jnp.abs(one(x, *weights[0], factor).astype(jnp.float32) - wanted))
            if not error <= 2.0**-7 * jnp.max(jnp.abs(wanted)):
                raise ValueError(f"wrong by {float(error)}")
            jax.block_until_ready(every(x, factor, weights))
            seconds = []
            for _ in range(10):
                start = time.perf_counter()
                jax.block_until_ready(every(x, factor, weights))
                seconds.append(time.perf_counter() - start)
        except Exception as error:  # if a candidate does not compile or run, the others are still measured
            print(f"  left out {cut}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        results.append((statistics.median(seconds) / copies * 1e6, cut))
    return sorted(results, key=lambda result: result[0])


def entry_of(results: list[tuple[float, Tiles]], m: int, last: bool, n: int, k: int, dtype, device: str) -> Entry:
    """Return the table's entry for the fastest result; if `last`, it also applies to any larger number of rows."""
    microseconds, cut = results[0]
    measured = {
        "microseconds": round(microseconds, 2),
        "rows": m,
        "candidates": len(results),
        "device": device,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }
    return Entry(cut, None if last else m, n, k, jnp.dtype(dtype).name, measured)


def write(file: Path, table: dict[str, list[Entry]]) -> None:
    """Write the table atomically: the file is replaced completely or stays unchanged."""
    handle, name = tempfile.mkstemp(dir=file.absolute().parent, prefix=file.name, suffix=".part")
    try:
        with os.fdopen(handle, "w") as part:
            part.write(tiles.dump(table))
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m pallas_kernels.autotune")
    parser.add_argument("--out", type=Path, required=True, help="the table to write")
    parser.add_argument("--device-kind", default="H200", help="part of the device's name; the table's key")
    parser.add_argument("--shapes", nargs="+", default=[f"{n}x{k}" for n, k in SHAPES], help="of weights, NxK")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="of x, ascending")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    args = parser.parse_args(arguments)
    device = jax.devices()[0]
    if device.platform != "gpu" or args.device_kind not in device.device_kind:
        print(
            f"autotune measures on an NVIDIA GPU whose name contains {args.device_kind!r}, and here is a "
            f"{device.platform} ({device.device_kind}): run it there. Nothing was written.",
            file=sys.stderr,
        )
        return 2
    if reason := gpu_matmul.supports(IF4, jnp.float16, device_kind=device.device_kind):
        print(f"{reason}. Nothing was written.", file=sys.stderr)
        return 2

    entries = []
    for n, k in (map(int, shape.split("x")) for shape in args.shapes):
        for dtype in args.dtypes:
            for m in args.rows:
                results = measure(m, n, k, dtype, device.core_count)
                if not results:
                    print(f"no candidate works for {m} x {n} x {k} in {dtype}", file=sys.stderr)
                    continue
                entries.append(entry_of(results, m, m == args.rows[-1], n, k, dtype, device.device_kind))
                best, worst = results[0][0], results[-1][0]
                print(f"{m:5} x {n:5} x {k:5} {dtype:8} {best:8.1f} us, the slowest {worst:8.1f}", flush=True)
    table = tiles.read()
    guesses = [entry for entry in table.get(args.device_kind, table["H200"]) if entry.measured is None]
    write(args.out, table | {args.device_kind: entries + guesses})
    return 0


if __name__ == "__main__":
    sys.exit(main())
