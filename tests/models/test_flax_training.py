"""Linen models under the training interceptor: whose product each layer takes, with whose noise."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import initialized, normal

import ifjax
from ifjax import Rule
from ifjax.training import RECIPES, Operand, Product, Recipe

PLAIN = Recipe("plain", Product(Operand("nvfp4"), Operand("nvfp4")))  # no noise
NOISY = Recipe("noisy", wgrad=Product(Operand(), Operand("nvfp4", "stochastic_unbiased")))


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="first")(x)
        x = nn.Einsum((2, 16, 32), "bkh,hkn->bn", name="middle")(x.reshape(-1, 16, 2))
        x = nn.DenseGeneral((2, 16), name="general")(x)
        return nn.DenseGeneral(8, axis=(-2, -1), name="last")(x)


def built(model, x):
    variables = initialized(model, x)
    return jax.tree.map(lambda a: a + 0.125 if a.ndim == 1 else a, variables)


def test_each_layer_multiplies_by_its_recipe():
    model, x = Model(), normal(16, 32)
    variables = built(model, x)
    rules = [Rule("last", None), Rule("m.*", recipe="w4a4_qat"), Rule(".*", recipe=PLAIN)]

    def by_hand(params, x):
        def product(name, x):
            kernel, recipe = params[name]["kernel"], "w4a4_qat" if name == "middle" else PLAIN
            dims = {"first": (((1,), (0,)), ((), ())), "middle": (((2, 1), (0, 1)), ((), ()))}.get(name)
            dims = dims or (((1,), (0,)), ((), ()))
            y = ifjax.quantized_dot_general(x, kernel, dims, recipe)
            return y + params[name]["bias"].reshape(1, *y.shape[1:])

        x = product("first", x)
        x = product("middle", x.reshape(-1, 16, 2))
        x = product("general", x)
        last = params["last"]
        return jnp.einsum("bhk,hkn->bn", x, last["kernel"]) + last["bias"][None]

    def loss(apply):
        return jax.jit(jax.value_and_grad(lambda params: (apply(params) ** 2).sum()))

    value, grad = loss(lambda p: ifjax.quantized(model.apply, rules)({"params": p}, x))(variables["params"])
    wanted, wanted_grad = loss(lambda p: by_hand(p, x))(variables["params"])
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grad, wanted_grad)
    plain = model.apply(variables, x)
    assert abs(value - (plain**2).sum()) > 1


class Layers(nn.Module):
    split: bool = True

    @nn.compact
    def __call__(self, x):
        rngs = {"params": True} | ({"quantize": True} if self.split else {})
        layer = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs=rngs, length=2)
        return layer(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(16)(x), None


def gradient(model, variables, x, rules, **options):
    apply = ifjax.quantized(model.apply, rules)
    return jax.jit(jax.grad(lambda v: (apply(v, x, **options) ** 2).sum()))(variables)["params"]


@pytest.mark.slow
def test_noise_is_of_the_key_and_the_layer():
    x = normal(32, 16)
    pair = nn.Sequential([nn.Dense(16, use_bias=False, kernel_init=nn.initializers.orthogonal()) for _ in range(2)])
    variables = initialized(pair, x)
    runs = [gradient(pair, variables, x, NOISY, rngs={"quantize": jax.random.key(i)}) for i in (0, 0, 1)]
    jax.tree.map(np.testing.assert_array_equal, runs[0], runs[1])
    float_grad = jax.grad(lambda v: (pair.apply(v, x) ** 2).sum())(variables)["params"]
    errors = [np.asarray(run[f"layers_{i}"]["kernel"] - float_grad[f"layers_{i}"]["kernel"])
              for run in (runs[0], runs[2]) for i in (0, 1)]
    for i, a in enumerate(errors):
        assert np.abs(a).max() > 0
        for b in errors[:i]:  # independent: no correlation beyond that of 256 random numbers
            assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / 16


@pytest.mark.slow
@pytest.mark.parametrize("split", [True, False])
def test_scanned_and_rematerialized_layers_draw_the_same_noise_from_the_same_key(split):
    """The program folds the layer's number into the key: Flax need not split it."""
    x, model = normal(32, 16), Layers(split=split)
    variables = initialized(model, x)
    first, again, other = (
        gradient(model, variables, x, NOISY, rngs={"quantize": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    pairs = zip(*map(jax.tree.leaves, (first, other)), strict=True)
    assert any(not np.array_equal(a, b) for a, b in pairs)


def test_missing_noise_is_an_error_only_where_it_is_needed():
    model, x = nn.Dense(8), normal(16, 32)
    variables = initialized(model, x)
    evaluated = ifjax.quantized(model.apply, NOISY)(variables, x)
    np.testing.assert_array_equal(evaluated, model.apply(variables, x))
    with pytest.raises(ValueError, match="rngs="):
        gradient(model, variables, x, NOISY)


def test_what_cannot_train_quantized_is_refused_by_name():
    class Convolves(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8)(nn.Conv(16, (3,))(x))

    model, x = Convolves(), normal(2, 4, 16)
    variables = initialized(model, x)
    with pytest.raises(ValueError, match="'Conv_0': it is a convolution"):
        ifjax.quantized(model.apply, [Rule("Conv.*", recipe=PLAIN), Rule(".*", recipe=PLAIN)])(variables, x)
    y = ifjax.quantized(model.apply, PLAIN)(variables, x)
    assert not np.array_equal(y, model.apply(variables, x))
    own = nn.Dense(8, dot_general=jax.lax.dot_general)
    with pytest.raises(ValueError, match="dot_general of its own"):
        ifjax.quantized(own.apply, Rule("", recipe=PLAIN))(initialized(own, x), x)
    packed, _ = ifjax.quantize_params(variables, "nvfp4", model=model, sample=x)
    # A recipe over a packed base multiplies by what is stored, whichever way it comes in.
    with nn.intercept_methods(ifjax.interceptors.training([Rule("Conv.*", None), Rule(".*", recipe=PLAIN)])):
        beside = model.apply(packed, x)
    assert not np.array_equal(beside, model.apply(packed, x))
    rules = [Rule("Conv.*", None), Rule(".*", recipe=PLAIN)]
    np.testing.assert_allclose(ifjax.quantized(model.apply, rules)(packed, x), beside, atol=1e-5)
    with pytest.raises(ValueError, match="no rule has a recipe"):
        ifjax.interceptors.training(Rule(".*"))
    with pytest.raises(ValueError, match="calibration is for inference"):
        ifjax.quantized(model.apply, PLAIN, calibration=object())


@pytest.mark.slow
def test_a_recipe_stands_for_the_default_rules():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = nn.Embed(12, 16)
            x = nn.Dense(16)(table(tokens))
            return table.attend(x) + nn.Dense(12, name="lm_head")(x)

    model, tokens = Tied(), jnp.arange(8)
    variables = initialized(model, tokens)
    with nn.intercept_methods(ifjax.interceptors.training("w4a4_qat")):
        y = model.apply(variables, tokens)
    x = variables["params"]["Embed_0"]["embedding"][tokens]
    dense, head = variables["params"]["Dense_0"], variables["params"]["lm_head"]
    x = ifjax.quantized_dot_general(x, dense["kernel"], (((1,), (0,)), ((), ())), "w4a4_qat")
    wanted = x @ variables["params"]["Embed_0"]["embedding"].T + x @ head["kernel"]
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


def test_rules_carry_recipes_to_files_and_back(tmp_path):
    rules = (Rule("a", None), Rule(".*", recipe=RECIPES["nvfp4"]))
    assert rules[1].recipe == "nvfp4"
    ifjax.save_rules(rules, tmp_path / "rules.json")
    assert ifjax.load_rules(tmp_path / "rules.json") == rules
    with pytest.raises(ValueError, match="'plain' is a recipe of your own"):
        ifjax.save_rules([Rule(".*", recipe=PLAIN)], tmp_path / "rules.json")
    with pytest.raises(ValueError, match="unknown recipe 'nvfp5'"):
        Rule(".*", recipe="nvfp5")
    with pytest.raises(ValueError, match="recipe='nvfp4' has no effect with weight_fmt=None"):
        Rule(".*", None, recipe="nvfp4")


def test_the_report_says_which_kernel_takes_which_recipe_and_why_others_do_not():
    class Mixed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (3,), name="conv")(x) + nn.Embed(8, 16, name="table")(jnp.arange(8, dtype=jnp.int32))[None]
            x = nn.Dense(64, name="up")(x)
            x = nn.Dense(16, name="own", dot_general=jax.lax.dot_general)(x)
            x = nn.LayerNorm(name="norm")(x)
            return nn.Dense(4, name="head")(x)

    model, x = Mixed(), jax.ShapeDtypeStruct((2, 8, 16), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    rules = [Rule("head"), Rule(".*", recipe="if4")]
    report = ifjax.training_report(params, rules, model=model, sample=x)
    found = {entry.path: entry.fmt or entry.reason for entry in report.entries}
    assert found == {
        "conv/kernel": "it is a convolution", "conv/bias": "a bias is added", "up/kernel": "if4",
        "up/bias": "a bias is added", "own/kernel": "the module has a dot_general of its own",
        "own/bias": "a bias is added", "norm/scale": "it is no matrix", "norm/bias": "it is no matrix",
        "head/kernel": "the rule 'head' has no recipe", "head/bias": "a bias is added",
        "table/embedding": "it looks rows up and multiplies nothing",
    }  # fmt: skip
    assert {entry.path for entry in report.entries if not entry.expected} == {"conv/kernel", "own/kernel"}
    with pytest.raises(ValueError, match="conv/kernel"):
        report.check()
    with pytest.raises(ValueError, match=r"it is a convolution"):
        ifjax.training_report(params, Rule("conv", recipe="if4"), model=model, sample=x)
    with pytest.raises(TypeError, match="needs model="):
        ifjax.training_report(params, "if4", model=None)
