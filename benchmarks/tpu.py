"""The kernels on a TPU: first their bits and errors, then their times, as `gpu.py` does on a GPU.

    python benchmarks/tpu.py [--json FILE] [--minutes 7.5] [--shapes 4096x4096 ...] [--rows 1 16 ...] [--dry]

Checks, contenders, targets, output and exit codes are those of `gpu.py`; x is bfloat16 or float32.
"""

import sys

import jax.numpy as jnp
from gpu import Machine, main

from pallas_kernels import tpu_blocks

TPU = Machine("tpu.py", "tpu", "a TPU", "tpu", ((jnp.bfloat16, 2.0**-8), (jnp.float32, 2.0**-8)), tpu_blocks)

if __name__ == "__main__":
    sys.exit(main(TPU))
