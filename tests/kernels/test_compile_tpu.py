"""What libtpu makes of the 4-bit matmul for a TPU v5e and a v6e, compiled on a machine that has none.

Decoding is work for the vector unit, and its cost can be read from the program: the number of VLIW bundles, of which
one is issued a cycle. Nothing runs, so nothing here speaks of results or of time spent waiting for memory.
"""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.decoding import Decoding, TableDecoding
from pallas_kernels.tpu_matmul import LARGE_M, Tiles, matmul, pack

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
INT4 = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0)
IF4 = Decoding((E2M1, INT4), (7, 6), "e4m3", 16)
QUAD = TableDecoding(tuple(tuple((c + i) / 16 - 0.5 for c in range(16)) for i in range(4)), 3, 3, 3, 63, 16)
SMALL = Tiles(m=16, n=256, k=512)
TOPOLOGIES = ("v5e:2x2", "v6e:2x2")

# (decoding, dtype, rows of x, tiles); K and N are 4096.
CASES = {
    "if4": (IF4, "bfloat16", 16, SMALL),
    "if4, float32": (IF4, "float32", 16, SMALL),
    "if4 in blocks of 8": (Decoding((E2M1, INT4), (7, 6), "e4m3", 8), "bfloat16", 16, SMALL),
    "nvfp4, fouroversix": (Decoding((E2M1,), (1,), "e4m3", 16), "bfloat16", 16, SMALL),
    "nvint4": (Decoding((INT4,), (1,), "e4m3", 16), "bfloat16", 16, SMALL),
    "mxfp4": (Decoding((E2M1,), (1,), "e8m0", 32), "bfloat16", 16, SMALL),
    "quad": (QUAD, "bfloat16", 16, SMALL),
    "quad, float32": (QUAD, "float32", 16, SMALL),
    "quad, 200 rows": (QUAD, "bfloat16", 200, None),
    "if4, 1 row": (IF4, "bfloat16", 1, None),
    "if4, 200 rows": (IF4, "bfloat16", 200, None),
    "if4, as many rows as are taken": (IF4, "bfloat16", LARGE_M - 1, None),
    "if4, float32, 300 rows": (IF4, "float32", 300, None),
}

# The most bundles, prologue and epilogue included. On a v6e a prototype took 515, this kernel 471 (libtpu 0.0.42); on
# a v5e, whose vector unit works in float32, 692. Tables of sixteen values take 1420 and 2170: three times as many.
BUDGET = {
    ("if4", "v6e:2x2"): 515, ("if4", "v5e:2x2"): 720, ("quad", "v6e:2x2"): 1500, ("quad", "v5e:2x2"): 2300,
}  # fmt: skip

each_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
pytestmark = pytest.mark.compile


def compile_elsewhere(cases: list[tuple[str, str]], **environment: str) -> None:
    """Compile (case, topology) pairs in a process of its own: libtpu reads its settings once, and looks for a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("pip install 'jax[tpu]' to compile for a TPU that is not there")
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",  # there is no metadata server to ask
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # there is no device that two processes could share
        "PYTHONPATH": str(Path(pallas_kernels.__file__).parents[1]),
    }
    command = [sys.executable, __file__, json.dumps(cases)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@each_topology
def test_every_format_and_number_of_rows_compiles(topology):
    compile_elsewhere([(case, topology) for case in CASES])


@pytest.mark.parametrize(("case", "topology"), BUDGET)
def test_decoding_stays_within_its_budget_of_bundles(tmp_path, case, topology):
    compile_elsewhere([(case, topology)], LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true")
    (report,) = tmp_path.glob("*-matmul_4bit*-final_hlo-static-per-bundle-utilization.txt")
    bundles = bundles_in(report.read_text())
    shutil.rmtree(tmp_path)  # tens of megabytes of other reports
    # The same product of bfloat16 weights takes some 200: fewer would mean a misread report.
    assert 200 < bundles <= BUDGET[case, topology]


def bundles_in(report: str) -> int:
    """The number of lines that follow a report's heading: each says what one bundle uses."""
    _, lines = report.split("== UTILIZATION:\n")
    return len(lines.splitlines())


def test_the_reader_of_reports_counts_bundles():
    report = "== CAPACTIY:\nMXU, VALU\n    4     4\n== UTILIZATION:\n0 0\n1 4\n0 2\n"
    assert bundles_in(report) == 3


def compile_for(topology: str, function, *arguments: jax.ShapeDtypeStruct):
    """The compiled program of `jit(function)` for the first device of a topology."""
    from jax.experimental import topologies

    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    kind = jax.sharding.AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding) for a in arguments]
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("one",), abstract_device=kind)):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).compile()


def main(cases: str):
    n = k = 4096
    for case, topology in json.loads(cases):
        decoding, dtype, m, tiles = CASES[case]
        arrays = [jax.ShapeDtypeStruct((n, columns), jnp.uint8) for columns in (k, k // decoding.block)]
        words, scales = jax.eval_shape(functools.partial(pack, decoding=decoding), *arrays)
        product = functools.partial(matmul, n=n, k=k, decoding=decoding, out_dtype=dtype, tiles=tiles)
        x, factor = jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((), jnp.float32)
        compile_for(topology, product, x, words, scales, factor)


if __name__ == "__main__":
    main(*sys.argv[1:])
