"""Numbers and parameters for tests, drawn by NumPy: JAX compiles a program for each shape that it draws."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

# What layers start with where they do not start with random numbers.
STARTS = {"bias": 0, "mean": 0, "scale": 1, "var": 1, "sigma": 1}


def normal(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


def initialized(model: nn.Module, *args: Any, seed: int = 1, **kwargs: Any) -> Any:
    """Return variables as of `model.init`: kernels of variance 1 / fan-in, biases of 0, scales of 1."""
    random = np.random.default_rng(seed)

    def start(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if name in STARTS:
            return jnp.asarray(np.full(leaf.shape, STARTS[name], leaf.dtype))
        fan_in = max(1, leaf.size // leaf.shape[-1]) if leaf.shape else 1
        return jnp.asarray((random.standard_normal(leaf.shape) * fan_in**-0.5).astype(leaf.dtype))

    shapes = jax.eval_shape(lambda: model.init(jax.random.key(seed), *args, **kwargs))
    return jax.tree.map_with_path(start, shapes)
