"""Time and peak memory of import, export and loading into a model, compared with copying the files.

    python benchmarks/exchange.py [--megabytes 200] [--rounds 3] [--folder DIR]

A checkpoint of square matrices is made up, packed to nvfp4 (amax 2688 for MLX, mxfp4 for gpt-oss) and removed
afterwards. For each layout: the time of `plan_export(...).write` and of `plan_import(...).write`, against
`shutil.copyfile` of the same file; and the peak memory of each in a process of its own, above that of the imports. All
are repeated in turn; a figure is the median over rounds. Then `ifjax.load_file(names=)` of bfloat16 matrices, quantized
while they are read, and `exchange.load(names=)` of each layout, on one device and on eight. Layouts whose packages are
missing are left out. Copies are not synced to the disk, and what ifjax writes is. Markdown to stdout.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from codec import machine
from safetensors.numpy import save_file

import ifjax
from ifjax.convert import plan_export, plan_import

SIDE = 2048  # rows and columns of a matrix
TOOLS = {"compressed-tensors": "nvfp4", "modelopt": "nvfp4", "mlx": "nvfp4", "gpt-oss": "mxfp4", "gguf": "nvfp4"}
PEAK = """
import re, sys
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np, ifjax
from ifjax import exchange
from ifjax.convert import plan_export, plan_import
from ifjax.files import pieces
def high():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
"""
LOAD = """
def load(path, side, layers, devices):
    like = jax.eval_shape(lambda: ifjax.quantize(jax.numpy.zeros((layers, side, side)), "nvfp4", axis=-2, amax_axes=(0,)))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("a",))
    place = ifjax.shardings(like, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "a")))
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), like, place)
    rules = [ifjax.NameRule(rf"l\\.([0-9]|[1-9][0-9])\\.w" if layers > 1 else r"l\\.(0)\\.w", "w", transpose=True, stack=(1,)),
             ifjax.NameRule(".*", None)]
    return jax.block_until_ready(ifjax.load_file(path, like={"w": like}, names=rules))

def load_theirs(path, side, layers, devices):
    like = jax.ShapeDtypeStruct((layers, side, side), "float32")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("a",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, "a"))
    like = jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=place)
    number = "[0-9]|[1-9][0-9]" if layers > 1 else "0"
    rules = [ifjax.NameRule(rf"(?:l\\.|e)({number})(?:\\.weight)?", "w", transpose=True, stack=(1,)),
             ifjax.NameRule(".*", None)]
    return jax.block_until_ready(exchange.load(path, like={"w": like}, names=rules))
"""  # noqa: E501


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=200, help="of packed weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for temporary files; they are removed")
    args = parser.parse_args()
    about = machine()
    layers = max(2, round(args.megabytes * 1e6 / (SIDE * SIDE * 9 / 16)))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = [row for tool in TOOLS if (row := layout(tool, layers, Path(folder), args.rounds)) is not None]
        loads = into_a_model(layers, Path(folder), args.rounds)
        theirs = [row for tool in TOOLS for row in theirs_into_a_model(tool, layers, Path(folder), args.rounds)]
    print(", ".join(f"{key} {value}" for key, value in about.items()), f"load average after {os.getloadavg()[0]:.2f}")
    print(f"\n{layers} matrices of {SIDE} x {SIDE}. MiB: peak memory above the imports'.\n")
    print("| layout | size | copy | export | MB/s | MiB | import | MB/s | MiB |\n|---|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print("\n`load_file(names=)`, bfloat16 to nvfp4, transposed and stacked. MiB: beyond what one matrix took.\n")
    print("| devices | floats | packed | copy | load | MB/s of floats | MiB |\n|---|---|---|---|---|---|---|")
    print("\n".join(loads))
    print("\n`exchange.load(names=)`, transposed and stacked. MiB: beyond what one matrix took.\n")
    print("| layout | devices | packed | copy | load | MB/s | MiB |\n|---|---|---|---|---|---|---|")
    print("\n".join(theirs))


def timed(function, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak(body: str) -> float:
    """Return the peak memory in MiB of a process that runs `body`."""
    ran = subprocess.run([sys.executable, "-c", PEAK + body], capture_output=True, text=True, check=True)
    return int(ran.stdout.split()[-1]) / 2**20


def made(tool: str, layers: int, folder: Path) -> tuple[Path, Path, Path]:
    """A packed checkpoint; and where it is to go in the tool's layout, and from there."""
    suffix = ".gguf" if tool == "gguf" else ".safetensors"
    ours, theirs, back = (folder / f"{name}" for name in ("ours.safetensors", f"theirs{suffix}", "back.safetensors"))
    x = np.random.default_rng(0).standard_normal((SIDE, SIDE), np.float32)
    settings = {"amax": 2688.0} if tool == "mlx" else {}
    q = ifjax.quantize(x, TOOLS[tool], **settings)
    name = "e{}" if tool == "gpt-oss" else "l.{}.weight"
    ifjax.save_file({name.format(i): q for i in range(layers)}, ours)
    return ours, theirs, back


def layout(tool: str, layers: int, folder: Path, rounds: int) -> str | None:
    ours, theirs, back = made(tool, layers, folder)
    try:
        plan_export(ours, tool).write(theirs)
    except ImportError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return None
    out = timed(lambda: plan_export(ours, tool).write(theirs), rounds)
    into = timed(lambda: plan_import(theirs, tool).write(back), rounds)
    copy = timed(lambda: shutil.copyfile(ours, folder / "copy"), rounds)
    size = ours.stat().st_size
    memory = [peak(f"before = high(); {what}; print(high() - before)") for what in (
        f"plan_export({str(ours)!r}, {tool!r}).write({str(theirs)!r})",
        f"plan_import({str(theirs)!r}, {tool!r}).write({str(back)!r})")]  # fmt: skip
    for file in (ours, theirs, back, folder / "copy"):
        file.unlink()
    return (f"| {tool} {TOOLS[tool]} | {size / 1e6:.0f} MB | {copy:.2f} s | {out:.2f} s | {size / out / 1e6:.0f} | "
            f"{memory[0]:.0f} | {into:.2f} s | {size / into / 1e6:.0f} | {memory[1]:.0f} |")  # fmt: skip


def into_a_model(layers: int, folder: Path, rounds: int) -> list[str]:
    path, rng = folder / "floats.safetensors", np.random.default_rng(0)
    x = rng.standard_normal((SIDE, SIDE), np.float32).astype(ml_dtypes.bfloat16)
    save_file({f"l.{i}.w": x for i in range(layers)}, path)
    size, copy = path.stat().st_size, copied(path, rounds)
    rows = []
    for devices in (1, 8):
        seconds, packed, memory = loaded(f"load({str(path)!r}, {SIDE}, {{}}, {devices})", layers, rounds)
        rows.append(f"| {devices} | {size / 1e6:.0f} MB | {packed / 1e6:.0f} MB | {copy:.2f} s | {seconds:.2f} s | "
                    f"{size / seconds / 1e6:.0f} | {memory / 2**20:.0f} |")  # fmt: skip
    return rows


def theirs_into_a_model(tool: str, layers: int, folder: Path, rounds: int) -> list[str]:
    ours, theirs, _ = made(tool, layers, folder)
    try:
        plan_export(ours, tool).write(theirs)
    except ImportError as error:
        print(f"{tool}: {error}", file=sys.stderr)
        return []
    copy, rows = copied(theirs, rounds), []
    for devices in (1, 8):
        seconds, packed, memory = loaded(f"load_theirs({str(theirs)!r}, {SIDE}, {{}}, {devices})", layers, rounds)
        rows.append(f"| {tool} {TOOLS[tool]} | {devices} | {packed / 1e6:.0f} MB | {copy:.2f} s | {seconds:.2f} s | "
                    f"{packed / seconds / 1e6:.0f} | {memory / 2**20:.0f} |")  # fmt: skip
    ours.unlink()
    theirs.unlink()
    return rows


def copied(path: Path, rounds: int) -> float:
    seconds = timed(lambda: shutil.copyfile(path, path.with_name("copy")), rounds)
    path.with_name("copy").unlink()
    return seconds


def loaded(call: str, layers: int, rounds: int) -> list[float]:
    """Seconds, bytes of the packed model, and bytes that memory grew by; `call` has {} for the number of layers."""
    body = LOAD + f"""
import statistics, time
{call.format(1)}
before = high()
loaded = {call.format(layers)}
memory = high() - before
times = []
for _ in range({rounds}):
    start = time.perf_counter()
    loaded = {call.format(layers)}
    times.append(time.perf_counter() - start)
print(statistics.median(times), sum(a.nbytes for a in jax.tree.leaves(loaded)), memory)
"""
    ran = subprocess.run([sys.executable, "-c", PEAK + body], capture_output=True, text=True, check=True)
    return [float(number) for number in ran.stdout.split()[-3:]]


if __name__ == "__main__":
    main()
