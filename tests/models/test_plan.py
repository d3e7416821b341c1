"""Plans of formats: items that share an input, bits, losses by hand, rules that do what was planned."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import initialized, normal

import ifjax
from ifjax import Rule
from ifjax.models.trace import shared_inputs


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.RMSNorm()(x)
        q, k, v = (nn.Dense(32, name=name)(y) for name in "qkv")
        x = x + nn.Dense(32, name="out")(jnp.tanh(q * k) + v)
        gate, up = (nn.Dense(64, name=name)(x) for name in ("gate", "up"))
        return x + nn.Dense(32, name="down")(nn.silu(gate) * up)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, name="head")(Block(name="b")(Block(name="a")(x)))


X = normal(16, 32, seed=1)


@functools.cache
def problem():
    model = Model()
    params = initialized(model, X)
    wanted = model.apply(params, X)

    def loss(params, x):
        return ((model.apply(params, x) - wanted) ** 2).mean()

    return model, params, loss


@pytest.mark.slow
def test_parameters_that_share_an_input_are_one_item():
    _, params, loss = problem()
    plan = ifjax.plan_formats(params, loss, [X], ("mxfp4", None), budget_bits=12, progress=False)
    assert [item.paths for item in plan.items] == [
        tuple(f"{block}/{name}/kernel" for name in names)
        for block in "ab" for names in (("down",), ("gate", "up"), ("k", "q", "v"), ("out",))
    ]  # fmt: skip
    assert sum(item.values for item in plan.items) == 2 * 32 * (4 * 32 + 3 * 64)
    assert plan.bits <= 12 and {item.fmt for item in plan.items} == {"mxfp4", None}
    text = str(plan)
    assert "b/gate/kernel b/up/kernel" in text and "predicted" in text

    @jax.jit
    def twice(x, w):
        return jnp.tanh(x) @ w

    def fn(params, x):
        x = x[None]
        first = jnp.einsum("bk,kn->bn", x.reshape(1, 8), params["a"]) + x.reshape(1, 8) @ params["b"]
        return twice(first, params["c"]) + twice(first * 2, params["d"])

    numbers = shared_inputs(fn, {name: jnp.ones((8, 8)) for name in "abcd"}, jnp.ones(8))
    assert numbers["a"] == numbers["b"] and len({*numbers.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("sensitivity", ["direct", "fisher"])
def test_losses_bits_and_rules(sensitivity, tmp_path):
    model, params, loss = problem()
    batches = [X, X[::-1] * 1.1]
    formats = ("mxfp4", "mxfp6_e3m2", None)
    plan = ifjax.plan_formats(params, loss, batches, formats, budget_bits=8, sensitivity=sensitivity)
    assert plan.formats == formats and plan.bits <= 8
    by_path = {path: item for item in plan.items for path in item.paths}
    item = by_path["a/out/kernel"]
    w = params["params"]["a"]["out"]["kernel"]
    rounded = ifjax.fake_quantize(w, "mxfp4", axis=-2)
    if sensitivity == "direct":
        other = {"params": {**params["params"], "a": {**params["params"]["a"], "out": {
            **params["params"]["a"]["out"], "kernel": rounded}}}}
        by_hand = np.mean([loss(other, x) - loss(params, x) for x in batches])
    else:
        grads = [jax.grad(loss)(params, x)["params"]["a"]["out"]["kernel"] for x in batches]
        by_hand = 0.5 * sum((g**2 * (w - rounded) ** 2).sum() for g in grads) / 2
    assert item.losses[0] == pytest.approx(float(by_hand), rel=1e-3, abs=1e-9) and item.losses[2] == 0
    assert sum(item.values * item.bits for item in plan.items) == pytest.approx(
        plan.bits * sum(item.values for item in plan.items))
    added = sum(item.losses[formats.index(item.fmt)] for item in plan.items)
    assert plan.predicted_loss == pytest.approx(plan.base_loss + added)
    # The rules make of the model, and of the function, what was planned and measured.
    plan.save(tmp_path / "plan.yaml")
    rules = ifjax.load_rules(tmp_path / "plan.yaml")
    assert rules == plan.rules
    packed, report = ifjax.quantize_params(params, rules, model=model, sample=X)
    for entry in report.check().entries:
        assert entry.fmt == (by_path[entry.path].fmt if entry.path in by_path else None), entry.path
    measured = np.mean([loss(packed, x) for x in batches])
    assert plan.measured_loss == pytest.approx(float(measured), rel=1e-4)
    same, _ = ifjax.quantize_params(params, rules, model=lambda p, x: model.apply(p, x), sample=X)
    assert jax.tree.structure(same) == jax.tree.structure(packed)


@pytest.mark.slow
def test_never_worse_than_one_format_for_all_of_that_budget():
    _, params, loss = problem()
    for fmt, bits in (("nvfp4", 4.5), ("mxfp6_e3m2", 6.25)):
        plan = ifjax.plan_formats(params, loss, [X], ("if3", fmt, None), budget_bits=bits)
        k = plan.formats.index(fmt)
        for_all = plan.base_loss + sum(item.losses[k] for item in plan.items)
        assert plan.bits <= bits and plan.predicted_loss <= for_all * (1 + 1e-9)


def test_refusals():
    _, params, loss = problem()
    for options, match in [
        ({"budget_bits": 2}, "below .* what the cheapest"),
        ({"budget_bits": 5, "formats": ("if4",)}, "two at least"),
        ({"budget_bits": 5, "batches": []}, "no batch"),
        ({"budget_bits": 5, "rules": [Rule(".*", None)]}, "nothing to plan"),
        ({"budget_bits": 5, "sensitivity": "x"}, "direct"),
        ({"budget_bits": 5, "fn": lambda p, x: loss(p, x) * jnp.nan}, "nothing to compare"),
    ]:
        with pytest.raises(ValueError, match=match):
            ifjax.plan_formats(**{"params": params, "fn": loss, "batches": [X], "formats": ("mxfp4", None)} | options)
