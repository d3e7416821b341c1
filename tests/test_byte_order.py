"""Arrays in the byte order that JAX does not take (read from FITS, HDF5, other machines) give what native ones give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifjax
from ifjax.training import quantized_ragged_dot

RNG = np.random.default_rng(0)
NUMBERS = ((1,), (0,)), ((), ())
KEY = jax.random.key(0)


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


X, W, EXPERTS = normal(4, 64), normal(64, 32), normal(2, 64, 32)
ROWS = ifjax.quantize(normal(8, 64), "if4", amax_axes=(0,))
COLUMNS = ifjax.quantize(W, "if4", axis=0)
CACHE = ifjax.PackedCache.zeros((1, 8, 2, 64))


def model(params, x):
    return x @ params["w"] + params["b"][None]


def calibrated(x):
    import flax.linen as nn

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(32)(x)

    params = Layer().init(KEY, X)
    rules = ifjax.Rule(".*", "if4", act_fmt="if4", act_amax="static")
    return list(ifjax.calibrate(Layer().apply, params, [x], rules).amax.values())


# A function of arrays, and those.
ENTRANCES = {
    "quantize": (ifjax.quantize, X),
    "amax and weights": (lambda a, w: ifjax.quantize(X, amax=a, weights=w), np.array(3.0), abs(W[:, 0])),
    "integer amax": (lambda a: ifjax.fake_quantize(X, amax=a), np.array(3)),
    "einsum": (lambda x: ifjax.einsum("mk,kn->mn", x, COLUMNS), X),
    "einsum of three": (lambda x, y: ifjax.einsum("mk,kn,n->m", x, COLUMNS, y), X, W[0]),
    "einsum of floats": (lambda x, w: ifjax.einsum("mk,kn->mn", x, w), X, W),
    "matmul": (lambda x: ifjax.matmul(x, COLUMNS), X),
    "operator": (lambda x: x @ COLUMNS, X),
    "dot_general": (lambda x: ifjax.dot_general(x, COLUMNS, NUMBERS), X),
    "dot_general of floats": (lambda x, w: ifjax.dot_general(x, w, NUMBERS), X, W),
    "explain_matmul": (lambda x: len(ifjax.explain_matmul(x, COLUMNS).reason), X),
    "ragged_dot": (lambda x, w, n: ifjax.ragged_dot(x, w, n), X, EXPERTS, np.array([2, 2])),
    "a recipe": (lambda x, w, a: ifjax.quantized_dot_general(x, w, NUMBERS, "if4", KEY, amax=a), X, W, np.ones(3)),
    "a recipe of experts": (lambda x, w, n: quantized_ragged_dot(x, w, n, "w4a4_qat"), X, EXPERTS, np.array([2, 2])),
    "gptq": (lambda w, h: ifjax.gptq(w, h), W, np.eye(64)),
    "hadamard": (lambda x: ifjax.hadamard(x, size=16), X),
    "ms_eden": (lambda x: ifjax.ms_eden(x, key=KEY), X),
    "learn_format": (lambda x: ifjax.learn_format(x, grids=1, rounds=1).grid.values, X),
    "dynamic_update_slice": (lambda x, i: ifjax.dynamic_update_slice(ROWS, x, (i, 0)), X[:1], np.array(2)),
    "at": (lambda x, i: ROWS.at[i].set(x), X[:2], np.array([1, 5])),
    "take": (lambda i: ROWS.take(i), np.array([1, 5])),
    "index": (lambda i: ROWS[i], np.array([1, 5])),
    "a cache": (lambda k, q: CACHE.append(k, k).attend(q), normal(1, 3, 2, 64), normal(1, 3, 4, 64)),
    "quantize_params": (
        lambda x, w, b: ifjax.quantize_params({"w": w, "b": b}, "if4", model=model, sample=x)[0], X, W, W[0]),
    "quantized": (lambda x, w, b: ifjax.quantized(model, ifjax.Rule("w", "if4"))({"w": w, "b": b}, x), X, W, W[0]),
    "trace_products": (
        lambda x, w, b: [s.parameter for s in ifjax.trace_products(model, {"w": w, "b": b}, x)], X, W, W[0]),
    "calibrate": (calibrated, X),
    "evaluate": (lambda x, y: ifjax.evaluate(lambda x: x @ W, lambda x: x @ COLUMNS, [(x, y)], progress=False).tokens,
                 X, np.arange(4)),
}  # fmt: skip


@pytest.mark.by_default("amax and weights", "quantize_params", "evaluate", "hadamard", "take", "ragged_dot", "operator")
@pytest.mark.parametrize("entrance", ENTRANCES)
def test_foreign_byte_order(entrance):
    f, *arrays = ENTRANCES[entrance]
    foreign = [a.astype(a.dtype.newbyteorder()) for a in arrays]
    assert not any(a.dtype.isnative for a in foreign)
    got, want = f(*foreign), f(*arrays)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(one).dtype.isnative
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_trees_in_native_order_stay_what_they_are():
    from ifjax.numerics.byte_order import native_leaves

    tree = {"a": X, "b": [jnp.ones(2), 3, "x", None]}
    assert native_leaves(tree) is tree
    assert native_leaves({"a": X.astype(">f4")})["a"].dtype == np.float32
