"""What XLA makes of quantize for an NVIDIA H200, compiled on a machine that has none.

A quantizer is bound by memory on a GPU, so what matters is how often x is read and what is written beside the result:
both can be read from the compiled program. Nothing runs, so nothing here speaks of bits.
"""

import functools
import importlib.util
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

SHAPE = (4096, 4096)
CASES = {
    "if4 float32": ("if4", "float32", {}),
    "if4 bfloat16": ("if4", "bfloat16", {}),
    "if4 axis=-2": ("if4", "float32", {"axis": -2}),
    "fouroversix float32": ("fouroversix", "float32", {}),
    "if3 float32": ("if3", "float32", {}),
    "nvfp4 float32": ("nvfp4", "float32", {}),
}

# The target that benchmarks/deviceless.py describes to a compiler, which cannot ask a device that is not there.
_DEVICELESS = runpy.run_path(os.fspath(Path(__file__).resolve().parents[2] / "benchmarks" / "deviceless.py"))
H200 = _DEVICELESS["GPU"].format(name="H200", **_DEVICELESS["GPUS"]["H200"])


class Operation(NamedTuple):
    """One line of an HLO computation."""

    name: str
    shape: str
    kind: str
    operands: tuple[str, ...]
    is_root: bool


def computations(hlo: str) -> dict[str, list[Operation]]:
    """The operations of each computation of a module in XLA's text form; the entry's under "ENTRY"."""
    pattern = re.compile(r"\s+(ROOT )?(%[\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
    found, current = {}, []
    for line in re.sub(r"/\*.*?\*/", "", hlo).splitlines():
        header = re.match(r"(ENTRY|%[\w.\-]+) .*\{$", line)
        if header:
            current = found.setdefault(header[1], [])
        elif match := pattern.match(line):
            root, name, shape, kind, rest = match.groups()
            operands = tuple(re.findall(r"%[\w.\-]+", rest.split(")", 1)[0]))
            current.append(Operation(name, shape, kind, operands, bool(root)))
    return found


def arrays_of(shape: str) -> list[tuple[str, int]]:
    """(type, number of elements) of each array in the text of a shape."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return [(dtype, math.prod(map(int, dims.split(","))) if dims else 1) for dtype, dims in found]


def kernels(hlo: str) -> list[Operation]:
    """The entry's operations that touch memory."""
    free = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    return [operation for operation in computations(hlo)["ENTRY"] if operation.kind not in free]


def compiled_for(device: str, folder: Path):
    """What this file's `main` for the device writes; compiled in a process of its own."""
    for package in ("jax_cuda13_plugin", "nvidia"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("pip install 'ifjax[compile]' to compile for a GPU that is not there")
    import ifjax

    # On the platform cpu: else the plugin would look for a GPU.
    file = folder / "programs.json"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(ifjax.__file__).parents[1])}
    command = [sys.executable, __file__, device, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, dict]:
    """For each case its optimized HLO and the bytes of its temporaries."""
    return compiled_for("H200", tmp_path_factory.mktemp("compiled"))


each_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.compile


@each_case
def test_x_is_read_twice_for_amax_and_to_encode(compiled, case):
    hlo = compiled[case]["hlo"]
    names = {operation.name for operation in computations(hlo)["ENTRY"] if operation.kind == "parameter"}
    for operation in computations(hlo)["ENTRY"]:
        if operation.kind == "bitcast" and names & set(operation.operands):
            names.add(operation.name)
    readers = [f"{k.name} -> {k.shape}" for k in kernels(hlo) if names & set(k.operands)]
    assert len(readers) <= 2, "\n".join(readers)


def test_dequantize_reads_the_codes_once_and_writes_the_values_alone(compiled):
    hlo = compiled["dequantize"]["hlo"]
    assert sum("%q_codes.1" in kernel.operands for kernel in kernels(hlo)) == 1
    written = [dtype for kernel in kernels(hlo) for dtype, size in arrays_of(kernel.shape) if size >= math.prod(SHAPE)]
    assert written == ["bf16"]


@each_case
def test_nothing_of_the_size_of_x_is_written(compiled, case):
    hlo = compiled[case]["hlo"]
    written = [(k.name, array) for k in kernels(hlo) for array in arrays_of(k.shape)]
    assert [entry for entry in written if entry[1][1] >= math.prod(SHAPE)] == []
    # Half of a float32 x, whatever x is: what belongs to blocks is 32 bits wide in all programs.
    assert compiled[case]["temporaries"] <= 2 * math.prod(SHAPE)


@each_case
def test_the_gpu_program_has_neither_branches_nor_loops(compiled, case):
    """The conditional that keeps stages apart on a CPU would synchronize a GPU with its host."""
    kinds = {operation.kind for operations in computations(compiled[case]["hlo"]).values() for operation in operations}
    assert "fusion" in kinds
    assert kinds.isdisjoint({"conditional", "while", "call", "custom-call"})


@each_case
def test_every_division_is_corrected(compiled, case):
    """XLA:GPU divides by an approximation (PTX div.full), so of a quotient only its bits may be used, to correct it."""
    divisions = 0
    for name, operations in computations(compiled[case]["hlo"]).items():
        for division in (operation for operation in operations if operation.kind == "divide"):
            divisions += 1
            users = [operation for operation in operations if division.name in operation.operands]
            assert not division.is_root and users, (name, division)
            assert {(u.kind in ("bitcast", "bitcast-convert"), u.shape[:4]) for u in users} == {(True, "s32[")}, name
    assert divisions > 0


def test_blackwell_multiplies_nvfp4_by_cudnn(tmp_path):
    assert "__cudnn$blockScaledDot" in compiled_for("B200", tmp_path)


def test_the_reader_of_programs_finds_what_it_counts():
    hlo = """HloModule m
%fused (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %d.1 = f32[8]{0} divide(%p, %p), metadata={op_name="div(x)"}
}

ENTRY %main (x: f32[8]) -> (f32[8], u8[2,4]) {
  %x = f32[8]{0} parameter(0)
  %pair = (f32[8]{0}, /*index=1*/u8[2,4]{1,0}) fusion(%x), kind=kLoop, calls=%fused
  ROOT %c = f32[8]{0} conditional(%x, %pair), branch_computations={%a, %b}
}
"""
    found = computations(hlo)
    assert [operation.kind for operation in found["%fused"]] == ["parameter", "divide"]
    assert found["%fused"][1].operands == ("%p", "%p") and found["%fused"][1].is_root
    assert [kernel.operands for kernel in kernels(hlo)] == [("%x",), ("%x", "%pair")]
    assert arrays_of(kernels(hlo)[0].shape) == [("f32", 8), ("u8", 8)]


def compile_for(target: str, function, *arguments):
    """The compiled program of `jit(function)`, of which everything but the device is there."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=device), arguments)
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()


def main(file: str):
    import ifjax

    programs = {}
    for case, (fmt, dtype, settings) in CASES.items():
        quantize = functools.partial(ifjax.quantize, fmt=fmt, **settings)
        program = compile_for(H200, quantize, jax.ShapeDtypeStruct(SHAPE, dtype))
        temporaries = program.memory_analysis().temp_size_in_bytes
        programs[case] = {"hlo": program.as_text(), "temporaries": temporaries}
    q = jax.eval_shape(ifjax.quantize, jax.ShapeDtypeStruct(SHAPE, "bfloat16"))
    programs["dequantize"] = {"hlo": compile_for(H200, lambda q: q.dequantize(), q).as_text()}
    Path(file).write_text(json.dumps(programs))


B200 = (
    H200.replace("major: 9", "major: 10").replace("core_count: 132", "core_count: 148")
    .replace("NVIDIA H200", "NVIDIA B200")
)  # fmt: skip


def main_on_blackwell(file: str):
    """A process compiles for one architecture only."""
    import ifjax

    quantize = functools.partial(ifjax.quantize, fmt="nvfp4")
    a, b = (jax.eval_shape(quantize, jax.ShapeDtypeStruct((rows, 64), "bfloat16")) for rows in (8, 32))
    product = functools.partial(ifjax.einsum, "mk,nk->mn", target="B200")
    Path(file).write_text(json.dumps(compile_for(B200, product, a, b).as_text()))


if __name__ == "__main__":
    {"H200": main, "B200": main_on_blackwell}[sys.argv[1]](sys.argv[2])
