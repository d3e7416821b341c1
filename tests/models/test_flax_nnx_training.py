"""NNX models that multiply by recipes: whose product each layer takes, with whose noise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from samples import normal

import ifjax
from ifjax import Rule
from ifjax.models.flax.nnx import RecipeProduct
from ifjax.training import Operand, Product, Recipe

PLAIN = Recipe("plain", Product(Operand("nvfp4"), Operand("nvfp4")))  # no noise
NOISY = Recipe("noisy", wgrad=Product(Operand(), Operand("nvfp4", "stochastic_unbiased")))
MATRICES = ((1,), (0,)), ((), ())


class Model(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(32, 32, rngs=rngs)
        self.general = nnx.LinearGeneral(32, (2, 16), rngs=rngs)
        self.last = nnx.LinearGeneral((2, 16), 8, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.last(self.general(nnx.relu(self.first(x))))


def loss(model, x):
    return (model(x) ** 2).sum()


def test_each_layer_multiplies_by_its_recipe_and_parameters_stay():
    model, x = Model(nnx.Rngs(0)), normal(16, 32)
    rules = [Rule("last", None), Rule("general", recipe="w4a4_qat"), Rule(".*", recipe=PLAIN)]
    trained = ifjax.with_recipes(model, rules)
    assert jax.tree.structure(nnx.state(trained)) == jax.tree.structure(nnx.state(model))

    def by_hand(params):
        def product(x, name, recipe):
            layer = params[name]
            kernel = layer["kernel"].reshape(32, 32)
            return ifjax.quantized_dot_general(x, kernel, MATRICES, recipe) + layer["bias"].reshape(1, -1)

        h = product(nnx.relu(product(x, "first", PLAIN)), "general", "w4a4_qat")
        return ((h @ params["last"]["kernel"].reshape(32, 8) + params["last"]["bias"][None]) ** 2).sum()

    value, grads = nnx.jit(nnx.value_and_grad(loss))(trained, x)
    wanted, wanted_grads = jax.jit(jax.value_and_grad(by_hand))(nnx.to_pure_dict(nnx.state(model)))
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    got = nnx.to_pure_dict(grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted_grads)
    assert abs(value - loss(model, x)) > 1e-3 * abs(value)
    assert model.first.dot_general is jax.lax.dot_general, "the model that was given is left alone"


@pytest.mark.slow
def test_noise_is_new_at_each_call_differs_by_layer_and_depends_on_the_seed_alone():
    model, x = Model(nnx.Rngs(0)), normal(16, 32)

    def two_gradients(seed):
        trained = ifjax.with_recipes(model, Rule(".*", recipe=NOISY), rngs=nnx.Rngs(quantize=seed))
        step = nnx.jit(nnx.grad(loss))
        keys = [trained.first.dot_general.stream.key[...], trained.general.dot_general.stream.key[...]]
        assert not np.array_equal(*map(jax.random.key_data, keys))
        return [np.asarray(step(trained, x)["first"]["kernel"][...]) for _ in range(2)]

    a, b = two_gradients(1)
    again, _ = two_gradients(1)
    other, _ = two_gradients(2)
    np.testing.assert_array_equal(a, again)
    assert (a != b).any() and (a != other).any()


@pytest.mark.slow
def test_stacked_layers_have_keys_of_their_own_in_a_scan():
    @nnx.vmap
    def layers(key):
        return nnx.Linear(32, 32, rngs=nnx.Rngs(params=key))

    model = layers(jax.random.split(jax.random.key(0), 3))
    trained = ifjax.with_recipes(model, Rule(".*", recipe=NOISY), rngs=nnx.Rngs(quantize=0))
    keys = trained.dot_general.stream.key[...]
    assert keys.shape == (3,) and len({tuple(k) for k in np.asarray(jax.random.key_data(keys))}) == 3

    def apply(model, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, model)

    gradient = nnx.grad(lambda model, x: (apply(model, x) ** 2).sum())(trained, normal(16, 32))
    assert gradient["kernel"].shape == (3, 32, 32)
    np.testing.assert_array_equal(trained.dot_general.stream.count[...], [1, 1, 1])


@pytest.mark.slow
def test_remat_repeats_its_noise():
    model, x = nnx.Linear(32, 16, rngs=nnx.Rngs(0)), normal(16, 32)

    def gradient(call):
        trained = ifjax.with_recipes(model, Rule(".*", recipe=NOISY), rngs=nnx.Rngs(quantize=0))
        return nnx.grad(lambda model, x: (call(model, x) ** 2).sum())(trained, x)

    plain, again = gradient(lambda model, x: model(x)), gradient(nnx.remat(lambda model, x: model(x)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, again)


@pytest.mark.slow
def test_an_optimizer_trains_it_and_the_result_is_packed_and_served():
    model, x = Model(nnx.Rngs(0)), normal(64, 32)
    target = jnp.tanh(x[:, :8])
    trained = ifjax.with_recipes(model, Rule(".*", recipe=NOISY), rngs=nnx.Rngs(quantize=0))
    optimizer = nnx.Optimizer(trained, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(lambda model: ((model(x) - target) ** 2).mean())(model)
        optimizer.update(model, grads)
        return value

    with jax.numpy_dtype_promotion("standard"):  # for optax
        losses = [float(step(trained, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.3 * losses[0]
    nnx.update(model, nnx.state(trained, nnx.Param))
    packed, report = ifjax.quantize_params(nnx.state(model), Rule(".*", "nvfp4"), model=model)
    assert report.totals.quantized == 3
    served = nnx.merge(nnx.graphdef(model), packed)
    assert ((served(x) - target) ** 2).mean() < 0.5 * losses[0]
    # Of the trained copy, too, whose random states are no parameters.
    _, report = ifjax.quantize_params(nnx.state(trained), Rule(".*", "nvfp4"), model=trained)
    assert report.totals.quantized == 3


def test_none_takes_recipes_away_and_another_call_replaces_them():
    model = Model(nnx.Rngs(0))
    trained = ifjax.with_recipes(model, Rule("first", recipe=PLAIN))
    assert isinstance(trained.first.dot_general, RecipeProduct) and trained.first.dot_general.recipe == PLAIN
    other = ifjax.with_recipes(trained, Rule("general", recipe=PLAIN))
    assert other.first.dot_general is jax.lax.dot_general
    assert other.general.dot_general.recipe == PLAIN
    assert nnx.graphdef(ifjax.with_recipes(trained, None)) == nnx.graphdef(model)


class Others(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)
        self.own = nnx.Linear(4, 4, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=rngs)
        self.linear = nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("conv", "nnx.Conv has no place for another product"), ("own", "a dot_general of its own"),
        ("nothing", "matches nothing"),
    ],
)  # fmt: skip
def test_what_has_no_place_for_a_product_is_refused_by_name(path, message):
    with pytest.raises(ValueError, match=message):
        ifjax.with_recipes(Others(nnx.Rngs(0)), [Rule(path, recipe=PLAIN), Rule("linear", recipe=PLAIN)])


def test_others_are_left_alone():
    trained = ifjax.with_recipes(Others(nnx.Rngs(0)), PLAIN)
    assert isinstance(trained.linear.dot_general, RecipeProduct)
    report = ifjax.training_report(nnx.state(trained), PLAIN, model=trained)
    found = {entry.path: entry.fmt or entry.reason for entry in report.entries}
    assert found["linear/kernel"] == "plain"
    assert "nnx.Conv has no place" in found["conv/kernel"] and "of its own" in found["own/kernel"]
    assert found["linear/bias"] == "a bias is added"


def test_refusals():
    model = Model(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'nvfp4' draws noise: pass rngs=nnx.Rngs\(quantize=0\)"):
        ifjax.with_recipes(model, "nvfp4")
    with pytest.raises(ValueError, match="no rule has a recipe"):
        ifjax.with_recipes(model, Rule(".*"))
    with pytest.raises(TypeError, match=r"nnx\.Module"):
        ifjax.with_recipes(object(), PLAIN)


def test_packed_layers_multiply_as_they_are_stored_beside_what_trains():
    """4-bit QLoRA: the base is packed, what it is multiplied with is rounded, and the gradient goes on to the rest."""
    first = nnx.Linear(32, 48, rngs=nnx.Rngs(0))
    packed, _ = ifjax.quantize_params(nnx.state(first), Rule(".*", "nvfp4"), model=first)
    base, x = nnx.merge(nnx.graphdef(first), packed), normal(4, 32)
    trained = ifjax.with_recipes(base, PLAIN)
    np.testing.assert_allclose(
        trained(x), ifjax.fake_quantize(x, "nvfp4") @ packed["kernel"].get_raw_value().dequantize(), atol=1e-5
    )
    grads = nnx.grad(lambda model, x: model(x).sum(), argnums=nnx.DiffState(0, nnx.Param))(trained, x)
    assert set(grads) == {"bias"}
