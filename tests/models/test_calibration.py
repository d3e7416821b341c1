"""Calibration by the products of a traced program, whichever module multiplies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from samples import normal

import ifjax
from ifjax import Rule

PARAMS = {"up": normal(32, 48, seed=1), "heads": normal(3, 16, 32, seed=2), "bias": normal(48, seed=3)}
BATCHES = [normal(8, 32), 3 * normal(6, 32, seed=4)]


def fn(p, x, *, scale=1.0):
    h = jnp.tanh(x @ p["up"] + p["bias"][None]).reshape(-1, 3, 16) * scale
    return jnp.einsum("bnh,nhd->bd", h, p["heads"])


def rows_of_heads(x):
    return np.tanh(np.asarray(x) @ PARAMS["up"] + PARAMS["bias"][None])


def test_amax_values_are_those_of_the_products_inputs():
    rules = [Rule("up", "nvfp4", act_fmt="nvfp4", act_amax="static"), Rule("heads", "nvfp4")]
    found = ifjax.calibrate(fn, PARAMS, BATCHES, rules, progress=False)
    assert found.amax == {"up": float(max(np.abs(x).max() for x in BATCHES))} and not found.hessians
    mean = ifjax.calibrate(fn, PARAMS, [(x,) for x in BATCHES], rules, statistic="mean", progress=False)
    assert mean.amax["up"] == pytest.approx(np.mean([np.abs(x).max() for x in BATCHES]))
    packed, _ = ifjax.quantize_params(PARAMS, rules, model=fn, sample=BATCHES[0])
    assert ifjax.calibrate(fn, packed, BATCHES, rules, progress=False).amax == found.amax
    q = ifjax.quantize(BATCHES[0], "nvfp4", amax=found.amax["up"]).dequantize()
    wanted = fn(PARAMS | {name: packed[name].dequantize() for name in ("up", "heads")}, q)
    got = ifjax.quantized(fn, rules, calibration=found)(packed, BATCHES[0])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_gptq_goes_by_the_sums_of_squares_of_inputs():
    rule = Rule("up|heads", "nvfp4", gptq=True)
    found = ifjax.calibrate(fn, PARAMS, BATCHES, rule, progress=False)
    x = np.concatenate([np.asarray(b) for b in BATCHES])
    np.testing.assert_allclose(found.hessians["up"], x.T @ x, rtol=1e-5, atol=1e-4)
    h = rows_of_heads(x)
    np.testing.assert_allclose(found.hessians["heads"], h.T @ h, rtol=1e-4, atol=1e-4)
    packed, report = ifjax.quantize_params(PARAMS, rule, model=fn, sample=BATCHES[0], calibration=found)
    assert report.check().totals.quantized == 2
    wanted = ifjax.gptq(PARAMS["up"], found.hessians["up"], "nvfp4", axis=-2)
    np.testing.assert_array_equal(packed["up"].codes, wanted.codes)


def test_modules_of_nnx_and_flags():
    model = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    rule = Rule("", "nvfp4", act_fmt="nvfp4", act_amax="static")
    batches = [{"x": x, "twice": True} for x in BATCHES]

    def call(model, x, twice):
        return model(2 * x if twice else x)

    found = ifjax.calibrate(call, model, batches, rule, progress=False)
    assert list(found.amax.values()) == [2 * float(max(np.abs(x).max() for x in BATCHES))]


def test_modules_of_linen_that_are_of_no_known_class():
    class Transposed(nn.Module):  # as Conv1D of transformers' GPT-2
        @nn.compact
        def __call__(self, x):
            bias = self.param("bias", nn.initializers.normal(0.1), (48,))
            return x @ self.param("kernel", nn.initializers.lecun_normal(), (48, 32)).T + bias[None]

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = jnp.tanh(Transposed(name="up")(x))
            parts = h.reshape(-1, 2, 24) + self.param("bias", nn.initializers.normal(0.1), (2, 24))[None]
            return nn.Dense(16, name="down")(h) + jnp.einsum("bhk,bhk->b", parts, parts)[:, None] / 99

    model = Block()
    params = model.init(jax.random.key(0), BATCHES[0])["params"]
    batches = [(x,) for x in BATCHES]
    rules = Rule(".*", "nvfp4", smooth=0.5, act_fmt="nvfp4", gptq=True)

    def fn(p, x):
        return model.apply({"params": p}, x)

    found = ifjax.calibrate(fn, params, batches, rules, progress=False)
    x = np.concatenate([np.asarray(b) for b in BATCHES])
    h = np.tanh(x @ np.asarray(params["up"]["kernel"]).T + params["up"]["bias"][None])
    assert found.hessians.keys() == found.inputs.keys() == {"up/kernel", "down"}
    for path, rows in {"up/kernel": x, "down": h}.items():
        np.testing.assert_allclose(found.hessians[path], rows.T @ rows, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(found.inputs[path].largest, np.abs(rows).max(0), rtol=1e-5)
    packed, report = ifjax.quantize_params(params, rules, model=fn, sample=batches[0], calibration=found)
    assert report.check().totals.quantized == 2
    got, wanted = ifjax.quantized(fn, rules, calibration=found)(packed, BATCHES[0]), fn(params, BATCHES[0])
    assert 1e-3 < np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 0.2
    static = Rule(".*", "nvfp4", act_fmt="nvfp4", act_amax="static")
    peaks = ifjax.calibrate(fn, params, batches, static, progress=False).amax
    assert peaks == {"up/kernel": np.abs(x).max(), "down": pytest.approx(np.abs(h).max(), rel=1e-5)}


def test_layers_of_a_scan_share_their_statistics_and_wrong_rules_are_told():
    layers = normal(2, 32, 32) / 6

    def deep(p, x):
        return jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, p["w"])[0]

    rule = Rule(".*", "nvfp4", act_fmt="nvfp4", act_amax="static")
    found = ifjax.calibrate(deep, {"w": layers}, [BATCHES[0]], rule, progress=False)
    assert found.amax == {"w": float(np.abs(BATCHES[0]).max())}
    with pytest.raises(ValueError, match="matches nothing"):
        ifjax.calibrate(deep, {"w": layers}, [BATCHES[0]], [Rule("v", "nvfp4", gptq=True), rule], progress=False)
    with pytest.raises(ValueError, match=r"activations of \['w'\] are not finite"):
        ifjax.calibrate(deep, {"w": layers}, [BATCHES[0] * jnp.inf], rule, progress=False)
