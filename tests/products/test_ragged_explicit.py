"""ragged_dot on meshes: with explicit axes, which JAX's own does not take, packed, plain, by recipe; in shard_map."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import ifjax
from ifjax.training import quantized_ragged_dot

RNG = np.random.default_rng(0)
X, W = (RNG.standard_normal(shape, np.float32) for shape in ((16, 64), (4, 64, 32)))
SIZES = jnp.array([4, 2, 6, 4], jnp.int32)


def packed(x, w):
    return ifjax.ragged_dot(x, w, SIZES)


def by_recipe(x, w):
    return quantized_ragged_dot(x, w, SIZES, "nvfp4", jax.random.key(0))


SPECS = [
    (P("a"), P(None, None, "b"), P("a", "b")),
    (P("a"), P(None, None, "a"), P("a", None)),  # one axis for both: the rows keep it
    (P(None, "b"), P(None, "b"), P(None, None)),
    (P(), P("b"), P(None, None)),
]


@pytest.mark.by_default("packed-*", "plain-*")
@pytest.mark.parametrize(
    "how, x_spec, w_spec, y_spec",
    [*(("packed", *specs) for specs in SPECS), ("plain", *SPECS[0]),
     *(pytest.param("plain", *specs, marks=pytest.mark.slow) for specs in SPECS[1:]),
     *(pytest.param("recipe", *specs, marks=pytest.mark.slow) for specs in SPECS)],
    ids=str,
)
def test_rows_and_columns_come_out_as_they_went_in(how, x_spec, w_spec, y_spec):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    product = by_recipe if how == "recipe" else packed
    w = ifjax.quantize(W, "nvfp4", axis=1, amax_axes=(0,)) if how == "packed" else jnp.asarray(W)

    def both(x, w):
        y, back = jax.vjp(lambda x: product(x, w), x)
        return y, back(jnp.cos(y))[0]

    want = both(jnp.asarray(X), w)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, x_spec)
        w = ifjax.device_put(w, jax.NamedSharding(mesh, w_spec)) if how == "packed" else jax.device_put(w, w_spec)
        got = jax.jit(both)(x, w)
        assert jax.typeof(got[0]).sharding.spec == y_spec
        assert jax.typeof(got[1]).sharding == jax.typeof(x).sharding
    for one, other in zip(got, want, strict=True):  # sums of 64 products of float32, in another order
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_rows_of_devices_have_gradients():
    """Within shard_map each device has its own rows and groups of them; the experts are everyone's."""
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    w, own, all_of = ifjax.quantize(W, "nvfp4", axis=1, amax_axes=(0,)), jnp.array([1, 0, 0, 1]), P("a")

    def loss(x, sizes):
        return jnp.sin(ifjax.ragged_dot(x, w, sizes)).sum()

    grad = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(all_of, P()), out_specs=all_of)
    got = jax.jit(grad)(jnp.asarray(X), own)
    want = jnp.concatenate([jax.grad(loss)(jnp.asarray(X[i : i + 2]), own) for i in range(0, 16, 2)])
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
