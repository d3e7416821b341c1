"""Any program: which parameters it multiplies by, and the same program on packed ones, as people write models."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from samples import normal

import ifjax
from ifjax import Rule
from ifjax.arrays import QTensor
from ifjax.models import rewrite
from ifjax.training import Operand, Product, Recipe, quantized_conv, quantized_dot_general, quantized_ragged_dot

FMT = "nvfp4"
ALL = Rule(".*", FMT, optional=True)
W4A4 = Rule(".*", FMT, act_fmt=FMT, optional=True)


def rounded(x, axis=-1, amax_axes=()):
    return ifjax.quantize(x, FMT, axis=axis, amax_axes=amax_axes).dequantize()


# Each as (function of params and x, params, x, axes of each parameter).


def heads(p, x):
    q = jnp.einsum("btd,ndh->btnh", x, p["query"])
    return jnp.einsum("btnh,nhd->btd", q, p["out"])


def transposed(p, x):  # GPT-2's Conv1D as transformers has it, and a fused projection cut in three
    y = x @ p["kernel"].T.astype(x.dtype)
    a, b, c = jnp.split(p["qkv"], 3, axis=1)
    return y @ a + y @ b - y @ c


def tied(p, x):
    tokens = jnp.argmax(x[..., :8], -1)
    return p["table"][tokens] @ p["table"].T


def stacked(p, x):
    def layer(h, w):
        return jnp.tanh(h @ w["up"]) @ w["down"], None

    return lax.scan(jax.checkpoint(layer), x, p["layers"])[0]


def branches(p, x):
    y = lax.cond(x.sum() > 0, lambda x: x @ p["one"], lambda x: 2 * x @ p["one"], x)
    _, y = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["square"])), (0, y))
    return jax.nn.relu(jax.jit(lambda y: y @ p["last"])(y))


def convolved(p, x):
    x = x.reshape(2, 3, 4, 16).swapaxes(1, 2)
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=dims)


def experts(p, x):
    x = x.reshape(-1, 16)
    return lax.ragged_dot(x, p["experts"], jnp.array([5, 0, x.shape[0] - 5]))


def masked(p, x):  # a matrix that is decoded before its product
    return x @ (p["kernel"] * jnp.tri(16))


def unrolled(p, x):  # one stacked array, indexed by hand
    for i in range(2):
        x = jnp.tanh(x @ p["layers"][i])
    return x


X = normal(2, 12, 16, seed=1)
PROGRAMS = {
    "heads": (heads, {"out": normal(2, 16, 16), "query": normal(2, 16, 16, seed=2)}, X,
              {"out": (-3, -2), "query": (-2,)}),
    "transposed": (transposed, {"kernel": normal(16, 16), "qkv": normal(16, 48)}, X, {"kernel": (-1,), "qkv": (-2,)}),
    "tied": (tied, {"table": normal(8, 16)}, X, {"table": (-1,)}),
    "stacked": (stacked, {"layers": {"down": normal(2, 32, 16), "up": normal(2, 16, 32)}}, X,
                {"layers/down": (-2,), "layers/up": (-2,)}),
    "branches": (branches, {"last": normal(32, 8), "one": normal(16, 32), "square": normal(32, 32)}, X,
                 {"last": (-2,), "one": (-2,), "square": (-2,)}),
    "convolved": (convolved, {"kernel": normal(3, 3, 16, 8)}, X, {"kernel": (-2,)}),
    "experts": (experts, {"experts": normal(3, 16, 8)}, X, {"experts": (-2,)}),
    "masked": (masked, {"kernel": normal(16, 16)}, X, {"kernel": (-2,)}),
    "unrolled": (unrolled, {"layers": normal(2, 16, 16)}, X, {"layers": (-2,)}),
}  # fmt: skip


@pytest.mark.by_default("heads", "experts")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_tell_their_products_and_run_packed(name):
    fn, params, x, axes = PROGRAMS[name]
    assert {site.parameter: site.axes for site in ifjax.trace_products(fn, params, x)} == axes
    packed, report = ifjax.quantize_params(params, ALL, model=fn, sample=x)
    assert len(report.check().quantized) == len(axes)
    dense = jax.tree.map(
        lambda q: q.dequantize() if isinstance(q, QTensor) else q, packed, is_leaf=lambda q: isinstance(q, QTensor)
    )
    run = jax.jit(ifjax.quantized(fn))
    np.testing.assert_allclose(run(packed, x), fn(dense, x), rtol=2e-4, atol=2e-4)
    on_the_fly = jax.jit(ifjax.quantized(fn, ALL))(params, x)
    np.testing.assert_allclose(on_the_fly, fn(dense, x), rtol=2e-4, atol=2e-4)
    if fn is not branches:  # a while loop has no reverse mode
        grad = jax.grad(lambda x: run(packed, x).sum())(x)
        np.testing.assert_allclose(grad, jax.grad(lambda x: fn(dense, x).sum())(x), rtol=1e-3, atol=2e-3)
    both = ifjax.quantized(fn, W4A4)(packed, x)
    assert float(jnp.abs(both - fn(dense, x)).max()) > 1e-3


@pytest.mark.parametrize("kind", ["explicit", "manual"])
def test_quantized_activations_have_gradients_on_meshes(kind):
    """MX formats have no amax that parts would not share."""
    explicit = kind == "explicit"
    types = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("d",), axis_types=(types,))
    rules, x = Rule(".*", "mxfp4", act_fmt="mxfp4"), normal(8, 64)
    params = {"up": normal(64, 64, seed=1) / 8, "down": normal(64, 64, seed=2)}

    def fn(p, x):
        return jnp.sin(x @ p["up"]) + x @ p["down"]

    packed, _ = ifjax.quantize_params(params, rules, model=fn, sample=x)
    grad = jax.grad(lambda p, x: ifjax.quantized(fn, rules)(p, x).sum(), argnums=1)
    want = jax.jit(grad)(packed, x)
    if explicit:
        with jax.set_mesh(mesh):
            got = jax.jit(grad)(jax.device_put(packed, P()), jax.device_put(x, P("d", None)))
    else:
        got = jax.jit(jax.shard_map(grad, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")))(packed, x)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["rows", "features"])
def test_shard_map_runs_packed_and_trains(parallel):
    """The body sees its part of each packed weight; MX formats have no amax that parts would not share."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x = {"up": normal(64, 256, seed=1) / 8, "down": normal(256, 32, seed=2)}, normal(8, 64)

    def whole(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    by_rows = jax.shard_map(whole, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    by_features = jax.shard_map(
        lambda p, x: lax.psum(whole(p, x), "d"), mesh=mesh, out_specs=P(),
        in_specs=({"up": P(None, "d"), "down": P("d")}, P()),
    )  # fmt: skip
    fn = by_rows if parallel == "rows" else by_features
    packed, report = ifjax.quantize_params(params, Rule(".*", "mxfp4"), model=fn, sample=x)
    assert report.check().totals.quantized == 2
    for rule in (Rule(".*", "mxfp4"), Rule(".*", "mxfp4", act_fmt="mxfp4")):
        got, wanted = (jax.jit(ifjax.quantized(f, rule))(packed, x) for f in (fn, whole))
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
    recipe = Recipe("mx", Product(Operand("mxfp4"), Operand("mxfp4")))

    def trained(fn):
        run = ifjax.quantized(fn, recipe)
        return jax.jit(jax.grad(lambda p: jnp.square(run(p, x)).sum()))(params)

    got, wanted = trained(fn), trained(whole)
    for name in params:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-3, atol=1e-2)


def test_activations_are_rounded_along_what_the_program_contracts():
    fn, params, x, _ = PROGRAMS["heads"]
    q = jnp.einsum("btd,ndh->btnh", rounded(x), rounded(params["query"], -2, (0,)))  # the product keeps heads apart
    wanted = jnp.einsum("btnh,nhd->btd", rounded(q), rounded(params["out"], -2))
    np.testing.assert_allclose(ifjax.quantized(fn, W4A4)(params, x), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.by_default("experts")
@pytest.mark.parametrize("name", ["heads", "stacked", "convolved", "experts", "transposed"])
def test_recipes_train_every_product_of_a_program(name):
    fn, params, x, _ = PROGRAMS[name]
    params = jax.tree.map(lambda a: a / np.sqrt(a.shape[-2]), params)
    rule = Rule(".*", recipe="w4a4_qat", optional=True)
    loss = lambda fn: lambda p: jnp.square(fn(p, x)).mean()  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss(ifjax.quantized(fn, rule))))(params)
    plain, wanted = jax.value_and_grad(loss(fn))(params)
    assert 0 < abs(float(value - plain)) < 0.5 * abs(float(plain))
    for g, w in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        alike = float((g * w).sum() / jnp.linalg.norm(g) / jnp.linalg.norm(w))
        assert 0.8 < alike < 0.99999, alike


@pytest.mark.slow
def test_recipes_are_the_products_that_they_name():
    x, w = normal(6, 16, seed=3), normal(16, 8)
    rule = Rule(".*", recipe="if4")
    key = jax.random.key(5)
    loss = jax.grad(lambda w: ifjax.quantized(lambda p, x: jnp.tanh(x @ p["w"]), rule, key=key)({"w": w}, x).sum())
    numbers = (((1,), (0,)), ((), ()))
    wanted = jax.grad(
        lambda w: jnp.tanh(quantized_dot_general(x, w, numbers, "if4", jax.random.fold_in(key, 0))).sum()
    )
    np.testing.assert_allclose(loss(w), wanted(w), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="draws noise"):
        jax.grad(lambda w: ifjax.quantized(lambda p, x: x @ p["w"], rule)({"w": w}, x).sum())(w)


def test_what_rules_leave_alone_stays_as_it_is_equation_by_equation():
    fn, params, x, _ = PROGRAMS["branches"]
    rules = [Rule("last", FMT), Rule(".*", None)]
    params = params | {"other": normal(16, 16)}  # of another function: this one does not read it
    before = str(jax.make_jaxpr(lambda p, x: fn(p, x))(params, x))
    for left in ((), Rule("other", FMT)):
        run = ifjax.quantized(fn, left)
        assert str(jax.make_jaxpr(lambda p, x, run=run: run(p, x))(params, x)) == before
    after = str(jax.make_jaxpr(lambda p, x: ifjax.quantized(fn, rules)(p, x))(params, x))
    assert after != before and "while" in after and "cond" in after


def test_a_function_is_traced_once_and_so_are_equal_products(monkeypatch):
    """What tracing costs beyond jax.make_jaxpr, counted: figures are in benchmarks/results/clients-cpu.md."""
    calls = []

    def fn(p, x):
        calls.append("fn")
        for w in p["layers"]:
            x = jnp.tanh(x @ w)
        return x

    def product(*args, made=rewrite.dot_general, **options):
        calls.append("product")
        return made(*args, **options)

    monkeypatch.setattr(rewrite, "dot_general", product)
    params = {"layers": [normal(16, 16, seed=i) for i in range(4)]}
    ifjax.trace_products(fn, params, X)
    jax.make_jaxpr(ifjax.quantized(fn, Rule("other", FMT)))(params | {"other": normal(16, 16)}, X)
    assert calls == ["fn", "fn"]
    packed, _ = ifjax.quantize_params(params, ALL, model=fn, sample=X)
    calls.clear()
    text = str(jax.make_jaxpr(ifjax.quantized(fn, W4A4))(packed, X))
    assert calls == ["fn", "product"] and text.count("name=quantized_product") == 4


def test_products_of_one_activation_share_its_codes():
    numbers = ((1,), (0,)), ((), ())
    params = {name: normal(64, 64, seed=i) / 8 for i, name in enumerate("abcde")}
    x = normal(5, 64, seed=9)

    def model(p, x):
        y = x @ p["a"] + x @ p["b"] - x @ p["c"]

        def layer(h, _):  # x comes from outside of the loop
            return jnp.tanh(h @ p["d"] + h @ p["e"] + x @ p["a"]), None

        return lax.scan(layer, y, length=2)[0]

    packed, _ = ifjax.quantize_params(params, W4A4, model=model, sample=x)
    run = ifjax.quantized(model, W4A4)
    assert len(re.findall(r"call @_multiples\w*\(", jax.jit(run).lower(packed, x).as_text())) == 3

    def by_hand(p, x):
        def product(x, name):
            return ifjax.dot_general(ifjax.quantize(x, FMT), p[name], numbers)

        y = product(x, "a") + product(x, "b") - product(x, "c")
        for _ in range(2):
            y = jnp.tanh(product(y, "d") + product(y, "e") + product(x, "a"))
        return y

    np.testing.assert_array_equal(jax.jit(run)(packed, x), jax.jit(by_hand)(packed, x))

    def two(p, x):
        return x @ p["a"] + jnp.sin(x @ p["b"])

    a, b = (packed[name].dequantize() for name in "ab")
    ones = jnp.ones((5, 64))
    got = jax.grad(lambda x: ifjax.quantized(two, W4A4)(packed, x).sum())(x)
    want = ones @ a.T + jnp.cos(rounded(x) @ b) @ b.T  # straight through, once for each product
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_wrapped_function_is_one_key_in_caches_and_traces_once():
    traced = []

    def fn(p, x):
        traced.append(1)
        return x @ p["w"]

    packed, _ = ifjax.quantize_params({"w": normal(16, 16)}, ALL, model=fn, sample=X)
    traced.clear()
    one, two = ifjax.quantized(fn, ALL), ifjax.quantized(fn, ALL)
    assert one == two and hash(one) == hash(two) and one != ifjax.quantized(fn, W4A4)
    for _ in range(3):
        one(packed, X)
    assert len(traced) == 1
    step = jax.jit(lambda f, p, x: f(p, x), static_argnums=0)
    step(one, packed, X), step(two, packed, X)
    assert step._cache_size() == 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["size"])
@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer in Equinox's way: a tree that is called."""

    weight: jax.Array
    bias: jax.Array
    size: int = 16

    def __call__(self, x):
        return self.weight @ x + self.bias


@functools.partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Chain:
    layers: list

    def __call__(self, x):
        return self.layers[1](jax.nn.gelu(self.layers[0](x)))


def test_models_that_are_trees_run_packed_under_vmap_and_are_matched_by_class():
    model, x = Chain([Linear(normal(32, 16), jnp.ones(32)), Linear(normal(8, 32), jnp.ones(8))]), normal(5, 16, seed=4)
    call = jax.vmap(Chain.__call__, in_axes=(None, 0))
    sites = ifjax.trace_products(call, model, x)
    assert [(s.parameter, s.module, s.axes) for s in sites if s.axes] == [
        ("layers/0/weight", "Linear", (-1,)), ("layers/1/weight", "Linear", (-1,)),
    ]  # fmt: skip
    rule = Rule(".*", FMT, module="Linear", optional=True)
    packed, report = ifjax.quantize_params(model, rule, model=call, sample=(x,))
    assert len(report.check().quantized) == 2 and isinstance(packed.layers[0].weight, QTensor)
    wanted = x
    wanted = jax.nn.gelu(wanted @ rounded(model.layers[0].weight).T + 1) @ rounded(model.layers[1].weight).T + 1
    np.testing.assert_allclose(ifjax.quantized(call)(packed, x), wanted, rtol=1e-4, atol=1e-4)
    outside = jax.vmap(ifjax.quantized(Chain.__call__), in_axes=(None, 0))(packed, x)
    np.testing.assert_allclose(outside, wanted, rtol=1e-4, atol=1e-4)


def test_generation_runs_packed_with_a_cache_in_a_compiled_loop():
    params = {"embed": normal(16, 16), "key": normal(16, 16, seed=1), "head": normal(16, 16, seed=2)}

    def step(p, cache, at, token):
        x = p["embed"][token]
        cache = lax.dynamic_update_index_in_dim(cache, x @ p["key"], at, 0)
        scores = jnp.where(jnp.arange(8) <= at, cache @ x, -jnp.inf)
        return jax.nn.softmax(scores) @ cache @ p["head"], cache

    def generate(p, token):
        def body(at, state):
            token, cache, out = state
            logits, cache = step(p, cache, at, token)
            token = jnp.argmax(logits)
            return token, cache, out.at[at].set(token)

        return lax.fori_loop(0, 8, body, (token, jnp.zeros((8, 16)), jnp.zeros(8, int)))[2]

    packed, report = ifjax.quantize_params(params, ALL, model=generate, sample=(jnp.array(3),))
    assert len(report.check().quantized) == 3
    dense = {name: q.dequantize() for name, q in packed.items()}
    np.testing.assert_array_equal(jax.jit(ifjax.quantized(generate))(packed, 3), generate(dense, 3))


def test_parameters_of_different_rules_are_not_joined_silently():
    def fn(p, x):
        return x @ jnp.concatenate([p["a"], p["b"]], axis=1)

    params = {"a": normal(16, 8), "b": normal(16, 8, seed=1)}
    rules = [Rule("a", FMT, act_fmt=FMT), Rule("b", FMT)]
    with pytest.raises(ValueError, match="need rules that treat them alike"):
        ifjax.quantized(fn, rules)(params, X)


@pytest.mark.slow
def test_a_static_amax_of_nothing_is_told_and_the_inputs_own_is_used():
    fn, params = (lambda p, x: x @ p["w"]), {"w": normal(16, 8)}
    rule = Rule("w", FMT, act_fmt=FMT, act_amax="static")
    dynamic = ifjax.quantized(fn, Rule("w", FMT, act_fmt=FMT))(params, X)
    for amax in (0.0, float("nan"), float("inf")):
        calibration = ifjax.Calibration({"w": amax}, {})
        with pytest.warns(UserWarning, match="calibrated amax of 'w' is"):
            y = ifjax.quantized(fn, rule, calibration=calibration)(params, X)
        np.testing.assert_array_equal(y, dynamic)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2])
def test_a_trained_convolution_is_the_convolution_of_rounded_windows(groups):
    x, w = normal(2, 5, 6, 8 * groups, seed=1), normal(3, 2, 8, 4)
    options = {
        "window_strides": (2, 1), "padding": ((1, 0), (0, 2)), "rhs_dilation": (1, 2), "feature_group_count": groups,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }  # fmt: skip
    plain = lax.conv_general_dilated(x, w, **options)
    np.testing.assert_allclose(quantized_conv(x, w, "bf16", **options), plain, rtol=1e-4, atol=1e-4)
    y = quantized_conv(x, w, "w4a4_qat", **options)
    assert y.shape == plain.shape and 0.01 < float(jnp.linalg.norm(y - plain) / jnp.linalg.norm(plain)) < 0.3
    grads = [jax.grad(lambda x, w, r=r: jnp.sin(quantized_conv(x, w, r, **options)).sum(), argnums=(0, 1))(x, w)
             for r in ("bf16", "w4a4_qat")]  # fmt: skip
    for a, b in zip(*grads, strict=True):
        assert float((a * b).sum() / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.5


@pytest.mark.slow
def test_trained_experts_are_products_of_each_group():
    x, w, sizes = normal(40, 16, seed=1), normal(3, 16, 8), np.array([17, 0, 20])
    y = quantized_ragged_dot(x, w, jnp.array(sizes), "w4a4_qat")
    assert not y[37:].any()
    plain = lax.ragged_dot(x, w, jnp.array(sizes))
    assert 0.01 < float(jnp.linalg.norm(y - plain) / jnp.linalg.norm(plain)) < 0.3
    np.testing.assert_allclose(quantized_ragged_dot(x, w, jnp.array(sizes), "bf16"), plain, rtol=1e-5, atol=1e-5)
