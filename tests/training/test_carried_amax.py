"""Amaxes carried from step to step: by an argument of each product, and by a variable collection in linen models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from samples import normal

import ifjax
from ifjax import Rule
from ifjax.training import Operand, Product, Recipe, quantized_conv, quantized_ragged_dot

FORWARD = Recipe("forward", Product(Operand("nvfp4_ue5m3"), Operand("nvfp4_ue5m3")))
ALL = Recipe("all", *[Product(Operand("nvfp4_ue5m3"), Operand("nvfp4_ue5m3"))] * 3)
SIZES = jnp.array([10, 6, 0])
CONV = {"window_strides": (1, 1), "padding": "SAME"}


def ragged(x, w, amax=None):
    return quantized_ragged_dot(x, w, SIZES, ALL, amax=amax)


def conv(x, w, amax=None):
    return quantized_conv(x, w, ALL, amax=amax, **CONV)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("product", "x", "w"),
    [pytest.param(ragged, normal(16, 32), normal(3, 32, 16, seed=1), id="ragged"),
     pytest.param(conv, normal(2, 4, 8, 8), normal(6, 4, 3, 3, seed=1), id="conv")],
)  # fmt: skip
def test_products_take_carried_maxima_and_give_those_of_this_step(product, x, w):
    g = normal(*jax.eval_shape(product, x, w).shape, seed=2)
    want, pull = jax.vjp(product, x, w)
    maxima = jnp.stack([jnp.max(jnp.abs(a)) for a in (x, w, g)])
    for amax in (maxima, jnp.zeros(3)):
        y, pull_ = jax.vjp(product, x, w, amax)
        *got, back = pull_(g)
        for a, b in zip((y, *got), (want, *pull(g)), strict=True):
            assert_array_equal(a, b)
        assert_array_equal(back, maxima)
    y, pull_ = jax.vjp(product, x, w, maxima / 2)  # saturates, and the maxima at hand come back
    *got, back = pull_(g)
    assert_array_equal(back, maxima)
    assert all((a != b).any() for a, b in zip((y, *got), (want, *pull(g)), strict=True))
    with pytest.raises(ValueError, match=r"amax must be of shape \(3,\)"):
        product(x, w, jnp.zeros(2))


# --- linen


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(32, name="first")(x))
        return nn.DenseGeneral(8, axis=-1, name="last")(x)


RULES = [Rule("head.*", None, optional=True), Rule(".*", recipe="ue5m3")]
X = normal(16, 32)


def loss_of(model, training):
    def loss(variables, key):
        with nn.intercept_methods(training):
            return (model.apply(variables, X, rngs={"quantize": key}) ** 2).sum()

    return loss


def initialized_under(training, model, x=X):
    with nn.intercept_methods(training):
        return model.init(jax.random.key(0), x)


@pytest.mark.slow
def test_a_linen_model_carries_its_maxima_in_a_collection():
    """A step that does not refresh them takes the old ones; a step with zeros is a step without any."""
    model, carrying = Model(), ifjax.interceptors.training(RULES, amax="amax")
    variables = initialized_under(carrying, model)
    shapes = jax.tree.map(lambda a: a.size, variables["amax"])
    assert shapes == {"first": {"kernel": 3}, "last": {"kernel": 3}}
    assert not any(jnp.any(a) for a in jax.tree.leaves(variables["amax"]))
    loss, key = loss_of(model, carrying), jax.random.key(1)

    @jax.jit
    def refresh(params, amax, key):
        return jax.value_and_grad(lambda p, a: loss({"params": p, "amax": a}, key), argnums=(0, 1))(params, amax)

    @jax.jit
    def step(params, amax, key):
        return jax.value_and_grad(lambda p: loss({"params": p, "amax": amax}, key))(params)

    plain = jax.jit(jax.value_and_grad(loss_of(model, ifjax.interceptors.training(RULES))))
    want, want_grad = plain({"params": variables["params"]}, key)
    value, (grad, amax) = refresh(variables["params"], variables["amax"], key)
    assert_array_equal(value, want)
    jax.tree.map(assert_array_equal, grad, want_grad["params"])
    first = variables["params"]["first"]["kernel"]
    assert_array_equal(amax["first"]["kernel"][:2], jnp.stack([jnp.max(jnp.abs(X)), jnp.max(jnp.abs(first))]))
    # The same operands with their own maxima carried: nothing changes. Smaller ones saturate.
    value, grad = step(variables["params"], amax, key)
    assert_array_equal(value, want)
    jax.tree.map(assert_array_equal, grad, want_grad["params"])
    assert step(variables["params"], jax.tree.map(lambda a: a / 4, amax), key)[0] != want


def test_stacked_layers_have_a_row_of_maxima_each():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(32, name="dense")(x), None

    class Stack(nn.Module):
        axes: tuple = (("params", 0), ("amax", 0))

        @nn.compact
        def __call__(self, x):
            made = nn.scan(
                Layer, variable_axes=dict(self.axes), split_rngs={"params": True, "quantize": True}, length=3
            )
            return made(name="layers")(x, None)[0]

    carrying = ifjax.interceptors.training([Rule(".*", recipe=FORWARD)], amax="amax")
    variables = initialized_under(carrying, Stack())
    assert variables["amax"]["layers"]["dense"]["kernel"].shape == (3, 3)
    loss = functools.partial(loss_of(Stack(), carrying), key=jax.random.key(1))
    amax = jax.jit(jax.grad(loss))(variables)["amax"]["layers"]["dense"]["kernel"]
    kernels = variables["params"]["layers"]["dense"]["kernel"]
    assert_allclose(amax[:, 1], jnp.max(jnp.abs(kernels), axis=(1, 2)))
    assert len(np.unique(amax[:, 0])) == 3


def test_a_model_without_the_collection_and_a_layer_called_twice_are_refused():
    carrying = ifjax.interceptors.training([Rule(".*", recipe=FORWARD)], amax="amax")
    variables = initialized_under(carrying, Model())
    with pytest.raises(ValueError, match="'first' has no variable in the collection 'amax': call"):
        loss_of(Model(), carrying)({"params": variables["params"]}, jax.random.key(1))

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(32, name="both")
            return dense(dense(x))

    variables = initialized_under(carrying, Twice())
    with pytest.raises(ValueError, match="'both' is called twice, and the amaxes of two products cannot be told"):
        loss_of(Twice(), carrying)(variables, jax.random.key(1))
    # Two applications in one program are two calls of a model, not of a layer.
    loss = loss_of(Model(), carrying)
    variables = initialized_under(carrying, Model())
    assert jnp.isfinite(loss(variables, jax.random.key(1)) + loss(variables, jax.random.key(2)))
