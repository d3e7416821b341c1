"""Linen models on packed parameters: without an interceptor, under one, and what the compiled program holds."""

import functools
import importlib.util
import re
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console
from samples import initialized, normal

import ifjax
from ifjax import Rule
from ifjax.models.flax.linen import walk
from ifjax.models.rules import OPERANDS

FMT = "nvfp4"  # one candidate: cheap to compile; which format it is makes no difference here
EVERYWHERE = Rule(".*", FMT)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = (jnp.arange(3 * 16 * 8).reshape(3, 16, 8) % 3 > 0).astype(jnp.float32)
        return nn.Conv(8, (3,), mask=mask)(x)


class Tied(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(12, 16)
        return table.attend(nn.tanh(table(tokens)))


class Adapted(nn.Dense):
    """A subclass that calls its base, and has parameters of its own."""

    @nn.compact
    def __call__(self, x):
        lora = self.param("lora", nn.initializers.ones, (x.shape[-1], 1))
        return super().__call__(x) + x @ lora


class Replaced(nn.Dense):
    """A subclass that multiplies by itself, the other way round."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", self.kernel_init, (self.features, x.shape[-1])).T


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x):
        wi = self.param("wi", nn.initializers.lecun_normal(batch_axis=0), (3, 16, 8))
        return jnp.einsum("...k,ekn->...en", x, wi)


LAYERS = {
    "Dense": (nn.Dense(8), (5, 16)),
    "Dense of bfloat16": (nn.Dense(8, dtype=jnp.bfloat16), (5, 16)),
    "Dense without bias": (nn.Dense(8, use_bias=False, precision="highest"), (16,)),
    "DenseGeneral out": (nn.DenseGeneral((2, 4), axis=-1), (5, 16)),
    "DenseGeneral in": (nn.DenseGeneral(8, axis=(-2, -1)), (5, 2, 16)),
    "DenseGeneral of first": (nn.DenseGeneral(8, axis=0), (16, 5)),
    "DenseGeneral of batches": (nn.DenseGeneral(8, axis=-1, batch_dims=(0,)), (3, 5, 16)),
    "Einsum": (nn.Einsum((16, 2, 4), "...k,khd->...hd"), (5, 16)),
    "Einsum of two": (nn.Einsum((2, 16, 8), "bkh,hkn->bn", use_bias=False), (5, 16, 2)),
    "Conv": (nn.Conv(8, (3,)), (2, 6, 16)),
    "Conv causal": (nn.Conv(8, (2,), padding="CAUSAL", dtype=jnp.bfloat16), (6, 16)),
    "ConvTranspose": (nn.ConvTranspose(8, (3,), strides=(2,)), (2, 6, 16)),
    "ConvTranspose transposed": (nn.ConvTranspose(8, (3,), transpose_kernel=True), (2, 6, 16)),
    "ConvLocal": (nn.ConvLocal(8, (2,)), (2, 4, 16)),
    "attention": (nn.MultiHeadDotProductAttention(2, qkv_features=32), (2, 4, 16)),
    "LSTM": (nn.RNN(nn.LSTMCell(16)), (2, 3, 16)),
    "OptimizedLSTM": (nn.RNN(nn.OptimizedLSTMCell(16)), (2, 3, 16)),
    "GRU": (nn.RNN(nn.GRUCell(16)), (2, 3, 16)),
    "adapted": (Adapted(8), (5, 16)),
    "tied": (Tied(), None),
}


def build(name):
    model, shape = LAYERS[name]
    x = jnp.array([[0, 3, 11], [5, 5, 1]]) if shape is None else normal(*shape)
    variables = initialized(model, x)
    # Biases that are not zero.
    return model, jax.tree.map(lambda a: a + 0.125 if a.ndim == 1 else a, variables), x


def count_packed(tree):
    return sum(isinstance(leaf, ifjax.QTensor) for leaf in jax.tree.leaves(tree, is_leaf=_is_packed))


def _is_packed(leaf):
    return isinstance(leaf, ifjax.QTensor)


# Compiling takes seconds a layer; these are variants of others.
VARIANTS = {
    "Dense without bias", "DenseGeneral out", "DenseGeneral of first", "Einsum", "Conv causal", "ConvLocal",
    "ConvTranspose", "LSTM", "GRU", "OptimizedLSTM", "DenseGeneral of batches", "Dense of bfloat16",
    "attention", "tied",
}  # fmt: skip


@pytest.mark.by_default("Dense", "adapted")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in VARIANTS)) for n in LAYERS])
def test_each_layer_applies_on_packed_parameters(name):
    model, variables, x = build(name)
    packed, report = ifjax.quantize_params(variables, EVERYWHERE, model=model, sample=x)
    dense, _ = ifjax.fake_quantize_params(variables, EVERYWHERE, model=model, sample=x)
    kernels = [e for e in report.entries if e.path.rpartition("/")[2] in ("kernel", "embedding", "lora")]
    assert count_packed(packed) == len(kernels) > 0
    assert all(e.fmt == FMT for e in kernels)
    wanted = model.apply(dense, x)
    # Without any interceptor the module sees the very same numbers.
    np.testing.assert_array_equal(model.apply(packed, x), wanted)
    inside = ifjax.quantized(model.apply, EVERYWHERE)(packed, x)
    on_the_fly = ifjax.quantized(model.apply, EVERYWHERE)(variables, x)
    assert inside.dtype == wanted.dtype and inside.shape == wanted.shape
    # The products are scaled after the sum, not before: 2^-8 is a step of bfloat16.
    tolerance = 2e-6 if wanted.dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(inside, wanted, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(on_the_fly, inside)


@pytest.mark.slow
def test_every_parameter_is_in_the_report_once():
    model, variables, x = build("attention")
    _, report = ifjax.quantize_params(variables, EVERYWHERE, model=model, sample=x)
    paths = [e.path for e in report.entries]
    assert sorted(paths) == sorted(
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree_util.tree_leaves_with_path(variables["params"])
    )
    report.check()
    assert {e.reason for e in report.others} == {"a bias is added"}


# --- activations -----------------------------------------------------------------------------------------------------


def rounded(x, axis=-1, **options):
    return ifjax.fake_quantize(x, FMT, axis=axis, **options)


def dense_product(x, kernel):
    return x @ rounded(kernel, -2)


ACTIVATIONS = {
    "Dense": lambda x, k: rounded(x) @ rounded(k, -2),
    "DenseGeneral in": lambda x, k: jnp.einsum("bhd,hdn->bn", rounded(x), rounded(k, -2)),
    "DenseGeneral of first": lambda x, k: jnp.einsum("kb,kn->bn", rounded(x, 0), rounded(k, 0)),
    "DenseGeneral of batches": lambda x, k: jnp.einsum("bmk,bkn->bmn", rounded(x), rounded(k, -2)),
    "Einsum": lambda x, k: jnp.einsum("mk,khd->mhd", rounded(x), rounded(k, 0)),
    "Einsum of two": lambda x, k: jnp.einsum("bkh,hkn->bn", rounded(x, 1), rounded(k, 1)),
    "Conv": lambda x, k: jax.lax.conv_general_dilated(
        rounded(x), rounded(k, -2), (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    ),
}


@pytest.mark.by_default("DenseGeneral of batches")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_quantized_along_the_contraction(name):
    model, variables, x = build(name)
    variables["params"].pop("bias", None)
    model = model.clone(use_bias=False)
    rule = Rule(".*", FMT, act_fmt=FMT)
    packed, report = ifjax.quantize_params(variables, rule, model=model, sample=x)
    assert [e.act_fmt for e in report.entries] == [FMT]
    y = jax.jit(ifjax.quantized(model.apply, rule))(packed, x)
    wanted = ACTIVATIONS[name](x, variables["params"]["kernel"])
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(wanted) - np.asarray(model.apply(variables, x))).max() > 0.05


@pytest.mark.slow
def test_amax_of_activations_is_of_the_tensor_or_of_each_token_or_calibrated():
    model, variables, _ = build("Dense without bias")
    x = normal(5, 16) * jnp.logspace(-6, 3, 5)[:, None]  # in one tensor's range, small tokens vanish
    kernel = rounded(variables["params"]["kernel"], -2)
    rules = {amax: Rule("", FMT, act_fmt=FMT, act_amax=amax) for amax in ("tensor", "token", "static")}

    def run(amax, **options):
        return ifjax.quantized(model.apply, rules[amax], **options)(variables, x)

    np.testing.assert_allclose(run("tensor"), rounded(x) @ kernel, rtol=1e-5)
    np.testing.assert_allclose(run("token"), rounded(x, amax_axes=(0,)) @ kernel, rtol=1e-5)
    batches = [x / 2, x / 4]
    calibration = ifjax.calibrate(model.apply, variables, batches, rules["static"], progress=False)
    assert calibration.amax == {"": float(jnp.abs(x).max() / 2)}
    static = rounded(x, amax=jnp.abs(x).max() / 2) @ kernel
    np.testing.assert_allclose(run("static", calibration=calibration), static, rtol=1e-5)
    with pytest.raises(ValueError, match=r"needs the amax of ''.*calibrate"):
        run("static")


def test_tokens_keep_their_amax_where_the_contraction_comes_first():
    model, variables, x = build("DenseGeneral of first")
    variables["params"]["bias"] *= 0
    rule = Rule("", FMT, act_fmt=FMT, act_amax="token")
    y = ifjax.quantized(model.apply, rule)(variables, x)
    wanted = rounded(x.T, amax_axes=(0,)) @ rounded(variables["params"]["kernel"], 0)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["tied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ConvTranspose", "LSTM"))]
)
def test_quantized_activations_change_what_these_layers_give(name):
    model, variables, x = build(name)
    weights = ifjax.quantized(model.apply, EVERYWHERE)(variables, x)
    both = ifjax.quantized(model.apply, Rule(".*", FMT, act_fmt=FMT))(variables, x)
    assert 1e-3 < np.abs(np.asarray(weights - both)).max() < 1


@pytest.mark.slow
def test_cells_that_multiply_by_themselves_are_quantized_in_their_program_and_refused_by_interceptors():
    model, variables, x = build("OptimizedLSTM")
    rule = Rule(".*", FMT, act_fmt=FMT)
    packed, report = ifjax.quantize_params(variables, rule, model=model, sample=x)
    kernels = report.check().quantized
    assert len(kernels) == 8 and all(e.act_fmt == FMT and "concatenate" in e.note for e in kernels)
    y = ifjax.quantized(model.apply, rule)(packed, x)
    assert 1e-3 < np.abs(np.asarray(y - ifjax.quantized(model.apply)(packed, x))).max() < 1
    with (
        pytest.raises(ValueError, match="an interceptor cannot quantize its activations: the cell"),
        nn.intercept_methods(ifjax.interceptors.inference(rule)),
    ):
        model.apply(variables, x)


# --- attention -------------------------------------------------------------------------------------------------------

PRODUCTS = Rule(".*Attention.*", None, operands=dict.fromkeys(OPERANDS, FMT))


class Attends(nn.Module):
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(2, qkv_features=32, **dict(self.options))(x)


@pytest.mark.slow
def test_attention_multiplies_quantized_operands_when_asked():
    model, x = Attends(), normal(2, 16, 16)
    variables = initialized(model, x)

    def attention(query, key, value, **_):
        scores = jnp.einsum("bqhd,bkhd->bhqk", rounded(query * 4**-0.5 / 2), rounded(key))
        weights = rounded(jax.nn.softmax(scores))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, rounded(value, 1))

    wanted = Attends((("attention_fn", attention),)).apply(variables, x)
    y = jax.jit(ifjax.quantized(model.apply, PRODUCTS))(variables, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.by_default("options1-*")
@pytest.mark.parametrize(
    "options, reason",
    [
        ((("precision", "highest"),), "precision"),
        ((("attention_fn", lambda query, key, value, bias=None: value),), "attention_fn has no arguments"),
        (tuple((f"{n}_einsum_cls", lambda: jnp.einsum) for n in ("qk_attn_weights", "attn_weights_value")), "itself"),
    ],
)
def test_attention_that_flax_gives_no_place_is_refused(options, reason):
    model, x = Attends(options), normal(2, 16, 16)
    variables = initialized(Attends(), x)
    with pytest.raises(ValueError, match=reason):
        ifjax.quantized(model.apply, PRODUCTS)(variables, x)
    with pytest.raises(ValueError, match=rf"nothing it matches multiplies \('Multi.*{reason}"):
        ifjax.quantize_params(variables, PRODUCTS, model=model, sample=x)


# --- contexts and caches ---------------------------------------------------------------------------------------------


def test_programs_compiled_before_and_after_do_not_leak():
    model, variables, x = build("Dense")
    jitted = jax.jit(model.apply)
    plain = jitted(variables, x)
    inside = ifjax.quantized(jitted, EVERYWHERE)(variables, x)
    assert not np.array_equal(plain, inside)
    np.testing.assert_array_equal(jitted(variables, x), plain)
    fresh = jax.jit(model.apply)
    np.testing.assert_array_equal(ifjax.quantized(fresh, EVERYWHERE)(variables, x), inside)
    np.testing.assert_array_equal(fresh(variables, x), plain)
    # A second call comes from the cache.
    again = ifjax.quantized(jitted, EVERYWHERE)
    np.testing.assert_array_equal(again(variables, x), again(variables, x))


def test_rules_tell_programs_apart():
    model, variables, x = build("Dense")
    jitted = jax.jit(model.apply)
    results = [ifjax.quantized(jitted, Rule("", fmt))(variables, x) for fmt in ("nvfp4", "nvint4")]
    assert not np.array_equal(*results)


def test_the_interceptor_serves_as_a_context():
    model, variables, x = build("Dense")
    with nn.intercept_methods(ifjax.interceptors.inference(EVERYWHERE)):
        y = jax.jit(lambda variables, x: model.apply(variables, x))(variables, x)
    np.testing.assert_array_equal(y, ifjax.quantized(model.apply, EVERYWHERE)(variables, x))


def test_init_is_left_alone():
    model, variables, x = build("Dense")
    with nn.intercept_methods(ifjax.interceptors.inference(EVERYWHERE)):
        fresh = initialized(model, x)
    np.testing.assert_array_equal(fresh["params"]["kernel"], variables["params"]["kernel"])


@pytest.mark.slow
def test_modules_are_as_before_afterwards():
    layer = nn.Dense(8)
    bound = layer.bind({"params": build("Dense")[1]["params"]})
    with nn.intercept_methods(ifjax.interceptors.inference(Rule(".*", FMT, act_fmt=FMT))):
        bound(normal(5, 16))
    assert bound.dot_general_cls is None and bound.promote_dtype is layer.promote_dtype


def test_a_rule_that_matches_no_module_is_an_error_when_called():
    model, variables, x = build("attention")
    with pytest.raises(ValueError, match="matches nothing: the closest paths are 'query'"):
        ifjax.quantized(model.apply, [Rule("quary", FMT), EVERYWHERE])(variables, x)


# --- modules with a mind of their own ---------------------------------------------------------------------------------


def test_a_modules_own_dot_general_is_kept_and_told():
    calls = []

    def own(lhs, rhs, dims, precision=None):
        calls.append(isinstance(lhs, jax.Array) and isinstance(rhs, jax.Array))
        return 2 * jax.lax.dot_general(lhs, rhs, dims, precision)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, dot_general_cls=lambda: own, use_bias=False)(x)

    model, x = Model(), normal(5, 16)
    variables = initialized(model, x)
    rule = Rule(".*", FMT, act_fmt=FMT)
    packed, report = ifjax.quantize_params(variables, rule, model=model, sample=x)
    assert report.check().entries[0].note == "weights are dequantized for the module's own dot_general"
    calls.clear()
    y = ifjax.quantized(model.apply, rule)(packed, x)
    wanted = 2 * (rounded(x) @ rounded(variables["params"]["Dense_0"]["kernel"], -2))
    np.testing.assert_allclose(y, wanted, rtol=1e-5)
    assert all(calls) and calls


def test_subclasses_that_call_their_base_are_known_and_others_are_not():
    x = normal(5, 16)
    adapted, replaced = Adapted(8), Replaced(8)
    variables = initialized(adapted, x)
    found = walk(adapted, variables, x)
    tell = {site.parameter: (site.path, site.axes) for site in found.sites.values() if site.axes}
    assert tell == {"kernel": ("", (-2,)), "lora": ("lora", (-2,))}  # the layer's by its path, the other by its own
    _, report = ifjax.quantize_params(variables, EVERYWHERE, model=adapted, sample=x)
    assert [e.path for e in report.check().quantized] == ["kernel", "lora"]
    variables = initialized(replaced, x)
    (site,) = walk(replaced, variables, x).sites.values()
    assert (site.path, site.axes) == ("kernel", (-1,))  # no axis has to be named
    rule = Rule("kernel", FMT)
    packed, report = ifjax.quantize_params(variables, rule, model=replaced, sample=x)
    assert report.check().entries[0].module == "Replaced"
    wanted = x @ rounded(variables["params"]["kernel"]).T
    np.testing.assert_array_equal(replaced.apply(packed, x), wanted)


def test_experts_of_a_raw_parameter_go_by_a_rule_with_its_axis():
    model, x = Experts(), normal(5, 16)
    variables = initialized(model, x)
    _, report = ifjax.quantize_params({"params": {"moe": variables["params"], "k": normal(16, 16)}}, [
        Rule("k", FMT, axis=-2), Rule(".*", FMT, optional=True),
    ])  # fmt: skip
    with pytest.raises(ValueError, match=r"moe/wi.*no module tells the contraction axis.*axis=-2"):
        report.check()
    packed, report = ifjax.quantize_params(variables, Rule("wi", FMT, axis=-2), model=model, sample=x)
    wanted = jnp.einsum("bk,ekn->ben", x, rounded(variables["params"]["wi"], -2, amax_axes=(0,)))
    np.testing.assert_allclose(model.apply(packed, x), wanted, rtol=1e-5, atol=1e-6)


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        h = h + nn.MultiHeadDotProductAttention(1)(nn.LayerNorm()(h))
        return h + nn.Dense(16)(nn.gelu(nn.Conv(16, (3,))(h))), None


class Everything(nn.Module):
    axis: int = 0

    @nn.compact
    def __call__(self, tokens):
        table = nn.Embed(12, 16)
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": self.axis}, split_rngs={"params": True}, length=2
        )
        h, _ = layers(name="layers")(table(tokens), None)
        return table.attend(nn.BatchNorm(use_running_average=True)(h))


@pytest.mark.slow
@pytest.mark.parametrize("axis", [1])
def test_scan_remat_attention_conv_and_tied_embeddings_together(axis):
    model, tokens = Everything(axis), jnp.array([[0, 3, 11], [5, 5, 1]])
    variables = initialized(model, tokens)
    rules = [Rule("Embed_0", FMT), Rule("layers/.*", FMT, act_fmt=FMT)]
    packed, report = ifjax.quantize_params(variables, rules, model=model, sample=tokens)
    assert count_packed(packed) == 7 and packed["batch_stats"] is variables["batch_stats"]
    report.check()
    dense, _ = ifjax.fake_quantize_params(variables, rules, model=model, sample=tokens)
    np.testing.assert_array_equal(model.apply(packed, tokens), model.apply(dense, tokens))
    run = jax.jit(ifjax.quantized(model.apply, rules))
    np.testing.assert_allclose(run(packed, tokens), run(variables, tokens), rtol=1e-5, atol=1e-5)
    # Each layer is quantized by itself: its bytes are those of its slice.
    kernel = variables["params"]["layers"]["Dense_0"]["kernel"]
    stack = {0: 0, 1: 1, -1: 2}[axis]
    own = ifjax.quantize(jnp.take(kernel, 1, stack), FMT, axis=-2)
    q = packed["params"]["layers"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(jnp.take(q.codes, 1, stack), own.codes)
    np.testing.assert_array_equal(q.amax.reshape(-1)[1], own.amax)
    np.testing.assert_array_equal(jnp.take(q.dequantize(), 1, stack), own.dequantize())


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)
        return heads(8)(x)


def test_layers_that_vmap_stacked_keep_an_amax_each():
    model, x = Heads(), normal(3, 5, 16)
    variables = initialized(model, x)
    rule = Rule(".*", FMT, act_fmt=FMT)
    packed, _ = ifjax.quantize_params(variables, rule, model=model, sample=x)
    (q,) = (leaf for leaf in jax.tree.leaves(packed, is_leaf=_is_packed) if _is_packed(leaf))
    assert q.shape == (3, 16, 8) and q.amax.shape == (3,)
    np.testing.assert_allclose(model.apply(packed, x), x @ q.dequantize(), rtol=1e-5, atol=1e-6)
    wanted = rounded(x, amax_axes=(0,)) @ q.dequantize()
    np.testing.assert_allclose(ifjax.quantized(model.apply, rule)(packed, x), wanted, rtol=1e-5, atol=1e-6)


# --- calibration -----------------------------------------------------------------------------------------------------

STATIC = Rule(".*", FMT, act_fmt=FMT, act_amax="static")


@pytest.mark.parametrize(
    "statistic, of",
    [
        ("max", lambda batches: max(jnp.abs(x).max() for x in batches)),
        ("mean", lambda batches: sum(jnp.abs(x).max() for x in batches) / len(batches)),
        ("percentile", lambda batches: sum(jnp.percentile(jnp.abs(x), 90) for x in batches) / len(batches)),
    ],
)
def test_calibration_combines_batches(statistic, of):
    model, variables, x = build("Dense")
    batches = [x, 3 * x, -2 * x]
    found = ifjax.calibrate(
        model.apply, variables, batches, STATIC, statistic=statistic, percentile=90, progress=False
    )
    assert found.amax == {"": pytest.approx(float(of(batches)), rel=1e-6)} and found.hessians == {}


def test_progress_in_a_notebook_without_widgets_warns_about_nothing(monkeypatch):
    if importlib.util.find_spec("ipywidgets") is not None:
        pytest.skip("there are widgets")
    monkeypatch.setattr("rich._console", rich.console.Console(force_jupyter=True))
    model, variables, x = build("Dense")
    assert ifjax.calibrate(model.apply, variables, [x], STATIC, progress=True).amax


@pytest.mark.slow
def test_calibration_sees_scanned_layers_as_one_and_all_operands_of_attention():
    model, tokens = Everything(), jnp.array([[0, 3, 11], [5, 5, 1]])
    variables = initialized(model, tokens)
    rules = [
        Rule(".*Attention_0", None, operands={"query": FMT, "key": FMT}, act_amax="static"),
        Rule("layers/.*", FMT, act_fmt=FMT, act_amax="static"),
    ]
    found = ifjax.calibrate(model.apply, variables, [{"tokens": tokens}], rules)
    attention = "layers/MultiHeadDotProductAttention_0"
    layers = [f"{attention}/{name}" for name in ("query", "key", "value", "out")] + ["layers/Conv_0", "layers/Dense_0"]
    assert sorted(found.amax) == sorted([f"{attention}:query", f"{attention}:key", *layers])
    assert found.amax[f"{attention}/query"] == found.amax[f"{attention}/key"] > 1  # what LayerNorm gives
    y = jax.jit(ifjax.quantized(model.apply, rules, calibration=found))(variables, tokens)
    assert np.all(np.isfinite(y))


@pytest.mark.slow
def test_gptq_by_calibration_beats_rounding_on_correlated_inputs():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 16), use_bias=False)(x)
            return nn.DenseGeneral(8, axis=(-2, -1), use_bias=False)(x)

    model, x = Model(), normal(256, 4) @ normal(4, 32, seed=2)
    variables = initialized(model, x)
    rule = Rule(".*", FMT, gptq=True)
    calibration = ifjax.calibrate(model.apply, variables, [(x[:128],), (x[128:],)], rule, progress=False)
    np.testing.assert_allclose(calibration.hessians["DenseGeneral_0"], x.T @ x, rtol=1e-4, atol=1e-3)
    packed, report = ifjax.quantize_params(variables, rule, model=model, sample=x, calibration=calibration)
    report.check()
    nearest, _ = ifjax.quantize_params(variables, EVERYWHERE, model=model, sample=x)
    wanted = model.apply(variables, x)
    errors = [float(jnp.linalg.norm(model.apply(p, x) - wanted)) for p in (packed, nearest)]
    assert errors[0] < 0.6 * errors[1]
    assert jax.tree.structure(packed) == jax.tree.structure(nearest)
    first, own = packed["params"]["DenseGeneral_1"]["kernel"], variables["params"]["DenseGeneral_1"]["kernel"]
    rows = ifjax.gptq(own.reshape(32, 8), calibration.hessians["DenseGeneral_1"], FMT)
    np.testing.assert_array_equal(first.dequantize().reshape(32, 8), rows.dequantize())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, v, x: ifjax.calibrate(m.apply, v, [x], EVERYWHERE), "no rule needs calibration"),
        (lambda m, v, x: ifjax.calibrate(m.apply, v, [], STATIC), "at least one batch"),
        (lambda m, v, x: ifjax.calibrate(m.apply, v, [x * jnp.inf], STATIC), "not finite"),
        (lambda m, v, x: ifjax.calibrate(m.apply, v, [x], STATIC, statistic="median"), "'max', 'mean' or 'percentile'"),
        (lambda m, v, x: ifjax.calibrate(m.apply, v, [x], STATIC, percentile=0), r"in \(0, 100\]"),
        (lambda m, v, x: ifjax.calibrate(m.apply, v, [x], [Rule("no", FMT, gptq=True), STATIC]), "matches nothing"),
        (lambda m, v, x: ifjax.quantize_params(v, Rule("", FMT, gptq=True), model=m, sample=x), "gptq needs calibr"),
        (lambda m, v, x: ifjax.quantized(m.apply, Rule("", FMT, gptq=True))(v, x), "gptq needs packed"),
    ],
)
def test_calibration_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(*build("Dense"))


# --- what is compiled and differentiated -----------------------------------------------------------------------------


@pytest.mark.parametrize("platform, kind", [("tpu", "TPU v6e"), ("cuda", "H200")])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_no_dense_kernel_is_in_a_program_that_has_the_packed_one(platform, kind, dtype, monkeypatch):

    def lowered(fn):
        text = jax.jit(fn).trace(packed, x).lower(lowering_platforms=(platform,)).as_text()
        return re.findall(r"tensor<512x256x(?:f|bf)\d+>", text), "custom_call @" in text

    monkeypatch.setattr(sys.modules["ifjax.products.dot_general"], "device_kind", lambda *_: kind)
    model, x = nn.Dense(256, dtype=dtype), jnp.ones((8, 512), dtype)
    variables = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), jax.eval_shape(model.init, jax.random.key(0), x))
    packed, _ = ifjax.quantize_params(variables, EVERYWHERE, model=model, sample=x)
    assert lowered(model.apply)[0]
    dense, kernel = lowered(ifjax.quantized(model.apply, EVERYWHERE))
    # The Hopper kernel multiplies 16-bit inputs.
    assert kernel is not (platform == "cuda" and dtype == jnp.float32)
    assert bool(dense) is not kernel


def test_gradients_reach_what_is_not_packed():
    model, variables, x = build("adapted")
    rules = [Rule("lora", None), EVERYWHERE]
    packed, _ = ifjax.quantize_params(variables, rules, model=model, sample=x)
    dense, _ = ifjax.fake_quantize_params(variables, rules, model=model, sample=x)

    def loss(lora, params, apply):
        return (apply({"params": params["params"] | {"lora": lora}}, x) ** 2).sum()

    grad = jax.grad(loss)
    wanted = grad(dense["params"]["lora"], dense, model.apply)
    for apply in (model.apply, ifjax.quantized(model.apply, rules)):
        np.testing.assert_allclose(grad(packed["params"]["lora"], packed, apply), wanted, rtol=1e-5)
    whole = jax.grad(lambda p: (model.apply(p, x) ** 2).sum(), allow_int=True)(packed)
    assert not np.any(whole["params"]["kernel"].amax)


def test_tabulate_shows_packed_parameters():
    model, variables, x = build("Dense")
    packed, _ = ifjax.quantize_params(variables, EVERYWHERE, model=model, sample=x)
    shapes = jax.eval_shape(functools.partial(model.apply, mutable=["params"]), packed, x)[1]
    assert shapes["params"]["kernel"].shape == (16, 8)
    assert "16,8" in nn.tabulate(model, jax.random.key(0), console_kwargs={"width": 200})(x)


def test_a_masked_convolution_is_left_with_a_reason():
    """What multiplies a kernel before its product cannot be told from a module around the layer that rewrites it."""
    x = normal(2, 6, 16)
    variables = initialized(Masked(), x)
    with pytest.raises(ValueError, match="'Conv_0': it is rewritten before the product of Conv: mul"):
        ifjax.quantize_params(variables, EVERYWHERE, model=Masked(), sample=x)


@pytest.mark.parametrize("rewriting", [nn.WeightNorm, nn.SpectralNorm])
def test_layers_that_rewrite_their_parameters_are_left_with_a_reason(rewriting):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"update_stats": False} if rewriting is nn.SpectralNorm else {}
            return rewriting(nn.Dense(8))(nn.Dense(16, name="rest")(x), **options)

    x = normal(5, 16)
    variables = initialized(Model(), x)
    packed, report = ifjax.quantize_params(variables, FMT, model=Model(), sample=x)
    assert [e.path for e in report.quantized] == ["rest/kernel"]
    (entry,) = (e for e in report.entries if e.path == "Dense_0/kernel")
    assert "it is rewritten before the product" in entry.reason and not entry.expected
    np.testing.assert_array_equal(packed["params"]["Dense_0"]["kernel"], variables["params"]["Dense_0"]["kernel"])
    assert Model().apply(packed, x).shape == (5, 8)
    excluded = [Rule("Dense_0", None), *ifjax.default_rules(FMT)]
    ifjax.quantize_params(variables, excluded, model=Model(), sample=x)[1].check()


def test_a_layer_whose_parameters_are_mapped_is_left_with_a_reason():
    """What is mapped over the leaves of a packed kernel would change its bytes."""

    class Doubled(nn.Module):
        @nn.compact
        def __call__(self, x):
            double = functools.partial(jax.tree.map, lambda a: a * 2)
            return nn.map_variables(nn.Dense, "params", double, init=self.is_initializing())(8)(nn.Dense(16)(x))

    x = normal(5, 16)
    variables = initialized(Doubled(), x)
    packed, report = ifjax.quantize_params(variables, FMT, model=Doubled(), sample=x)
    assert [e.path for e in report.quantized] == ["Dense_0/kernel"]
    (entry,) = (e for e in report.entries if e.path.endswith("Dense_0/kernel") and e not in report.quantized)
    assert entry.reason == "it is rewritten before the product of Dense: mul" and not entry.expected
    np.testing.assert_allclose(Doubled().apply(packed, x), ifjax.quantized(Doubled().apply)(packed, x), rtol=1e-5)


def test_arithmetic_on_packed_codes_is_noticed():
    _, variables, _ = build("Dense")
    q = ifjax.quantize(variables["params"]["kernel"], FMT, axis=-2)
    with pytest.raises(TypeError, match="made float32 of a QTensor's codes, which are uint8: cast the tree with"):
        jax.tree.map(lambda a: a.astype(jnp.float32) * 1.5, q).unbox()


# --- what users do besides -------------------------------------------------------------------------------------------


class Flagged(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, mode="sum"):
        x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, name="first")(nn.LayerNorm(name="norm")(x)))
        wi = self.param("wi", nn.initializers.lecun_normal(), (8, 8))
        return nn.Dense(4, name="head")(x @ wi) if mode == "sum" else x

    @nn.compact
    def encode(self, x):
        return nn.Dense(8, name="first")(x)


def test_flags_and_strings_are_arguments_too():
    model, x = Flagged(), normal(3, 16)
    variables = initialized(model, x)
    for sample in ((x, False), (x, False, "sum"), {"x": jax.ShapeDtypeStruct(x.shape, x.dtype), "train": False}):
        _, report = ifjax.quantize_params(variables, Rule("first", FMT), model=model, sample=sample)
        assert report.totals.quantized == 1
    found = ifjax.calibrate(model.apply, variables, [(x, False), (x, False)], [
        Rule("first", FMT, act_fmt=FMT, act_amax="static"),
    ], progress=False)  # fmt: skip
    assert list(found.amax) == ["first"]


@pytest.mark.slow
def test_one_list_of_rules_serves_all():
    model, x = Flagged(), normal(3, 16)
    variables = initialized(model, x)
    rules = [
        Rule("wi", FMT, axis=-2, block=8, module="Flagged"), Rule(".*", None, module="LayerNorm"), Rule("head", None),
        Rule("first", FMT, act_fmt=FMT, act_amax="static"),
    ]  # fmt: skip
    packed, _ = ifjax.quantize_params(variables, rules, model=model, sample=x)
    calibration = ifjax.calibrate(model.apply, packed, [x], rules, progress=False)
    apply = ifjax.quantized(model.apply, rules, calibration=calibration)
    assert apply(packed, x).shape == (3, 4)
    # Another method calls fewer modules; that is no fault of the rules. A stranger is.
    fresh = [Rule("head", None), Rule("wi", FMT, axis=-2, block=8), Rule("first", FMT)]
    assert ifjax.quantized(model.apply, fresh)(packed, x, method="encode").shape == (3, 8)
    with pytest.raises(ValueError, match=r"'tail'.* matches nothing"):
        ifjax.quantized(model.apply, [Rule("tail", None), *fresh])(packed, x, method="encode")


def test_without_rules_only_what_is_packed_is_quantized():
    model, x = Flagged(), normal(3, 16)
    variables = initialized(model, x)
    packed, _ = ifjax.quantize_params(variables, [Rule("first", FMT)], model=model, sample=x)
    y = ifjax.quantized(model.apply)(packed, x)
    np.testing.assert_allclose(y, model.apply(packed, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(ifjax.quantized(model.apply)(variables, x), model.apply(variables, x))


def test_calibration_leaves_jitted_functions_as_they_were():
    model, variables, x = build("Dense")
    jitted = jax.jit(model.apply)
    before = jitted(variables, x)
    for _ in range(2):
        assert ifjax.calibrate(jitted, variables, [x], STATIC).amax == {"": float(jnp.abs(x).max())}
    assert "callback" not in jitted.lower(variables, x).as_text()
    np.testing.assert_array_equal(jitted(variables, x), before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Dense", "Conv", "Einsum of two"])
def test_gradients_pass_quantized_activations_straight_through(name):
    model, variables, x = build(name)
    rule = Rule(".*", FMT, act_fmt=FMT)
    packed, _ = ifjax.quantize_params(variables, rule, model=model, sample=x)
    grad = jax.grad(lambda x, apply: (apply(packed, x) * 0.5).sum())
    np.testing.assert_allclose(grad(x, ifjax.quantized(model.apply, rule)), grad(x, model.apply), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="quantized on the fly has no gradient"):
        jax.grad(lambda v: ifjax.quantized(model.apply, rule)(v, x).sum())(variables)


def test_functions_without_linen_modules_and_nested_ones_are_refused():
    model, variables, x = build("Dense")
    with pytest.raises(ValueError, match="matches nothing"):
        ifjax.quantized(lambda x: x + 1, Rule("none of these", FMT))(x)
    with pytest.raises(ValueError, match="quantize once"):
        ifjax.quantized(ifjax.quantized(model.apply, EVERYWHERE), Rule("", "nvint4"))(variables, x)


def test_the_report_tells_formats_that_are_not_as_asked_and_attentions_products():
    model, variables, x = build("attention")
    packed, _ = ifjax.quantize_params(variables, EVERYWHERE, model=model, sample=x)
    with pytest.raises(ValueError, match="was packed before, and the rule asks for nvint4"):
        ifjax.quantize_params(packed, Rule(".*", "nvint4"), model=model, sample=x)[1].check()
    rules = [Rule("", None, operands={"query": FMT}), EVERYWHERE]
    _, report = ifjax.quantize_params(packed, rules, model=model, sample=x)
    (entry,) = (e for e in report.check().entries if e.path == "")
    assert entry.reason == "it has no weights; it multiplies query in nvfp4" and report.totals.parameters == 9
