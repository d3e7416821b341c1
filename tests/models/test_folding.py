"""Smoothing and rotation folded into the parameters that make a product's inputs: where, and what stays what it was."""

import functools
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from samples import initialized, normal

import ifjax
from ifjax import Rule
from ifjax.models.adapters import Adapted

X = normal(2, 6, 32) * jnp.where(jnp.arange(32) == 5, 20.0, 1.0)[None, None]
RULES = (Rule("head|norm.*", None, optional=True),)


def rms(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale[None, None]


def llama(params, x):
    """A block whose norms, attention and gate are those of Llama; the second norm multiplies by 1 + its scale."""
    h = rms(x, params["norm1"])
    q, k = (jnp.einsum("btd,dhe->bthe", h, params[n]) for n in ("query", "key"))
    v = (h @ params["value"] + params["value_bias"][None, None]).reshape(*h.shape[:2], 2, 16)
    a = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k), -1)
    x = x + jnp.einsum("bhts,bshe->bthe", a, v).reshape(h.shape) @ params["out"]
    h = rms(x, 1 + params["norm2"])
    x = x + (jax.nn.silu(h @ params["gate"]) * (h @ params["up"])) @ params["down"]
    return x @ params["head"]


SHAPES = {
    "norm1": (32,), "norm2": (32,), "query": (32, 2, 16), "key": (32, 2, 16), "value": (32, 32), "value_bias": (32,),
    "out": (32, 32), "gate": (32, 64), "up": (32, 64), "down": (64, 32), "head": (32, 16),
}  # fmt: skip


@functools.cache
def llama_params():
    params = {n: normal(*s, seed=i) * s[0] ** -0.5 for i, (n, s) in enumerate(SHAPES.items())}
    return params | {"norm1": 1 + params["norm1"]}


def calibrated(fn, params, rules, x=X):
    if not any(rule.needs_inputs or rule.gptq for rule in rules):
        return None
    return ifjax.calibrate(fn, params, [(x,)], rules, progress=False)


def folded(fn, params, x=X, *, model=None, **how: Any):
    """Notes of `fold_params`, after a check that the function is the same to 1e-5."""
    rules = (*RULES, Rule(".*", "nvfp4", optional=True, **how))
    tree, notes = ifjax.fold_params(
        params, rules, model=model or fn, sample=(x,), calibration=calibrated(fn, params, rules, x)
    )
    wanted = fn(params, x)
    np.testing.assert_allclose(fn(tree, x), wanted, atol=1e-5 * float(jnp.abs(wanted).max()), rtol=0)
    assert jax.tree.map(jnp.shape, jax.tree.leaves(tree)) == jax.tree.map(jnp.shape, jax.tree.leaves(params))
    return notes


def test_smoothing_goes_into_norms_and_linear_layers():
    notes = folded(llama, llama_params(), smooth=0.5)
    assert {path: note for path, note in notes.items() if "norm" not in path} == {
        "query": "smoothing folded into norm1", "key": "smoothing folded into norm1",
        "value": "smoothing folded into norm1; has the smoothing of out", "value_bias": "has the smoothing of out",
        "out": "smoothing folded into value, value_bias", "gate": "smoothing folded into norm2",
        "up": "smoothing folded into norm2; has the smoothing of down", "down": "smoothing folded into up",
    }  # fmt: skip
    assert notes["norm1"] == "has the smoothing of query, key, value"


def test_rotation_goes_where_it_commutes():
    notes = folded(llama, llama_params(), rotate=16)
    assert notes["out"] == "rotation folded into value, value_bias"
    for path in ("query", "gate", "down"):
        assert notes[path] == "rotation at each call: mul treats the channels of a run unlike"
    # A run of 32 channels lies across two heads, which the attention of each weighs in its own way.
    assert "across the batches" in folded(llama, llama_params(), rotate=32)["out"]
    notes = folded(llama, llama_params(), smooth=0.5, rotate="greedy")
    assert notes["out"] == "smoothing folded into value, value_bias; rotation folded into value, value_bias"
    assert notes["up"].startswith("smoothing folded into norm2; rotation at each call: mul")


def test_a_folded_model_runs_the_program_of_a_plain_one():
    """Same equations, same shapes, and no word of scales; and the rounding errors stay small."""
    params, texts = llama_params(), []
    for smooth in (None, 0.5):
        rules = (*RULES, Rule(".*", "nvfp4", "nvfp4", optional=True, smooth=smooth))
        packed, report = ifjax.quantize_params(
            params, rules, model=llama, sample=(X,), calibration=calibrated(llama, params, rules)
        )
        report.check()
        assert not any(isinstance(leaf, Adapted) for leaf in packed.values())
        texts.append(str(jax.make_jaxpr(ifjax.quantized(llama, rules))(packed, X)))
        assert all(entry.sqnr_db is not None and entry.sqnr_db > 18 for entry in report.quantized)
    addresses = re.compile(r"0x[0-9a-f]+")
    assert addresses.sub("", texts[0]) == addresses.sub("", texts[1])


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        h = nn.relu(nn.Dense(48)(nn.LayerNorm()(x)))
        return x + nn.Dense(32)(h)


@pytest.mark.slow
def test_linen_norms_with_biases_and_relu():
    model = Attention()
    params = initialized(model, X)
    notes = folded(model.apply, params, model=model, smooth=0.5)
    attention = "MultiHeadDotProductAttention_0"
    assert notes[f"{attention}/query/kernel"] == "smoothing folded into LayerNorm_0/scale, LayerNorm_0/bias"
    assert notes[f"{attention}/out/kernel"] == (
        f"smoothing folded into {attention}/value/kernel, {attention}/value/bias"
    )
    assert notes["Dense_1/kernel"] == "smoothing folded into Dense_0/kernel, Dense_0/bias"


@pytest.mark.slow
def test_nnx():
    model = nnx.Sequential(nnx.LayerNorm(32, rngs=nnx.Rngs(0)), nnx.Linear(32, 48, rngs=nnx.Rngs(1)),
                           nnx.Linear(48, 16, rngs=nnx.Rngs(2)))  # fmt: skip
    graph, state = nnx.split(model)
    notes = folded(lambda state, x: nnx.merge(graph, state)(x), state, smooth=0.5, rotate=16)
    assert notes["layers/1/kernel"].startswith("smoothing folded into layers/0/scale, layers/0/bias; rotation at each")
    assert notes["layers/2/kernel"] == (
        "smoothing folded into layers/1/kernel, layers/1/bias; rotation folded into layers/1/kernel, layers/1/bias"
    )


@pytest.mark.slow
def test_layers_of_a_scan_and_parts_of_a_joint_projection():
    def fn(params, x):
        def layer(x, w):
            q, k, v = jnp.split(rms(x, w["scale"]) @ w["qkv"].T, 3, -1)
            return x + (jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v) @ w["out"], None

        return jax.lax.scan(layer, x, params)[0]

    params = {"scale": 1 + 0.1 * normal(2, 32), "qkv": normal(2, 96, 32) / 6, "out": normal(2, 32, 32) / 6}
    notes = folded(fn, params, smooth=0.5)
    assert notes["out"] == "smoothing folded into qkv"
    assert notes["qkv"] == "smoothing folded into scale; has the smoothing of out"
    assert folded(fn, params, rotate=16)["out"] == "rotation folded into qkv"


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], "tanh comes between"),
        (lambda p, x: (lambda h: (h @ p["b"]) + h)(x @ p["a"]), "add reads the input, or what it is made of, too"),
        (lambda p, x: (lambda h: (h @ p["b"], h))(x @ p["a"]), "its input is a result of the function"),
        (lambda p, x: (lambda h: (h * h) @ p["b"])(x @ p["a"]), "mul reads the input, or what it is made of, too"),
        (lambda p, x: x @ p["a"] @ p["b"] @ p["b"], "the program reads the weight more than once"),
        (lambda p, x: x @ p["b"] + x @ p["a"].astype(jnp.bfloat16).astype(jnp.float32), "an input of the function"),
        (lambda p, x: (lambda h, w: h @ w[0] + h @ w[1])(x @ p["a"], jnp.split(p["b"], 2, 1)), "the weight apart"),
        (lambda p, x: (x @ p["a"]).astype(jnp.int32).astype(jnp.float32) @ p["b"], "convert_element_type comes"),
        (lambda p, x: (jax.nn.silu(x @ p["a"]) + 1) @ p["b"], "logistic comes between"),
    ],
)
def test_what_is_not_folded(fn, why):
    """Nothing changes where another reader would see it, and the report says which one."""
    params = {"a": normal(32, 32) / 6, "b": normal(32, 32, seed=1) / 6}
    rule = Rule(".*", "nvfp4", smooth=0.5)
    seen = calibrated(fn, params, [rule])
    tree, notes = ifjax.fold_params(params, rule, model=fn, sample=(X,), calibration=seen)
    assert notes["b"].startswith("smoothing at each call: ") and why in notes["b"], notes["b"]
    jax.tree.map(np.testing.assert_array_equal, tree, params)


def test_others_that_read_the_same_norm():
    def fn(params, x):
        h = rms(x, params["norm"])
        return h @ params["a"], h @ params["b"]

    params = {"norm": jnp.ones(32), "a": normal(32, 16), "b": normal(32, 16, seed=1)}
    # Floats take the change; weights with another rule do not, and nothing is folded then.
    rules = [Rule("b|norm", None), Rule(".*", "nvfp4", smooth=0.5)]
    tree, notes = ifjax.fold_params(params, rules, model=fn, sample=(X,), calibration=calibrated(fn, params, rules))
    assert notes == {"a": "smoothing folded into norm", "norm": "has the smoothing of a",
                     "b": "takes the smoothing of a"}  # fmt: skip
    for one, other in zip(fn(tree, X), fn(params, X), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()))
    rules = [Rule("b", "nvfp4", smooth=0.6), Rule("norm", None), Rule(".*", "nvfp4", smooth=0.5)]
    tree, notes = ifjax.fold_params(params, rules, model=fn, sample=(X,), calibration=calibrated(fn, params, rules))
    assert notes["a"] == "smoothing at each call: 'b', which reads the input too, has another rule"
    jax.tree.map(np.testing.assert_array_equal, tree, params)
    packed = {"a": ifjax.quantize(params["a"], "nvfp4", axis=0), "norm": params["norm"], "b": params["b"]}
    _, report = ifjax.quantize_params(packed, rules, model=fn, sample=(X,), calibration=calibrated(fn, params, rules))
    assert "'a', which reads the input too, is packed" in str([e.note for e in report.entries if e.path == "b"])
