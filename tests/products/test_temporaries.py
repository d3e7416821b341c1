"""Memory of programs with many packed weights on a CPU: decoded one after another, not all at once."""

import os
import subprocess
import sys

LAYERS, WIDTH = 8, 256


def work():
    import jax
    import jax.numpy as jnp
    import numpy as np

    import ifjax

    rng = np.random.default_rng(0)
    shapes = {"dense": (WIDTH, WIDTH), "experts": (2, WIDTH, WIDTH)}
    weights = {
        name: [ifjax.quantize(rng.standard_normal(shape, np.float32), "nvfp4", axis=-2) for _ in range(LAYERS)]
        for name, shape in shapes.items()
    }
    x, sizes = jnp.ones((8, WIDTH)), jnp.array([4, 4])

    def dense(x, ws):
        for w in ws:
            x = jnp.tanh(x @ w)
        return x.sum()

    def experts(x, ws):
        for w in ws:
            x = jnp.tanh(ifjax.ragged_dot(x, w, sizes))
        return x.sum()

    programs = {"dense": dense, "experts": experts, "quantized": ifjax.quantized(dense)}
    for name, f in programs.items():
        ws = weights["experts" if name == "experts" else "dense"]
        decoded = 4 * ws[0].size
        for what, g in (("forward", f), ("gradient", jax.grad(f))):
            held = jax.jit(g).lower(x, ws).compile().memory_analysis().temp_size_in_bytes
            assert held < 1.5 * decoded, (name, what, held / decoded)


def test_an_unrolled_model_holds_one_decoded_weight_at_a_time():
    """In a process of one device, as users have: with several nothing is done about it."""
    code = "import test_temporaries; test_temporaries.work()"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
