"""Smoothed and rotated weights: the same function in float, less error in 4 bits, and what is refused."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import initialized, normal

import ifjax
from ifjax import Rule
from ifjax.models.adapters import Adapted
from ifjax.models.transforms import Transform


def outliers(shape, seed=0):
    """Activations of which two channels are large, as those of language models."""
    x = np.array(normal(*shape, seed=seed))
    x[..., 5] *= 30
    x[..., 40] *= 12
    return jnp.asarray(x)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 32), name="heads")(x)
        return nn.DenseGeneral(48, axis=(-2, -1), name="out")(jnp.tanh(x))


X = outliers((64, 64))


@functools.cache
def model():
    made = Model()
    return made, initialized(made, X)


def quantized_by(rules, rows=X):
    made, params = model()
    calibration = None
    if any(rule.needs_inputs or rule.gptq for rule in rules):
        calibration = ifjax.calibrate(made.apply, params, [rows], rules, progress=False)
    packed, report = ifjax.quantize_params(params, rules, model=made, sample=rows, calibration=calibration)
    report.check()
    return packed


@pytest.mark.by_default("*32}", "*greedy*")
@pytest.mark.parametrize(
    "how", [{"rotate": 16}, {"rotate": "greedy"}, {"smooth": 0.5}, {"smooth": 0.5, "rotate": 32},
              {"rotate": "whole"}, {"smooth": "awq", "rotate": 16}], ids=str
)
def test_the_function_stays_what_it_was(how):
    """The transform of weights and that of inputs cancel: to 1e-5 in float32."""
    made, params = model()
    packed = quantized_by([Rule(".*", "nvfp4", **how)])["params"]["heads"]["kernel"]
    w = params["params"]["heads"]["kernel"]
    assert isinstance(packed, Adapted) and packed.shape == w.shape
    t, x = packed.transform, X
    exact = jnp.tensordot(x, w, 1)
    moved = jnp.tensordot(t.inputs(x, -1), t.weights(w, packed.axis), 1)
    np.testing.assert_allclose(moved, exact, atol=1e-5 * float(jnp.abs(exact).max()))
    np.testing.assert_allclose(t.undone(t.weights(w, packed.axis), packed.axis), w, atol=1e-6)
    both = t.inputs(jax.lax.complex(X, X[::-1]), -1)
    np.testing.assert_array_equal(both, jax.lax.complex(t.inputs(X, -1), t.inputs(X[::-1], -1)))
    # The program multiplies what was decoded, in the new basis, and gives what the decoded weights give.
    run = ifjax.quantized(made.apply)
    tree = quantized_by([Rule(".*", "nvfp4", **how)])
    dense = jax.tree.map(lambda a: a.dequantize() if isinstance(a, Adapted) else a, tree,
                         is_leaf=lambda a: isinstance(a, Adapted))  # fmt: skip
    y, wanted = jax.jit(run)(tree, X), made.apply(dense, X)
    np.testing.assert_allclose(y, wanted, atol=2e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.slow
def test_outliers_cost_less():
    made, params = model()
    exact = made.apply(params, X)

    def error(fmt, **how):
        rules = [Rule("heads", fmt, fmt, **how), Rule("out", None)]
        y = ifjax.quantized(made.apply, rules)(quantized_by(rules), X)
        return float(((y - exact) ** 2).mean() / (exact**2).mean())

    # Blocks of 32 with powers of two as scales gain by rotations, those of 16 with E4M3 by smoothing alone.
    plain, turned = error("mxfp4"), error("mxfp4", rotate=64)
    assert turned < 0.85 * plain  # of one draw of weights: two gave under .7 and .795
    assert error("mxfp4", smooth=0.5, rotate=16) < 0.5 * min(turned, error("mxfp4", smooth=0.5) * 1.5)
    assert error("nvfp4", smooth=0.5) < 0.5 * error("nvfp4")
    assert error("nvfp4", smooth="awq", gptq=True) < 0.5 * error("nvfp4", gptq=True)
    assert error("mxfp4", rotate="greedy", gptq=True) < 0.5 * error("mxfp4", gptq=True)


@pytest.mark.slow
def test_plain_functions_scan_and_lora():
    w = normal(3, 64, 64) / 8

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.T), None), x, params["w"])[0]

    packed, _ = ifjax.quantize_params({"w": w}, Rule(".*", "nvfp4", rotate=32), model=fn, sample=X)
    dense = {"w": packed["w"].dequantize()}
    np.testing.assert_allclose(jax.jit(ifjax.quantized(fn))(packed, X), fn(dense, X), atol=2e-5)
    adapters = ifjax.lora.init(jax.random.key(2), packed, rank=2, model=fn, sample=X)
    adapters = {"w": dataclasses.replace(adapters["w"], b=jnp.ones_like(adapters["w"].b) * 0.01)}
    update = (adapters["w"].a * adapters["w"].b).sum(-1)
    y = ifjax.quantized(fn)(ifjax.lora.attach(packed, adapters), X)
    np.testing.assert_allclose(y, fn({"w": dense["w"] + update}, X), atol=2e-5)
    merged = ifjax.lora.merge(packed, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(packed)
    assert float(jnp.abs(merged["w"].dequantize() - dense["w"] - update).mean()) < 0.02
    t = Transform(hadamard=16)
    h = jnp.matmul(X.T, X, precision="highest")
    moved = t.inputs(X, -1)
    np.testing.assert_allclose(t.hessian(h), jnp.matmul(moved.T, moved, precision="highest"), rtol=2e-4, atol=0.1)


def test_refusals(tmp_path):
    made, params = model()
    for fields, match in [
        ({"smooth": 2}, "smooth must be"), ({"rotate": 6}, "rotate must be"), ({"smooth": "x"}, "smooth must be"),
        ({"smooth": 0.5, "act_fmt": "nvfp4", "act_amax": "static"}, "before smoothing"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Rule(".*", "nvfp4", **fields)
    with pytest.raises(ValueError, match="no effect"):
        Rule(".*", None, rotate=16)
    with pytest.raises(ValueError, match=r"'heads'.*needs calibration"):
        ifjax.quantize_params(params, Rule(".*", "nvfp4", smooth=0.5), model=made, sample=X)
    with pytest.raises(ValueError, match="runs of 128, which do not divide its contraction of 64"):
        ifjax.quantize_params(params, Rule(".*", "nvfp4", rotate=128), model=made, sample=X)
    with pytest.raises(ValueError, match="need packed parameters"):
        ifjax.quantized(made.apply, Rule(".*", "nvfp4", rotate=16))(params, X)
    rules = (Rule(".*", "nvfp4", smooth="awq", rotate="greedy"),)
    ifjax.save_rules(rules, tmp_path / "rules.json")
    assert ifjax.load_rules(tmp_path / "rules.json") == rules
    packed = ifjax.quantize_params(params, Rule(".*", "nvfp4", rotate=16), model=made, sample=X)[0]
    ifjax.save_file(packed, tmp_path / "packed.safetensors")
    loaded = ifjax.load_file(tmp_path / "packed.safetensors", like=packed)
    jax.tree.map(np.testing.assert_array_equal, loaded, packed)
    with pytest.raises(TypeError, match=r"ifjax\.quantized"):
        made.apply(packed, X)
