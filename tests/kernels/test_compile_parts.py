"""Encoders of sharded arrays, compiled for four TPUs that are not there: each is handed its part."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.compile
def test_a_tpu_encodes_its_part_where_axes_are_explicit():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("pip install 'jax[tpu]' to compile for a TPU that is not there")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(re.findall(r'bf16\[1,2048,2048\]\S* custom-call\(.*"tpu_custom_call"', done.stdout)) == 1
    sent = r"(all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute)(?:-start)?\("
    assert set(re.findall(sent, done.stdout)) == {"all-reduce"}  # of amax


def main():
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import ifjax

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    kind = jax.sharding.AbstractDevice(
        device_kind=devices[0].device_kind, num_cores=devices[0].num_cores, platform="tpu"
    )
    axes = {"axis_types": (AxisType.Explicit,) * 2}
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 2), ("a", "b"), **axes)
    place = NamedSharding(mesh, PartitionSpec("a", "b"))
    x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16, sharding=place)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def run(x, key):
        return ifjax.fake_quantize(x, "nvfp4", rounding="stochastic", key=key)

    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((2, 2), ("a", "b"), abstract_device=kind, **axes)):
        print(jax.jit(run).trace(x, key).lower(lowering_platforms=("tpu",)).compile().as_text())


if __name__ == "__main__":
    main()
