"""Programs for a CPU stay small: compiling takes half of these tests' time, and a user's first minute."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import ifjax

X = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16)
NUMBERS = ((1,), (0,)), ((), ())


def lowered(f, *args):
    """Return the StableHLO text of f's program for a CPU."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cpu",)).as_text()


def operations(text):
    return len(re.findall(r" = \"?stablehlo\.", text))


@pytest.mark.parametrize(
    ("fmt", "side", "most"), [("if4", 64, 400), ("if4", 512, 560), ("nvfp4", 64, 220), ("nvfp4", 512, 220)]
)
def test_quantize_has_few_operations(fmt, side, most):
    x = jax.ShapeDtypeStruct((side, side), jnp.bfloat16)
    assert operations(lowered(functools.partial(ifjax.quantize, fmt=fmt), x)) <= most


def test_equal_layers_share_their_functions():
    """A layer more adds calls, keys and what lies between products, and no function."""

    def training(layers):
        def loss(ws, x, key):
            for w in ws:
                x = ifjax.quantized_dot_general(x, w, NUMBERS, "nvfp4", key)
            return x.astype(jnp.float32).sum()

        return lowered(jax.grad(loss), [X] * layers, X, jax.eval_shape(lambda: jax.random.key(0)))

    two, three = training(2), training(3)
    assert two.count("func.func") == three.count("func.func")
    assert operations(three) - operations(two) <= 220
