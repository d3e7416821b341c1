"""Fused tensors split among parameters while they are loaded, and packed ones laid in other shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file

import ifjax
from ifjax import NameRule

LAYERS, IN, HEADS, KV, SIZE = 2, 64, 4, 2, 16
ROWS = {"q": HEADS * SIZE, "k": KV * SIZE, "v": KV * SIZE}
PATHS = ("attn/q", "attn/k", "attn/v")
FULL = {f"l.{i}.qkv.weight": np.random.default_rng(i).standard_normal((sum(ROWS.values()), IN)).astype(np.float32)
        for i in range(LAYERS)}  # fmt: skip


def parts_of(x, groups=1, axis=0):
    """Query, key and value by hand: in each of so many runs of the axis, all three, one after the other."""
    ends = np.cumsum([n // groups for n in ROWS.values()])[:-1]
    runs = np.split(x, groups, axis)
    return {name: np.concatenate([np.split(run, ends, axis)[i] for run in runs], axis) for i, name in enumerate(ROWS)}


def rule(groups=1, split=-1, **settings):
    settings = {"transpose": True, "stack": (1,)} | settings
    return NameRule(r"l\.(\d)\.qkv\.weight", PATHS, split=split, groups=groups, **settings)


def placed(tree, spec):
    mesh = jax.make_mesh((2,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec(*spec))

    def one(x):
        if isinstance(x, ifjax.QTensor):
            return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), x,
                                ifjax.shardings(x, place))  # fmt: skip
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    return jax.tree.map(one, jax.eval_shape(lambda: tree), is_leaf=lambda x: isinstance(x, ifjax.QTensor))


def assert_same(found, expected):
    for (keys, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (found, expected)), strict=True):
        assert_array_equal(np.asarray(a), np.asarray(b), err_msg=str(keys))


@pytest.mark.parametrize("groups", [1, KV, KV * SIZE])
@pytest.mark.parametrize("spec", [(), (None, "a"), (None, None, "a")])
def test_query_key_and_value_are_split_as_floats_or_quantized(groups, spec, tmp_path):
    save_file(FULL, tmp_path / "m.safetensors")
    by_hand = [parts_of(x, groups) for x in FULL.values()]
    floats = {"attn": {name: np.stack([layer[name].T for layer in by_hand]) for name in ROWS}}
    assert_same(ifjax.load_file(tmp_path, like=placed(floats, spec), names=[rule(groups)]), floats)
    packed = jax.tree.map(lambda x: ifjax.quantize(x, "nvfp4", axis=-2, amax_axes=(0,)), floats)
    assert_same(ifjax.load_file(tmp_path, like=placed(packed, spec), names=[rule(groups)]), packed)


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("groups", [1, KV])
def test_packed_ones_are_split_as_bytes(groups, fmt, tmp_path):
    """And laid by heads: [in, heads, size], on two devices that share the heads."""
    whole = {name: ifjax.quantize(x, fmt) for name, x in FULL.items()}
    ifjax.save_file(whole, tmp_path / "m.safetensors")
    values = [parts_of(np.asarray(q.dequantize()), groups) for q in whole.values()]
    for reshape, spec in ((False, (None, None, "a")), (True, (None, None, "a")), (True, (None, "a"))):
        def shape(name, reshape=reshape):
            return (LAYERS, IN, ROWS[name] // SIZE, SIZE) if reshape else (LAYERS, IN, ROWS[name])

        expected = {name: np.stack([layer[name].T for layer in values]).reshape(shape(name)) for name in ROWS}
        found = ifjax.load_file(tmp_path, like=placed({"attn": expected}, spec), names=[rule(groups, reshape=reshape)])
        for name, q in found["attn"].items():
            assert isinstance(q, ifjax.QTensor) and q.axis == (-3 if reshape else -2)
            assert_array_equal(q.dequantize(), expected[name])
            if fmt == "nvfp4":
                assert_array_equal(q.amax, [x.amax for x in whole.values()])


def test_a_blocked_axis_is_split_and_laid_at_whole_blocks(tmp_path):
    """Of an output projection, [out, heads * size], whose inputs are the blocked axis."""
    q = ifjax.quantize(FULL["l.0.qkv.weight"], "if4")
    ifjax.save_file({"o": q}, tmp_path / "m.safetensors")
    values = np.asarray(q.dequantize()).T.reshape(4, 16, -1)
    like = {"o": jax.ShapeDtypeStruct(values.shape, np.float32)}
    found = ifjax.load_file(tmp_path, like=like, names=[NameRule("o", "o", transpose=True, reshape=True)])["o"]
    assert (found.shape, found.axis) == ((4, 16, 128), -2)
    assert_array_equal(found.dequantize(), values)
    halves = {name: jax.ShapeDtypeStruct((n, 128), np.float32) for name, n in (("a", 48), ("b", 16))}
    split = NameRule("o", ("a", "b"), transpose=True, split=-2)
    both = ifjax.load_file(tmp_path, like=halves, names=[split])
    assert_array_equal(np.concatenate([x.dequantize() for x in both.values()]), values.reshape(64, 128))
    torn = {name: jax.ShapeDtypeStruct((n, 128), np.float32) for name, n in (("a", 40), ("b", 24))}
    with pytest.raises(ValueError, match="'a' takes 0 to 40 of an axis of 'o' that has blocks of 16"):
        ifjax.load_file(tmp_path, like=torn, names=[split])
    like = {"o": jax.ShapeDtypeStruct((8, 8, 128), np.float32)}
    with pytest.raises(ValueError, match=r"'o' has the shape \(8, 8, 128\), which tears or joins blocks of 16"):
        ifjax.load_file(tmp_path, like=like, names=[NameRule("o", "o", transpose=True, reshape=True)])


def test_an_amax_of_each_matrix_goes_along_when_it_is_turned(tmp_path):
    """One for each column, or for each member of a stack; one for a stack serves a tree that wants several."""
    x = np.stack(list(FULL.values()))
    rows = ifjax.quantize(x[0], "nvfp4", axis=-1, amax_axes=(0,))
    each = ifjax.quantize(x, "nvfp4", axis=-1, amax_axes=(0,))
    ifjax.save_file({"rows": rows, "each": each, "one": ifjax.quantize(x, "nvfp4")}, tmp_path / "m.safetensors")
    like = {name: jax.ShapeDtypeStruct((*q.shape[:-2], IN, 128), np.float32)
            for name, q in (("rows", rows), ("each", each))}  # fmt: skip
    like["one"] = jax.eval_shape(lambda: ifjax.quantize(x.swapaxes(-1, -2), "nvfp4", axis=-2, amax_axes=(0,)))
    found = ifjax.load_file(tmp_path, like=like, names=[NameRule("(.*)", r"\1", transpose=True)])
    stored = ifjax.load_file(tmp_path)
    for name, q in found.items():
        assert_array_equal(q.dequantize(), np.asarray(stored[name].dequantize()).swapaxes(-1, -2))
    assert found["one"].amax.shape == (2,)
    two = {"a": jax.ShapeDtypeStruct((64, IN), np.float32), "b": jax.ShapeDtypeStruct((64, IN), np.float32)}
    with pytest.raises(ValueError, match="'a' has an amax for each of the first 1 axes"):
        ifjax.load_file(tmp_path, like=two, names=[NameRule("rows", ("a", "b"), split=-2), NameRule(".*", None)])


@pytest.mark.parametrize("make, message", [
    (lambda: rule(split=0), "split must be -1 or -2"),
    (lambda: NameRule("a", "b", split=-1), "split shares a tensor among several paths, got 'b'"),
    (lambda: NameRule("a", ("b", "c"), groups=2), "groups counts runs of the split axis, got 2 with split=None"),
    (lambda: rule(groups=0), "groups counts runs"),
])  # fmt: skip
def test_rules_check_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sizes_that_do_not_add_up_are_said(tmp_path):
    save_file(FULL, tmp_path / "m.safetensors")
    like = {"attn": {name: jax.ShapeDtypeStruct((LAYERS, IN, 32), np.float32) for name in ROWS}}
    with pytest.raises(ValueError, match=r"'attn/k' is split from axis -1 of 'l.0.qkv.weight', \(64, 128\), which has "
                       r"128 entries, and the parameters of attn/q, attn/k, attn/v take 32, 32, 32"):  # fmt: skip
        ifjax.load_file(tmp_path, like=like, names=[rule()])
    good = {"attn": {name: jax.ShapeDtypeStruct((LAYERS, IN, n), np.float32) for name, n in ROWS.items()}}
    with pytest.raises(ValueError, match="128 entries, in 3 groups, and"):
        ifjax.load_file(tmp_path, like=good, names=[rule(3)])
    save_file({"b": np.ones(128, np.float32)}, tmp_path / "b.safetensors")
    vectors = {name: jax.ShapeDtypeStruct((n,), np.float32) for name, n in ROWS.items()}
    found = ifjax.load_file(tmp_path / "b.safetensors", like=vectors, names=[NameRule("b", ("q", "k", "v"), split=-1)])
    assert jnp.concatenate(list(found.values())).shape == (128,)
    with pytest.raises(ValueError, match=r"is to be split along axis -2, and 'b' has shape \(128,\)"):
        ifjax.load_file(tmp_path / "b.safetensors", like=vectors, names=[NameRule("b", ("q", "k", "v"), split=-2)])
