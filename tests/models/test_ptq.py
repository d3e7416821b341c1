"""Trees of parameters are packed as rules say, whatever they are made of, and go wherever trees of arrays go."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import initialized

import ifjax
from ifjax import QTensor, Rule

RULE = Rule(".*/kernel", "if4", axis=-2, block=4)


def normal(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tree():
    return {"up": {"kernel": normal(8, 6), "bias": jnp.ones(6)}, "down": {"kernel": normal(6, 8), "bias": jnp.ones(8)}}


def same(a, b):
    """The same structure, formats and names among it, and the same bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def entry_of(report, path):
    (entry,) = [entry for entry in report.entries if entry.path == path]
    return entry


# --- what trees are made of


def test_kernels_of_a_dictionary_are_packed_along_the_rules_axis():
    params = tree()
    packed, report = ifjax.quantize_params(params, RULE)
    for name in ("up", "down"):
        same(packed[name]["kernel"], ifjax.quantize(params[name]["kernel"], RULE.weight_format, axis=-2))
        assert packed[name]["bias"] is params[name]["bias"]
    entry = entry_of(report.check(), "up/kernel")
    q = packed["up"]["kernel"]
    x = np.asarray(params["up"]["kernel"], np.float64)
    signal, noise = np.square(x).sum(), np.square(x - np.asarray(q.dequantize())).sum()
    assert entry.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-5)  # float32 sums
    assert entry.choice_share == (q.choices() > 0).mean()
    assert (entry.bits_per_value, entry.bytes_before, entry.bytes_after) == (q.bits_per_value, 192, q.nbytes)
    assert (entry.fmt, entry.rule, entry.module) == ("if4_bs4", ".*/kernel", None)
    assert entry_of(report, "up/bias").reason == "it is no matrix"


def test_of_variables_the_parameters_are_quantized_and_named():
    variables = {"params": tree(), "batch_stats": {"mean": normal(8, 8)}}
    packed, report = ifjax.quantize_params(variables, RULE)
    same(packed["params"], ifjax.quantize_params(tree(), RULE)[0])
    assert packed["batch_stats"] is variables["batch_stats"]
    assert {entry.path for entry in report.entries} == {"up/kernel", "up/bias", "down/kernel", "down/bias"}


def test_frozen_dictionaries_stay_frozen():
    core = pytest.importorskip("flax.core")
    expected = ifjax.quantize_params(tree(), RULE)[0]
    packed, _ = ifjax.quantize_params(core.freeze(tree()), RULE)
    assert isinstance(packed, core.FrozenDict)
    same(packed.unfreeze(), expected)
    packed, _ = ifjax.quantize_params(core.freeze({"params": tree(), "state": {"n": jnp.ones(())}}), RULE)
    assert isinstance(packed, core.FrozenDict)
    same(packed["params"].unfreeze(), expected)


def test_lists_and_tuples_are_named_by_position():
    params = [(normal(8, 6), None), {"w": normal(4, 4)}]
    packed, report = ifjax.quantize_params(params, [Rule("0/0", axis=-2, block=4), Rule("1/.*", None)])
    same(packed, [(ifjax.quantize(params[0][0], RULE.weight_format, axis=-2), None), params[1]])
    assert [entry.path for entry in report.check().entries] == ["0/0", "1/w"]


def test_a_single_array_is_a_tree():
    packed, report = ifjax.quantize_params(normal(8, 6), Rule("", axis=-2, block=4))
    same(packed, ifjax.quantize(normal(8, 6), RULE.weight_format, axis=-2))
    assert report.check().entries[0].path == ""


@pytest.mark.parametrize("empty", [{}, [], {"params": {}}, {"a": {"b": None}}])
@pytest.mark.parametrize("rules", [None, RULE])
def test_an_empty_tree_stays_one(empty, rules):
    packed, report = ifjax.quantize_params(empty, rules)
    assert packed == empty
    assert report.check().entries == ()
    assert ifjax.fake_quantize_params(empty, rules)[0] == empty


def test_what_is_packed_comes_back_itself():
    packed, first = ifjax.quantize_params(tree(), RULE)
    again, report = ifjax.quantize_params(packed, RULE)
    assert all(again[name]["kernel"] is packed[name]["kernel"] for name in packed)
    for entry in report.check().quantized:
        assert (entry.note, entry.fmt, entry.sqnr_db) == ("was packed before", "if4_bs4", None)
        assert entry.bytes_before == entry.bytes_after == entry_of(first, entry.path).bytes_after
        assert (entry.shape, entry.dtype) == (entry_of(first, entry.path).shape, "float32")
    with pytest.raises(ValueError, match="SQNR was not measured"):
        report.check(min_sqnr_db=10)
    again, report = ifjax.quantize_params(packed, Rule(".*", "nvfp4", axis=-2, optional=True))
    assert all(again[name]["kernel"] is packed[name]["kernel"] for name in packed)
    with pytest.raises(ValueError, match="was packed before, and the rule asks for nvfp4"):
        report.check()


def test_faking_leaves_packed_parameters_packed():
    packed, _ = ifjax.quantize_params(tree(), RULE)
    faked, _ = ifjax.fake_quantize_params(packed, RULE)
    assert faked["up"]["kernel"] is packed["up"]["kernel"]


def test_what_is_no_float_stays():
    params = tree() | {"ids": jnp.arange(64).reshape(8, 8), "flags": np.ones((8, 8), bool), "step": 3, "rate": 0.5}
    packed, report = ifjax.quantize_params(params, [Rule("ids|flags|step", axis=-2, optional=True), RULE])
    assert all(packed[name] is params[name] for name in ("ids", "flags", "step", "rate"))
    reasons = {entry.path: entry.reason for entry in report.check().others}
    assert reasons["ids"].startswith("int32 is not quantized") and reasons["flags"].startswith("bool is not")
    assert reasons["step"].startswith("int64 is not") and reasons["rate"] == "it is no matrix"
    with pytest.raises(ValueError, match=r"matches only what cannot be quantized \('ids': int32 is not"):
        ifjax.quantize_params(params, [Rule("ids", axis=-2), RULE])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arrays_of_numpy_and_of_all_float_dtypes_are_packed(dtype):
    x = normal(8, 6, dtype=dtype)
    packed, report = ifjax.quantize_params({"kernel": np.asarray(x)}, Rule("kernel", axis=-2, block=4))
    same(packed["kernel"], ifjax.quantize(x, RULE.weight_format, axis=-2))
    assert packed["kernel"].dtype == x.dtype and packed["kernel"].dequantize().dtype == x.dtype
    entry = report.check(min_sqnr_db=15).entries[0]
    assert (entry.dtype, entry.bytes_before) == (dtype, 48 * x.dtype.itemsize)


def test_zeros_lose_nothing_and_nan_is_found():
    rule = Rule(".*", axis=-2, block=4)
    packed, report = ifjax.quantize_params({"zeros": jnp.zeros((8, 6)), "kernel": normal(8, 6)}, rule)
    assert entry_of(report.check(min_sqnr_db=15), "zeros").sqnr_db == math.inf
    np.testing.assert_array_equal(packed["zeros"].dequantize(), 0)
    _, report = ifjax.quantize_params({"kernel": normal(8, 6).at[0, 0].set(jnp.nan)}, rule)
    assert math.isnan(report.entries[0].sqnr_db)
    with pytest.raises(ValueError, match="SQNR is nan"):
        report.check()


def test_empty_arrays_are_packed():
    params = {"kernel": jnp.zeros((8, 0)), "w": normal(8, 6)}
    packed, report = ifjax.quantize_params(params, Rule(".*", axis=-2, block=4))
    assert packed["kernel"].shape == (8, 0)
    entry = entry_of(report.check(), "kernel")
    assert math.isnan(entry.bits_per_value) and entry.sqnr_db == math.inf


# --- rules


def test_the_first_rule_that_matches_decides():
    last = Rule(".*/kernel", "mxfp4", axis=-1, block=2, optional=True)
    packed, report = ifjax.quantize_params(
        tree(), [Rule("up/.*", "nvfp4", axis=-2, block=4), Rule("down/.*", None), last]
    )
    assert packed["up"]["kernel"].fmt.name == "nvfp4_bs4"
    assert isinstance(packed["down"]["kernel"], jax.Array)
    assert entry_of(report.check(), "down/kernel").reason == "the rule 'down/.*' excludes it"
    packed, _ = ifjax.quantize_params(tree(), [last, Rule("up/.*", "nvfp4", axis=-2, block=4, optional=True)])
    assert {(kernel.fmt.name, kernel.axis) for kernel in (packed["up"]["kernel"], packed["down"]["kernel"])} == {
        ("mxfp4_bs2", -1)
    }


@pytest.mark.by_default("*block_2d*")
@pytest.mark.parametrize(
    "options",
    [
        {"weight_fmt": "nvfp4"}, {"weight_fmt": "mxfp4", "block": 8}, {"loss": "mae"}, {"loss": "abs_max"},
        {"search": "fast"}, {"search": "exhaustive"}, {"block": 4}, {"block_2d": True, "block": 4},
        {"weight_fmt": "if3", "axis": -1}, {"weight_fmt": "if6", "block": 16},
    ],
    ids=str,
)  # fmt: skip
def test_options_are_those_of_quantize(options):
    x = normal(16, 16)
    rule = Rule("w", **{"axis": -2, "block": 8} | options)
    expected = ifjax.quantize(
        x, rule.weight_format, axis=rule.axis, loss=rule.loss, search=rule.search, block_2d=rule.block_2d
    )
    packed, _ = ifjax.quantize_params({"w": x}, rule)
    same(packed["w"], expected)
    faked, _ = ifjax.fake_quantize_params({"w": x}, rule)
    np.testing.assert_array_equal(faked["w"], expected.dequantize())
    plain = ifjax.quantize(x, "if4_bs8", axis=-2)  # no option is without effect here
    assert not np.array_equal(expected.dequantize(), plain.dequantize())


def test_matrices_that_nobody_decided_about_are_unexpected():
    params = tree() | {"wi": normal(8, 8)}
    for rules, reason in (
        ([RULE], "no rule matches it"),
        ([RULE, *ifjax.default_rules()], "no module tells the contraction axis"),
        ("if4", "no rule quantizes anything"),
    ):
        with pytest.raises(ValueError, match=reason):
            _, report = ifjax.quantize_params(params, rules)
            assert entry_of(report, "wi").expected is False
            report.check()
    _, report = ifjax.quantize_params(params, [RULE, Rule("wi", None)])
    report.check()


def test_what_is_too_short_for_a_block_is_an_error_unless_the_rule_is_optional():
    with pytest.raises(ValueError, match=r"'down/kernel': its contraction length 6 is below the block of 8 of if4_bs8"):
        ifjax.quantize_params(tree(), Rule(".*/kernel", axis=-2, block=8))
    packed, report = ifjax.quantize_params(tree(), Rule(".*/kernel", axis=-2, block=8, optional=True))
    assert isinstance(packed["up"]["kernel"], QTensor) and isinstance(packed["down"]["kernel"], jax.Array)
    entry = entry_of(report.check(), "down/kernel")
    assert "length 6 is below the block of 8" in entry.reason and entry.expected


@pytest.mark.by_default("None-if4")
@pytest.mark.parametrize(("rules", "fmt"), [(None, "if4"), ("nvfp4", "nvfp4"), (ifjax.FORMATS["if3"], "if3")])
def test_a_format_stands_for_the_default_rules(rules, fmt):
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            for features, name in ((8, "up"), (16, "down"), (4, "head")):
                x = nn.Dense(features, name=name, kernel_init=nn.initializers.ones)(x)
            return x

    model, x = Model(), jnp.ones((2, 16))
    packed, report = ifjax.quantize_params(initialized(model, x), rules, model=model, sample=x)
    assert [(e.path, e.fmt) for e in report.check().quantized] == [("up/kernel", fmt)]
    assert packed["params"]["up"]["kernel"].axis == -2
    reasons = {entry.path: entry.reason for entry in report.others}
    assert reasons["down/kernel"] == f"its contraction length 8 is below the block of 16 of {fmt}"
    assert reasons["head/kernel"] == "output heads stay, by default" and reasons["up/bias"] == "a bias is added"


def test_rules_of_no_use_are_errors_with_the_closest_path():
    with pytest.raises(ValueError, match=r"rule 1 \('up/kernal'\) matches nothing: the closest paths are 'up/kernel'"):
        ifjax.quantize_params(tree(), [Rule("up/kernal", axis=-2), RULE])
    with pytest.raises(ValueError, match=r"a part of 'down/kernel', 'up/kernel'\. Write '\.\*kernel'"):
        ifjax.quantize_params(tree(), Rule("kernel", axis=-2))
    with pytest.raises(ValueError, match=r"'up/kernel': no module tells .* give the rule axis=-2 for \[in, out\]"):
        ifjax.quantize_params(tree(), Rule("up/kernel"))
    with pytest.raises(ValueError, match=r"its shape \(8, 6\) has no axis -3"):
        ifjax.quantize_params(tree(), Rule("up/kernel", axis=-3))


def test_arguments_of_other_types_are_refused():
    nn = pytest.importorskip("flax.linen")
    with pytest.raises(TypeError, match=r"flax\.linen or flax\.nnx Module, got dict"):
        ifjax.quantize_params(tree(), RULE, model={})
    with pytest.raises(TypeError, match="pass model="):
        ifjax.quantize_params(tree(), RULE, sample=jnp.ones(8))
    with pytest.raises(TypeError, match="pass sample="):
        ifjax.quantize_params(tree(), RULE, model=nn.Dense(3))
    with pytest.raises(TypeError, match=r"ifjax\.Rule records, a format's name or None, got int"):
        ifjax.quantize_params(tree(), [3])


# --- inside of transformations


@pytest.mark.parametrize("fmt", ["if4", "mxfp4"])
def test_jit_packs_the_same_bytes_and_eval_shape_the_same_shapes(fmt):
    rule = Rule(".*/kernel", fmt, axis=-2, block=4)
    eager, _ = ifjax.quantize_params(tree(), rule)
    reports = []

    def pack(params):
        packed, report = ifjax.quantize_params(params, rule)
        reports.append(report)
        return packed

    same(jax.jit(pack)(tree()), eager)
    abstract = jax.eval_shape(pack, tree())
    assert jax.tree.structure(abstract) == jax.tree.structure(eager)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), abstract, eager)
    for report in reports:
        entry = entry_of(report.check(), "up/kernel")
        assert (entry.sqnr_db, entry.choice_share) == (None, None)
        assert entry.bits_per_value == eager["up"]["kernel"].bits_per_value


def test_an_abstract_tree_that_is_packed_goes_through_again():
    abstract = jax.eval_shape(lambda p: ifjax.quantize_params(p, RULE)[0], tree())
    again = jax.eval_shape(lambda p: ifjax.quantize_params(p, RULE)[0], abstract)
    assert jax.tree.structure(again) == jax.tree.structure(abstract)
    assert ifjax.trainable_mask(abstract) == {name: {"kernel": False, "bias": True} for name in ("up", "down")}


# --- the twin that fakes it


def test_faking_gives_what_the_packed_tree_stands_for():
    for dtype in (jnp.float32, jnp.bfloat16):
        params = jax.tree.map(lambda a, dtype=dtype: a.astype(dtype), tree())
        packed, report = ifjax.quantize_params(params, RULE)
        faked, fake_report = ifjax.fake_quantize_params(params, RULE)
        assert jax.tree.structure(faked) == jax.tree.structure(params)
        for name in params:
            np.testing.assert_array_equal(faked[name]["kernel"], packed[name]["kernel"].dequantize())
            assert faked[name]["kernel"].dtype == dtype
            assert faked[name]["bias"] is params[name]["bias"]
        for a, b in zip(report.entries, fake_report.check().entries, strict=True):
            assert (a.sqnr_db, a.choice_share, a.fmt, a.reason) == (b.sqnr_db, b.choice_share, b.fmt, b.reason)
            assert (b.bytes_after, b.bits_per_value) == (b.bytes_before, 8.0 * dtype.dtype.itemsize)


# --- Flax's boxes


def boxed(**names):
    nn = pytest.importorskip("flax.linen")
    return {name: {"kernel": nn.Partitioned(normal(8, 8), axes)} for name, axes in names.items()}


def mesh():
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def test_boxes_give_their_names_to_the_packed_parameter():
    params = boxed(up=(None, "x"), down=("y", None))
    packed, report = ifjax.quantize_params(params, RULE)
    report.check()
    assert (packed["up"]["kernel"].names, packed["down"]["kernel"].names) == ((None, "x"), ("y", None))
    faked, _ = ifjax.fake_quantize_params(params, RULE)
    assert jax.tree.structure(faked) == jax.tree.structure(params)
    np.testing.assert_array_equal(faked["up"]["kernel"].value, packed["up"]["kernel"].dequantize())
    assert ifjax.trainable_mask(params) == {"up": {"kernel": True}, "down": {"kernel": True}}
    untouched, _ = ifjax.quantize_params(params, [Rule("up/.*", None), RULE])
    assert untouched["up"]["kernel"] is params["up"]["kernel"]


def test_partition_specs_and_shardings_fit_each_array():
    nn = pytest.importorskip("flax.linen")
    packed, _ = ifjax.quantize_params(boxed(up=(None, "x"), down=("y", "x")), RULE)
    specs = nn.get_partition_spec(packed)
    for name, spec in (("up", P(None, "x")), ("down", P("y", "x"))):
        kernel = specs[name]["kernel"]
        assert (kernel.codes, kernel.scales, kernel.amax) == (spec, spec, P())
    shardings = nn.get_sharding(packed, mesh())
    assert shardings["down"]["kernel"].codes == NamedSharding(mesh(), P("y", "x"))
    placed = jax.device_put(packed, shardings)
    assert placed["down"]["kernel"].codes.addressable_shards[0].data.shape == (2, 4)  # of 4 bytes for 8 codes
    same(placed, packed)


@pytest.mark.parametrize("names", [("k", "n"), (None, "n"), ("k", None)])
def test_logical_names_become_those_of_the_mesh(names):
    nn = pytest.importorskip("flax.linen")
    box = nn.with_logical_partitioning(lambda: normal(8, 8), names)()
    packed, _ = ifjax.quantize_params({"kernel": box}, Rule("kernel", axis=-2, block=4))
    assert packed["kernel"].names == names
    logical = nn.get_partition_spec(packed)
    shardings = nn.logical_to_mesh_sharding(logical, mesh(), [("k", "y"), ("n", "x")])
    spec = tuple({"k": "y", "n": "x", None: None}[name] for name in names)
    assert tuple(shardings["kernel"].codes.spec) == tuple(shardings["kernel"].scales.spec) == spec
    same(jax.device_put(packed, shardings), packed)


def test_a_packed_dense_that_is_sharded_along_its_features_gathers_nothing():
    nn = pytest.importorskip("flax.linen")
    model = nn.Dense(8, kernel_init=nn.with_partitioning(lambda *_: normal(16, 8), (None, "x")))
    x = normal(4, 16, seed=1)
    packed, _ = ifjax.quantize_params(initialized(model, x), Rule(".*", block=4), model=model, sample=x)
    shardings, here = nn.get_sharding(packed, mesh()), mesh()
    placed = jax.device_put(packed, shardings)
    sharded = (shardings, NamedSharding(here, P("y", None)))
    for apply in (model.apply, ifjax.quantized(model.apply, Rule(".*", block=4))):
        run = jax.jit(apply, in_shardings=sharded, out_shardings=NamedSharding(here, P("y", "x")))
        text = run.lower(placed, x).compile().as_text()
        assert not [word for word in ("all-gather", "all-to-all", "collective-permute", "all-reduce") if word in text]
        # Each device sums all of its products, in an order of its own.
        np.testing.assert_allclose(run(placed, x), model.apply(packed, x), rtol=1e-5, atol=1e-5)


def scanned(axis, names=None):
    """A linen model of three Dense layers that nn.scan stacks along an axis, with names on the kernels if wanted."""
    nn = pytest.importorskip("flax.linen")
    options = {} if names is None else {"metadata_params": {nn.PARTITION_NAME: "layers"}}
    init = jax.random.normal if names is None else nn.with_partitioning(jax.random.normal, names)

    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.tanh(nn.Dense(8, kernel_init=init, use_bias=False, name="dense")(x)), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(Body, variable_axes={"params": axis}, split_rngs={"params": True}, length=3, **options)
            return scan(name="scan")(x, None)[0]

    return Model()


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_layers_stacked_along_any_axis_are_packed_one_by_one(axis):
    model, x = scanned(axis), normal(4, 8, seed=1)
    params = initialized(model, x)
    packed, report = ifjax.quantize_params(params, Rule(".*", block=4), model=model, sample=x)
    faked, _ = ifjax.fake_quantize_params(params, Rule(".*", block=4), model=model, sample=x)
    report.check(min_sqnr_db=15)
    q, layers = (tree["params"]["scan"]["dense"]["kernel"] for tree in (packed, params))
    assert q.shape == layers.shape and sorted(layers.shape) == [3, 8, 8]
    expected = [ifjax.quantize(layer, RULE.weight_format, axis=-2) for layer in jnp.moveaxis(layers, axis, 0)]
    for i, layer in enumerate(expected):
        np.testing.assert_array_equal(jnp.moveaxis(q.dequantize(), axis, 0)[i], layer.dequantize())
        np.testing.assert_array_equal(jnp.moveaxis(q.codes, axis, 0)[i], layer.codes)
    np.testing.assert_array_equal(q.amax.ravel(), [layer.amax for layer in expected])
    np.testing.assert_array_equal(model.apply(packed, x), model.apply(faked, x))


@pytest.mark.by_default("0")
@pytest.mark.parametrize("axis", [0, 1, 2])  # with -1, nn.Partitioned of flax 0.12.8 puts its own names in disorder
def test_stacked_layers_keep_consistent_names(axis):
    nn = pytest.importorskip("flax.linen")
    model, x = scanned(axis, ("in", "out")), normal(4, 8, seed=1)
    params = initialized(model, x)
    packed, _ = ifjax.quantize_params(params, Rule(".*", block=4), model=model, sample=x)
    box, q = (tree["params"]["scan"]["dense"]["kernel"] for tree in (params, packed))
    assert q.names == box.names and sorted(q.names) == ["in", "layers", "out"]
    inner = q.remove_axis(axis, {nn.PARTITION_NAME: "layers"})
    assert inner.names == ("in", "out")
    same(inner.add_axis(axis, {nn.PARTITION_NAME: "layers"}), q)
    faked, _ = ifjax.fake_quantize_params(params, Rule(".*", block=4), model=model, sample=x)
    np.testing.assert_array_equal(model.apply(packed, x), model.apply(faked, x))
    assert nn.get_partition_spec(packed)["params"]["scan"]["dense"]["kernel"].codes == P(*box.names)


@pytest.mark.slow
def test_a_raw_parameter_of_experts_takes_the_rules_axis():
    nn = pytest.importorskip("flax.linen")

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            gates = nn.softmax(nn.Dense(3, name="router")(x))
            wi = self.param("wi", lambda key: normal(3, 8, 4))
            return jnp.einsum("tk,ekn,te->tn", x, wi, gates)

    model, x = Experts(), normal(5, 8, seed=1)
    params = model.init(jax.random.key(0), x)
    rules = [Rule("wi", "nvfp4", axis=-2, block=4), Rule("router", None)]
    packed, report = ifjax.quantize_params(params, rules, model=model, sample=x)
    faked, _ = ifjax.fake_quantize_params(params, rules, model=model, sample=x)
    assert entry_of(report.check(), "wi").module == "Experts"
    same(packed["params"]["wi"], ifjax.quantize(normal(3, 8, 4), rules[0].weight_format, axis=-2, amax_axes=(0,)))
    np.testing.assert_array_equal(model.apply(packed, x), model.apply(faked, x))
    _, report = ifjax.quantize_params(params, Rule(".*", block=4, optional=True), model=model, sample=x)
    entry = entry_of(report.check(), "wi")  # the program tells the axis
    assert entry.fmt == "if4_bs4" and entry.shape == (3, 8, 4)
    packed, _ = ifjax.quantize_params(params, [Rule("wi", "nvfp4", block=4), rules[1]], model=model, sample=x)
    same(packed["params"]["wi"], ifjax.quantize(normal(3, 8, 4), rules[0].weight_format, axis=-2, amax_axes=(0,)))
    with pytest.raises(ValueError, match=r"1 of 2 .*\n  wi \(3x8x4, not quantized\).*give the rule axis=-2"):
        alone = {"wi": normal(3, 8, 4), "wo": normal(8, 4)}
        ifjax.quantize_params(alone, [Rule("wo", axis=-2, block=4), Rule(".*", optional=True)])[1].check()


# --- training beside packed parameters


def lora():
    packed, _ = ifjax.quantize_params({"kernel": normal(8, 8)}, Rule("kernel", axis=-2, block=4))
    return packed | {"a": normal(8, 2, seed=1), "b": jnp.zeros((2, 8))}


def lora_loss(params, x):
    return jnp.square(ifjax.matmul(x, params["kernel"]) + x @ params["a"] @ params["b"] - 1.0).mean()


@pytest.mark.slow
def test_masked_optimizers_keep_no_state_for_packed_parameters():
    optax = pytest.importorskip("optax")
    params, x = lora(), normal(4, 8, seed=2)
    mask = ifjax.trainable_mask(params)
    assert mask == {"kernel": False, "a": True, "b": True}
    optimizer = optax.masked(optax.adam(0.01), mask)
    state = optimizer.init(params)
    assert sorted(a.shape for a in jax.tree.leaves(state) if a.ndim) == [(2, 8), (2, 8), (8, 2), (8, 2)]

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lora_loss, allow_int=True)(params, x)
        with jax.numpy_dtype_promotion("standard"):  # adam counts in integers
            updates, state = optimizer.update(gradients, state, params)
        return jax.tree.map(lambda trains, p, u: p + u if trains else p, mask, params, updates), state

    trained, _ = step(params, state)
    same(trained["kernel"], params["kernel"])
    assert lora_loss(trained, x) < lora_loss(params, x)


@pytest.mark.slow
def test_what_is_trained_can_be_split_off():
    params, x = lora(), normal(4, 8, seed=2)
    mask = ifjax.trainable_mask(params)
    train, frozen = ({n: v for n, v in params.items() if mask[n] is wanted} for wanted in (True, False))
    gradients = jax.grad(lambda train: lora_loss({**frozen, **train}, x))(train)
    assert {n: g.shape for n, g in gradients.items()} == {"a": (8, 2), "b": (2, 8)}
    trained = jax.tree.map(lambda p, g: p - 0.1 * g, train, gradients)
    assert lora_loss({**frozen, **trained}, x) < lora_loss(params, x)


# --- files and programs


def test_flax_serialization_restores_the_bytes():
    serialization = pytest.importorskip("flax.serialization")
    for fmt in ("if4", "mxfp4"):
        rule = Rule(".*/kernel", fmt, axis=-2, block=4)
        packed, _ = ifjax.quantize_params(tree(), rule)
        other, _ = ifjax.quantize_params(jax.tree.map(jnp.negative, tree()), rule)
        same(serialization.from_bytes(other, serialization.to_bytes(packed)), packed)
    state = serialization.to_bytes(ifjax.quantize_params(tree(), RULE)[0])
    with pytest.raises(ValueError, match="another kind of QTensor"):
        serialization.from_bytes(other, state)


def test_orbax_restores_the_bytes(tmp_path):
    checkpoint = pytest.importorskip("orbax.checkpoint")
    packed, _ = ifjax.quantize_params(tree(), RULE)
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "packed", packed)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "packed", jax.eval_shape(lambda: packed))
    same(restored, packed)


@pytest.mark.slow
def test_exported_programs_take_packed_trees():
    packed, _ = ifjax.quantize_params(tree(), RULE)
    x = normal(4, 8, seed=1)

    def run(params, x):
        return ifjax.matmul(ifjax.matmul(x, params["up"]["kernel"]), params["down"]["kernel"])

    data = export.export(jax.jit(run))(packed, x).serialize()
    program = export.deserialize(bytearray(data))
    np.testing.assert_array_equal(program.call(packed, x), jax.jit(run)(packed, x))
    other, _ = ifjax.quantize_params(tree(), Rule(".*/kernel", "fouroversix", axis=-2, block=4))
    with pytest.raises(ValueError, match="pytree node metadata does not match"):
        program.call(other, x)


@pytest.mark.slow
def test_stacked_layers_without_their_model_keep_an_amax_for_each_matrix():
    stack = normal(2, 4, 8, 4)
    packed, _ = ifjax.quantize_params({"kernel": stack}, Rule("kernel", "nvfp4", axis=-2, block=4))
    q = packed["kernel"]
    assert q.amax.shape == (2, 4)
    same(q[1, 2], ifjax.quantize(stack[1, 2], q.fmt, axis=-2))
    packed, _ = ifjax.quantize_params({"kernel": stack}, Rule("kernel", "nvfp4", axis=-3, block=4))
    assert packed["kernel"].amax.shape == (2,) and packed["kernel"].axis == -3
