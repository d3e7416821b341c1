"""What the Hopper matmul compiles to for an NVIDIA H200, on a machine that has none.

Mosaic writes down what ptxas says and the machine code, so these can be read though nothing runs: registers, spills,
and how many instructions the main loop spends on a weight. Nothing here speaks of speed or of numbers.
"""

import collections
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

IF4, NVFP4, QUAD = "if4", "nvfp4", "quad"
CASES = {
    # decoding, dtype, result, M, N, K; the tiles are those of the table, or in CUTS
    "one row": (IF4, "float16", "float16", 1, 4096, 4096),
    "one row, bfloat16": (IF4, "bfloat16", "bfloat16", 1, 4096, 4096),
    "one mode": (NVFP4, "float16", "float16", 5, 4096, 4096),
    "K by two": (IF4, "bfloat16", "float32", 13, 1000, 11000),
    "64 rows": (IF4, "float16", "bfloat16", 64, 8192, 8192),
    "ragged rows": (IF4, "float16", "float16", 203, 4096, 4096),
    "tables": (QUAD, "float16", "float16", 64, 8192, 8192),
    "tables, bfloat16, one row": (QUAD, "bfloat16", "bfloat16", 1, 4096, 4096),
    "a cluster": (IF4, "float16", "float16", 64, 8192, 8192),
    "many rows": (IF4, "float16", "float16", 4096, 8192, 8192),
    "many rows, bfloat16": (IF4, "bfloat16", "bfloat16", 8192, 28672, 8192),
}
CUTS = {"a cluster": {"m": 64, "k_warpgroups": 2, "k_units": 1, "stages": 4, "cluster": 2}}

# The multiprocessor's integer pipe runs these, 64 lanes a clock. Moves and sums that the compiler gives to the
# multiply-add pipe (IMAD) and what is done once for a warp (U...) do not wait for it.
INTEGER = {
    "BMSK", "IABS", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "MOV", "P2R", "PLOP3", "PRMT", "R2P", "SEL", "SGXT",
    "SHF", "VIADD", "VIMNMX",
}  # fmt: skip


class Program(NamedTuple):
    """What a case was compiled to."""

    warpgroups: int
    ptx: str
    ptxas: str
    sass: str


def instructions(sass: str) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The instructions, as name and rest of the line, and at which of them each label stands."""
    found, labels = [], {}
    for line in sass.splitlines():
        if match := re.match(r"\s*\.(L_x_\d+):", line):
            labels[match[1]] = len(found)
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)(.*)", line):
            found.append((match[1], match[2]))
    return found, labels


def main_loop(sass: str) -> list[tuple[str, str]]:
    """The instructions of the innermost loop with tensor instructions in it."""
    found, labels = instructions(sass)
    loops = []
    for end, (name, rest) in enumerate(found):
        target = re.search(r"L_x_\d+", rest) if name == "BRA" else None
        if target and labels.get(target[0], end + 1) <= end:
            loop = found[labels[target[0]] : end + 1]
            loops += [loop] if any(name == "HGMMA" for name, _ in loop) else []
    return min(loops, key=len)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, Program]:
    for package in ("jax_cuda13_plugin", "nvidia"):
        if importlib.util.find_spec(package) is None:
            pytest.skip("pip install 'ifjax[compile]' to compile for a GPU that is not there")
    import pallas_kernels

    # In a process of its own, on the platform cpu: else the plugin would look for a GPU.
    folder = tmp_path_factory.mktemp("compiled")
    tests = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join(map(str, (Path(pallas_kernels.__file__).parents[1], tests / "codec")))
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, "MOSAIC_GPU_DUMP_TO": str(folder)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    programs = {}
    for case, warpgroups in json.loads((folder / "warpgroups.json").read_text()).items():
        texts = {file.suffix: file.read_text() for file in (folder / case).iterdir()}
        programs[case] = Program(warpgroups, texts[".ptx"], texts[".ptxas"], texts.get(".sass_ctrl", ""))
    return programs


@pytest.fixture
def loop(compiled, case) -> list[tuple[str, str]]:
    if not compiled[case].sass:
        pytest.skip("pip install nvidia-cuda-nvdisasm to read machine code")
    return main_loop(compiled[case].sass)


each_case = pytest.mark.parametrize("case", CASES)
pytestmark = pytest.mark.compile


@each_case
def test_nothing_is_spilled_and_no_product_waits_for_the_one_before(compiled, case):
    ptxas = compiled[case].ptxas
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in ptxas
    assert "serializ" not in ptxas.lower()


@each_case
def test_registers_suffice_for_what_warpgroups_ask_for(compiled, case):
    """To ask for more than the block has got would be to wait for ever."""
    program = compiled[case]
    used = int(re.search(r"Used (\d+) registers", program.ptxas)[1])
    assert used <= 168
    asked = {kind: int(n) for kind, n in re.findall(r"setmaxnreg\.(inc|dec)\.sync\.aligned\.u32\s+(\d+)", program.ptx)}
    assert asked["dec"] < used <= asked["inc"]
    assert program.warpgroups * asked["inc"] + asked["dec"] <= (program.warpgroups + 1) * used


@each_case
def test_weights_go_from_registers_to_the_tensor_cores(loop, case):
    """And while one product is under way the next is decoded: none is waited for in the same step."""
    dtype = CASES[case][1]
    products = [rest for name, rest in loop if name == "HGMMA"]
    assert len(products) >= 8
    assert all(re.match(r"\.64x\d+x16\.F32(\.BF16)? R\d+, R\d+, gdesc", rest) for rest in products)
    assert all((".BF16" in rest) == (dtype == "bfloat16") for rest in products)
    waits = [rest for name, rest in loop if name == "WARPGROUP" and "DEPBAR" in rest]
    assert len(waits) == len(products) // 4
    assert all(rest.split()[-1] == "0x1" for rest in waits)


@each_case
def test_only_blocks_of_a_cluster_load_x_for_each_other(compiled, case):
    assert (".multicast::cluster" in compiled[case].ptx) == (case == "a cluster")


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] != QUAD])
def test_a_weight_costs_two_integer_instructions(loop, case):
    """At most; in bfloat16, whose look-up takes two bytes, 2.25. Memory at 4.3 TB/s delivers 29 weights a clock."""
    counts = collections.Counter(name for name, _ in loop)
    weights = 8 * counts["HGMMA"]  # 64 x 16 by 128 threads
    integer = sum(counts[name] for name in INTEGER)
    assert 1.3 <= integer / weights <= (2.0 if CASES[case][1] == "float16" else 2.25), counts
    assert 64 * weights / integer > 28
    assert 128 * weights / len(loop) > 28, counts


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] == QUAD])
def test_a_weight_by_tables_costs_five_integer_instructions(loop, case):
    """At most, with four tables: two bytes of two halves are looked up, and each block chooses its table."""
    counts = collections.Counter(name for name, _ in loop)
    integer = sum(counts[name] for name in INTEGER) / (8 * counts["HGMMA"])
    assert 3 <= integer <= 5, counts


def test_the_reader_of_machine_code_finds_the_innermost_loop():
    sass = """
.L_x_1:
   -:-:-:Y:01        /*0310*/                   @UP0 SYNCS.EXCH.64 URZ, [UR5], UR16
.L_x_2:
   -:-:-:Y:01        /*0320*/                   HGMMA.64x8x16.F32 R24, R152, gdesc[UR8], R24
   -:-:-:Y:01        /*0330*/              @!P1 BRA `(.L_x_2)
   -:-:-:Y:01        /*0340*/               @P1 BRA `(.L_x_1)
   -:-:-:Y:01        /*0350*/                   BRA `(.L_x_3)
.L_x_3:
"""
    assert [name for name, _ in main_loop(sass)] == ["HGMMA", "BRA"]
    assert [name for name, _ in instructions(sass)[0]] == ["SYNCS", "HGMMA", "BRA", "BRA", "BRA"]


def main(folder: Path):
    import jax
    from jax.experimental import topologies
    from test_compile import H200

    from pallas_kernels import gpu_matmul, tiles
    from pallas_kernels.decoding import Decoding, TableDecoding

    e2m1, int4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), tuple(map(float, range(8)))
    decodings = {IF4: Decoding((e2m1, int4), (7, 6), "e4m3", 16), NVFP4: Decoding((e2m1,), (1,), "e4m3", 16)}
    rows = tuple(tuple((code + 3 * i) / 16 - 0.5 for code in range(16)) for i in range(4))
    decodings[QUAD] = TableDecoding(rows, 3, 3, 3, 63, 16)
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    warpgroups = {}
    for case, (name, dtype, out_dtype, m, n, k) in CASES.items():
        cut = tiles.choose("NVIDIA H200", m, n, k, dtype, out_dtype)
        cut = tiles.Tiles(**CUTS[case]) if case in CUTS else cut
        high, wide = tiles.padded(n, k)
        settings = {"n": n, "k": k, "decoding": decodings[name], "out_dtype": out_dtype, "tiles": cut}
        shapes = [((m, k), dtype), ((high // 64, wide // 128, 8, 128), "int32")]
        shapes += [((high // 64, wide // 128, 128), "int32"), ((), "float32")]
        arguments = [jax.ShapeDtypeStruct(*shape, sharding=device) for shape in shapes]
        traced = jax.jit(lambda *arguments, s=settings: gpu_matmul.matmul(*arguments, **s)).trace(*arguments)
        traced.lower(lowering_platforms=("cuda",)).compile()
        (folder / case).mkdir()
        for file in [file for file in folder.iterdir() if file.is_file()]:
            file.rename(folder / case / file.name)
        warpgroups[case] = cut.warpgroups
    (folder / "warpgroups.json").write_text(json.dumps(warpgroups))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
