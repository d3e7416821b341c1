"""Memory traffic and size of the codec and of training products, compiled for devices that are not present.

    python benchmarks/deviceless.py [--targets v5e v6e v7x H200 B200] [--programs "quantize if4" ...] [--json FILE]

No program is run: each is compiled for the target, and the compiled program is analysed. TPUs need the extra
`compile-tpu`, GPUs `compile`. Targets for which nothing can be compiled are listed and left out. The columns are

    MiB        the bytes that the program's operations read and write in the device's memory, with each operand and
               result counted once, also of Pallas kernels. Arrays that XLA keeps in a TPU's VMEM are not counted
    floor      the bytes of a program with unlimited caches: x twice if an amax is computed, else once; results once
    temp       the peak memory of temporaries
    kernels    the number of operations of the compiled program that the device launches
    us         on v5e and v6e: the time of the VLIW bundles of kernels that encode, decode and take maxima of rotated
               operands, at one per cycle, without stalls. For products, also the time in which the arrays of which XLA
               takes maxima are read at the device's bandwidth; so all that is not the products themselves, but for
               operations on tables and scalars
    a value    on GPUs only: the instructions of a thread of the encoder or decoder, for each of its values, and its
               registers; spills, if there are any. ptxas and nvdisasm of CUDA 13 tell
    seconds    the time to trace, lower and compile on this machine

Each target has its own process. The table is written to standard output as Markdown.
"""

import argparse
import functools
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TARGETS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1", "H200": "cuda", "B200": "cuda"}
GHZ, BANDWIDTH = {"v5e": 1.503, "v6e": 1.751}, {"v5e": 819e9, "v6e": 1638e9}
SIDE, TOKENS, MIB = 4096, 8192, 2**20

GPU = """
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: {cores} fpus_per_core: 128 clock_rate_ghz: {ghz}
  memory_bandwidth: {bandwidth} device_memory_size: {memory} l2_cache_size: {l2}
  shared_memory_per_core: 233472 shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  threads_per_core_limit: 2048 threads_per_block_limit: 1024 threads_per_warp: 32
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
  device_vendor: "NVIDIA Corporation" device_address_bits: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "NVIDIA {name}"
"""
GPUS = {
    "H200": {"major": 9, "cores": 132, "ghz": 1.98, "bandwidth": 4800 * 10**9, "memory": 141 * 2**30, "l2": 50 * MIB},
    "B200": {
        "major": 10, "cores": 148, "ghz": 1.965, "bandwidth": 7672 * 10**9, "memory": 178 * 2**30, "l2": 126 * MIB,
    },
}


def programs():
    """Return the programs by name: (function, arguments, floor in MiB or None)."""
    import jax
    import jax.numpy as jnp

    import ifjax

    x = jax.ShapeDtypeStruct((SIDE, SIDE), jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct((TOKENS, SIDE), jnp.bfloat16)
    key = jax.eval_shape(lambda: jax.random.key(0))
    array = x.size * 2 / MIB

    def packed(fmt):
        return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(jax.eval_shape(quantize(fmt), x))) / MIB

    def quantize(fmt, **settings):
        return lambda x: ifjax.quantize(x, fmt, **settings)

    def rounded_by_noise(fmt, x, key):
        return ifjax.fake_quantize(x, fmt, rounding="stochastic_unbiased", key=key)

    found = {}
    for fmt in ("if4", "nvfp4", "mxfp4", "if6"):
        reads = 2 if ifjax.get_format(fmt).has_tensor_scale else 1
        for axis in (-1, -2):
            found[f"quantize {fmt}, axis {axis}"] = quantize(fmt, axis=axis), (x,), reads * array + packed(fmt)
    found["quantize if4, squares"] = quantize("if4", block_2d=True), (x,), 2 * array + packed("if4")
    for fmt in ("if4", "nvfp4"):
        found[f"fake_quantize {fmt}"] = functools.partial(ifjax.fake_quantize, fmt=fmt), (x,), 3 * array
        found[f"fake_quantize {fmt}, stochastic"] = functools.partial(rounded_by_noise, fmt), (x, key), 3 * array
    halves = jax.ShapeDtypeStruct(x.shape, jnp.float16)
    found["fake_quantize nvfp4, float16"] = functools.partial(ifjax.fake_quantize, fmt="nvfp4"), (halves,), 3 * array
    for fmt in ("if4", "if6"):
        q = jax.eval_shape(quantize(fmt), x)
        found[f"dequantize {fmt}"] = lambda q: q.dequantize(), (q,), array + packed(fmt)

    def product(recipe):
        def run(x, w, g, key):
            multiply = functools.partial(
                ifjax.quantized_dot_general, dimension_numbers=(((1,), (0,)), ((), ())), recipe=recipe, key=key
            )
            y, back = jax.vjp(multiply, x, w)
            return y, *back(g)

        return run

    for recipe in ("bf16", "nvfp4", "if4", "quartet2"):
        found[f"product {recipe}"] = product(recipe), (tokens, x, tokens, key), None
    return found


def compile_for(target: str, function, arguments):
    """Return the compiled program and the seconds of its compilation."""
    import jax
    from jax.experimental import topologies

    if target in GPUS:
        config = GPU.format(name=target, **GPUS[target])
        topology = topologies.get_topology_desc(platform="cuda", target_config=config, topology="1x1x1")
        lowered_for = "cuda"
    else:
        topology, lowered_for = topologies.get_topology_desc(TARGETS[target], platform="tpu"), "tpu"
    device = topology.devices[0]
    cores = getattr(device, "num_cores", None)
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=cores, platform=lowered_for)
    place = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), arguments)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), abstract_device=kind)):
        start = time.perf_counter()
        program = jax.jit(function).trace(*arguments).lower(lowering_platforms=(lowered_for,)).compile()
        return program, time.perf_counter() - start


# Operations that move no data, and ends of operations that are counted at their start.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "copy-done", "slice-done", "after-all", "iota",
    "async-done",
}  # fmt: skip
LAUNCHED = {
    "fusion", "custom-call", "convolution", "dot", "copy", "reduce", "transpose", "sort", "while", "conditional",
}  # fmt: skip
ITEM = {
    "pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
}  # fmt: skip
LINE = re.compile(r"^ +(?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$", re.MULTILINE)


def bytes_of(shape: str, anywhere: bool = False) -> int:
    """Return the bytes of an HLO shape or tuple, without arrays in memory space 1, a TPU's VMEM, unless `anywhere`."""
    total = 0
    for kind, lengths, layout in re.findall(r"\b(\w+)\[([\d,]*)\](\{[^{}]*\})?", shape):
        if (anywhere or "S(1)" not in layout) and kind in ITEM:
            total += ITEM[kind] * math.prod(int(n) for n in lengths.split(",") if n)
    return total


def traffic(hlo: str) -> tuple[int, int]:
    """Return (bytes that the entry computation's operations read and write, operations that the device launches)."""
    entry = hlo[hlo.index("\nENTRY ") :]
    shapes, moved, launched = {}, 0, 0
    for name, shape, kind, rest in LINE.findall(entry):
        shapes[name] = shape
        if kind in FREE:
            continue
        operands = re.findall(r"%([^\s,()]+)", rest.split("), ")[0])
        if kind == "copy-start":  # its result lists source and destination
            moved += bytes_of(shape)
            continue
        if kind == "slice-start":  # its result lists the source as a whole and the slice, which alone is read
            part = re.findall(r"\w+\[[\d,]*\](?:\{[^{}]*\})?", shape)[1]
            moved += bytes_of(part) + bytes_of(part.replace("S(1)", ""))
            continue
        moved += bytes_of(shape) + sum(bytes_of(shapes.get(operand, "")) for operand in operands)
        launched += kind in LAUNCHED
    return moved, launched


def bundles(folder: Path, hlo: str, block: int, run: int) -> float:
    """Return the cycles of the kernels that encode, decode and take maxima, from libtpu's dump.

    `block` is the values of a block, `run` the length of rotated runs.
    """
    total, entry = 0.0, hlo[hlo.index("\nENTRY ") :]
    shapes, kernels, files = {}, [], {}
    for name, shape, kind, rest in LINE.findall(entry):
        shapes[name] = shape
        if kind == "custom-call" and re.match(r"(encode_blocks|decode_blocks|rotated_peaks|peaks_of_\w+)\b", name):
            text = rest[rest.index("backend_config=") :]
            kernels.append((name, shape, rest, text))
            found = [f for f in folder.glob(f"*-{name}-*final_bundles.txt") if "schedule" not in f.name]
            if found:
                files[text] = found[0]
    for name, shape, rest, text in kernels:
        file = files[text]  # of equal kernels one is compiled
        loops = [0]  # bundles outside of loops over a tile, and of each of these
        for label, depth in re.findall(r"^ *0x[0-9a-f]+ +(LB)?.*?: *(>*) *\{", file.read_text(), re.MULTILINE):
            loops += [0] * (label == "LB" and len(depth) == 2)
            loops[max(len(depth) - 1, 0) and -1] += len(depth) > 0
        operands = " ".join(shapes.get(operand, "") for operand in re.findall(r"%([^\s,()]+)", rest.split("), ")[0]))
        values = max(bytes_of(a, True) / ITEM[a.split("[")[0]] for a in re.findall(r"\w+\[[\d,]+\]", shape + operands))
        # A tile has 128 x 128 blocks. A loop rotates 16 x 128 runs at a time, or encodes two units of 8 x 128 blocks.
        turns = [128 * block / (16 * run) if run else 0, 128 / 16]
        turns = turns[:1] if "peaks" in name else turns[-len(loops[1:]) :]
        tile = loops[0] + sum(length * count for length, count in zip(loops[1:], turns, strict=True))
        total += tile * values / (128 * 128 * block)
    return total


def read_for_maxima(hlo: str) -> int:
    """Return the bytes of the arrays whose maxima the entry computation's operations take, also in a TPU's VMEM."""
    entry = hlo[hlo.index("\nENTRY ") :]
    shapes, total = {}, 0
    for name, shape, kind, rest in LINE.findall(entry):
        shapes[name] = shape
        if kind in ("fusion", "reduce") and shape.startswith("f32[]"):
            operands = re.findall(r"%([^\s,()]+)", rest.split("), ")[0])
            total += sum(bytes_of(shapes.get(operand, ""), True) for operand in operands)
    return total


def values_of_a_thread(hlo: str) -> float:
    """Return how many values a thread of a kernel that encodes or decodes SIDE x SIDE values has."""
    kernel = re.search(r"grid_x = (\d+).*grid_y = (\d+).*name = \"(?:en|de)code_blocks\".*num_warps = (\d+)", hlo)
    return SIDE**2 / (32 * math.prod(int(n) for n in kernel.groups())) if kernel else math.nan


def instructions(folder: Path, architecture: str, values: float) -> dict:
    """Return the registers of kernels that encode or decode, and the instructions for each of a thread's values."""
    found = {}
    for file in folder.glob("*.ptx"):
        if not re.search(r"\.entry (en|de)code_blocks\(", file.read_text()):
            continue
        tools = Path(next(iter(importlib.import_module("nvidia.cu13").__path__))) / "bin"
        binary = file.with_suffix(".cubin")
        command = [tools / "ptxas", "-v", f"-arch={architecture}", file, "-o", binary]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [tools / "nvdisasm", "-c", binary]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", listing)
        found["per_value"] = sum(name != "NOP" for name in names) / values
        found["registers"] = int(re.findall(r"Used (\d+) registers", said)[0])
        found["spilled"] = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    return found


def work(target: str, names: list[str], folder: Path) -> None:
    """Compile programs for a target and print a JSON line for each."""
    import jax

    import ifjax

    compile_for(target, lambda x: x + 1, (jax.ShapeDtypeStruct((8,), "float32"),))  # starts the compiler
    for name, (function, arguments, floor) in programs().items():
        if names and name not in names:
            continue
        for file in folder.iterdir():
            file.unlink()
        row = {"target": target, "program": name, "floor": floor}
        try:
            program, row["seconds"] = compile_for(target, function, arguments)
        except Exception as error:  # a program that does not compile is reported too
            print(json.dumps(row | {"error": f"{type(error).__name__}: {str(error)[:200]}"}), flush=True)
            continue
        moved, row["kernels"] = traffic(program.as_text())
        row |= {"mib": moved / MIB, "temp": program.memory_analysis().temp_size_in_bytes / MIB}
        of, run = name.split()[1].rstrip(","), 0
        if floor is None:
            recipe = ifjax.recipes.get_recipe(of)
            fmt, run = recipe.fprop.lhs.fmt, recipe.wgrad.hadamard
        else:
            fmt = of
        if target in GHZ and fmt is not None:
            block, hlo = ifjax.get_format(fmt).block, program.as_text()
            row["us"] = bundles(folder, hlo, block, run) / GHZ[target] / 1e3
            row["us"] += 0 if floor else read_for_maxima(hlo) / BANDWIDTH[target] * 1e6
        if target in GPUS and floor is not None:
            row |= instructions(folder, f"sm_{GPUS[target]['major']}0a", values_of_a_thread(program.as_text()))
        print(json.dumps(row), flush=True)


def rows_of(target: str, names: list[str]) -> list[dict]:
    """Return the rows that `work` prints in its own process."""
    package = "jax_cuda13_plugin" if target in GPUS else "libtpu"
    if importlib.util.find_spec(package) is None:
        print(f"{target} is left out: {package} is not installed", file=sys.stderr)
        return []
    with tempfile.TemporaryDirectory() as folder:
        settings = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true"}
        if target not in GPUS:
            dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            settings["LIBTPU_INIT_ARGS"] = f"{dump} --xla_jf_dump_llo_pass_label_regex=final_bundles"
        else:
            dump = f"--xla_dump_to={folder} --xla_dump_emitter_re=ptx"
            settings["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {dump}"
        command = [sys.executable, __file__, "--worker", folder, "--targets", target, "--programs", *names]
        found = []
        with subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("{"):
                    found.append(json.loads(line))
                    print(line.strip(), file=sys.stderr, flush=True)
        return found


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table."""

    def cell(row, key, form):
        return form.format(row[key]) if row.get(key) is not None else ""

    columns = ("target", "program", "floor, MiB", "MiB", "times floor", "temp, MiB", "kernels", "us", "a value")
    columns += ("seconds",)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['target']} | {row['program']} | {row['error']} | | | | | | | |")
            continue
        ratio = f"{row['mib'] / row['floor']:.2f}" if row["floor"] else ""
        numbers = [cell(row, "floor", "{:.0f}"), cell(row, "mib", "{:.0f}"), ratio, cell(row, "temp", "{:.1f}")]
        a_value = cell(row, "per_value", "{:.1f}") + cell(row, "registers", " ({} registers)")
        a_value += f", {row['spilled']} bytes spilled" if row.get("spilled") else ""
        numbers += [cell(row, "kernels", "{}"), cell(row, "us", "{:.0f}"), a_value, cell(row, "seconds", "{:.1f}")]
        lines.append("| " + " | ".join([row["target"], row["program"], *numbers]) + " |")
    return "\n".join(lines)


def main() -> int:
    """Print the table and return the exit code: 2 if no target can be compiled for."""
    parser = argparse.ArgumentParser(description="What compilers make of ifjax for devices that are not there.")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--programs", nargs="*", default=[], help="names as in the table; all unless given")
    parser.add_argument("--json", type=Path, help="a file for the rows")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.targets[0], options.programs, options.worker)
        return 0
    rows = [row for target in options.targets for row in rows_of(target, options.programs)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores\n\n{table(rows)}")
    return 0 if rows else 2


if __name__ == "__main__":
    sys.exit(main())
