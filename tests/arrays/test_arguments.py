"""Arguments as strangers pass them: taken, or refused in a sentence that says what to write."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import initialized

import ifjax

X = np.random.default_rng(0).standard_normal((3, 4, 32), np.float32)


# --- stacks ----------------------------------------------------------------------------------------------------------

WALKS = {
    "scan": lambda of, q: jax.lax.scan(lambda c, w: (c, of(w)), 0, q)[1],
    "map": jax.lax.map,
    "vmap": lambda of, q: jax.vmap(of)(q),
    "a loop": lambda of, q: jnp.stack([of(w) for w in q]),
    "an index that is traced": lambda of, q: jax.lax.map(lambda i: of(q[i]), jnp.arange(3)),
}


@pytest.mark.parametrize("how", WALKS)
def test_stacks_with_an_amax_each_are_walked_as_arrays_are(how):
    """As `quantize` says where amax_axes is described. What only indexes needs no amax of its own."""
    q = ifjax.quantize(X, "nvfp4", amax_axes=(0,))
    np.testing.assert_array_equal(WALKS[how](lambda w: w.dequantize(), q), q.dequantize())
    assert "amax_axes=(0,)" in str(ifjax.quantize.__doc__).partition("amax_axes: ")[2].partition("search: ")[0]
    shared = ifjax.quantize(X, "nvfp4")
    if how in ("scan", "map", "vmap"):
        with pytest.raises((IndexError, ValueError)):  # JAX's own: the one amax has no axis to walk along
            WALKS[how](lambda w: w.dequantize(), shared)
    else:
        np.testing.assert_array_equal(WALKS[how](lambda w: w.dequantize(), shared), shared.dequantize())


# --- numbers, axes, byte orders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_arrays_of_any_byte_order_are_taken(dtype, tmp_path):
    """A file has their values, too: safetensors are little-endian."""
    x = X[0].astype(dtype)
    expected = ifjax.quantize(x.astype(x.dtype.newbyteorder("=")), "if4")
    for q in (ifjax.quantize(x, "if4"), ifjax.quantize_params({"w": x}, ifjax.Rule("w", axis=-1))[0]["w"]):
        assert q.dtype == expected.dtype
        np.testing.assert_array_equal(q.dequantize(), expected.dequantize())
    np.testing.assert_array_equal(ifjax.fake_quantize(x, "if4"), expected.dequantize())
    path = ifjax.save_file({"w": x, "n": np.arange(3, dtype=">i4")}, tmp_path / "m.safetensors")
    opened = ifjax.open_file(path)
    assert opened["w"].tobytes() == x.astype(x.dtype.newbyteorder("<")).tobytes()
    assert opened["n"].tolist() == [0, 1, 2]


def test_other_tools_arrays_of_any_byte_order_are_taken():
    q = ifjax.quantize(X[0], "nvfp4")
    arrays, config = ifjax.exchange.export_tensors({"a.weight": q, "n": np.arange(3, dtype=">f4")}, "modelopt")
    arrays["a.weight_scale_2"] = arrays["a.weight_scale_2"].astype(">f4")
    back = ifjax.exchange.import_tensors(arrays, config)
    np.testing.assert_array_equal(back["a.weight"].dequantize(), q.dequantize())
    assert back["n"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("amax", [3, np.int64(3), np.float64(3), jnp.int8(3), np.array(3, ">i4")])
def test_whole_numbers_are_amax_too(amax):
    q = ifjax.quantize(X, "nvfp4", amax=amax)
    assert q.amax.dtype == jnp.float32 and float(q.amax) == 3
    np.testing.assert_array_equal(q.codes, ifjax.quantize(X, "nvfp4", amax=jnp.float32(3)).codes)


REFUSED = {
    "axis=None": ({"axis": None}, TypeError, "axis must be one integer, along which blocks lie, got None"),
    "axis=True": ({"axis": True}, TypeError, "axis must be one integer"),
    "axis=(0,)": ({"axis": (0,)}, TypeError, "axis must be one integer"),
    "axis=1.0": ({"axis": 1.0}, TypeError, "axis must be one integer"),
    "axis=5": ({"axis": 5}, ValueError, r"axis must lie in \[-3, 3\)"),
    "amax_axes=0": ({"amax_axes": 0}, TypeError, r"a tuple of integers, such as \(0,\) for a stack of layers, got 0"),
    "amax_axes=None": ({"amax_axes": None}, TypeError, "a tuple of integers"),
    "amax_axes=('0',)": ({"amax_axes": ("0",)}, TypeError, "a tuple of integers"),
    "amax_axes=(1.0,)": ({"amax_axes": (1.0,)}, TypeError, "a tuple of integers"),
    "amax=True": ({"amax": True}, ValueError, "amax must be float"),
    "amax=[1]": ({"amax": [1]}, ValueError, r"amax must be float of shape \(\)"),
    "amax=-1": ({"amax": -1}, ValueError, "amax must be finite and not negative"),
    "amax=nan": ({"amax": float("nan")}, ValueError, "amax must be finite and not negative"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("function", [ifjax.quantize, ifjax.fake_quantize])
def test_other_arguments_are_refused_in_a_sentence(function, case):
    settings, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        function(X, "nvfp4", **settings)


@pytest.mark.parametrize("module", [{"Dense", "Conv"}, frozenset({"Dense", "Conv"}), ["Conv", "Dense"]])
def test_modules_in_any_collection(module):
    assert ifjax.Rule(".*", module=module).module == ("Conv", "Dense")


@pytest.mark.parametrize("module", [{"Dense": 1}, {}, set(), 1, ["Dense", 1], b"Dense"], ids=repr)
def test_what_is_no_modules_name_is_refused(module):
    with pytest.raises(ValueError, match="module must be the name of a class alone, such as 'Dense', a tuple"):
        ifjax.Rule(".*", module=module)


@pytest.mark.parametrize("size", [(3,), (3, 3)], ids=str)
def test_a_model_of_depthwise_convolutions_alone_is_not_told_to_write_the_rule_that_is_there(size):
    import flax.linen as nn

    model, x = nn.Conv(32, size, feature_group_count=32), jnp.ones((1, *[8] * len(size), 32))
    params = initialized(model, x)
    with pytest.raises(ValueError, match="contraction length 1 is below the block of 16") as error:
        ifjax.quantize_params(params, "if4", model=model, sample=x)
    assert "Rule('.*'" not in str(error.value)


# --- meshes ----------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("fake_quantize")
@pytest.mark.parametrize("make", [ifjax.quantize, ifjax.fake_quantize])
def test_parts_of_an_explicit_axis_that_tear_blocks_are_refused(make):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    x = X.reshape(6, 64)
    for names, settings, message in (
        ((None, "b"), {"fmt": "mxfp4"}, r"axis -1 of \(6, 64\) is sharded over \('b',\) in 4 parts, which tear blocks"),
        ((None, ("a", "b")), {"fmt": "nvfp4"}, r"over \('a', 'b'\) in 8 parts.*write jax\.reshard"),
        (("a",), {"fmt": "if4", "block_2d": True}, r"axis -2 of \(6, 64\) is sharded over \('a',\) in 2 parts"),
    ):
        with pytest.raises(ValueError, match=message):
            make(jax.device_put(x, NamedSharding(mesh, P(*names))), **settings)
    # And what it says helps; where blocks are whole, nothing is moved.
    with jax.set_mesh(mesh):
        torn = jax.device_put(x, P(None, "b"))
        assert (make(jax.reshard(torn, P("a", None)), "mxfp4").dtype, torn.shape) == (np.float32, (6, 64))
        q = ifjax.quantize(torn, "nvfp4")
    assert jax.typeof(q.scales).sharding.spec == P(None, "b")
    np.testing.assert_array_equal(q.codes, ifjax.quantize(x, "nvfp4").codes)


def test_one_key_in_shard_map_draws_the_same_noise_on_every_device_and_a_folded_one_does_not():
    """As `quantize` says where `key=` is described, and as everywhere in jax.random."""
    mesh = jax.make_mesh((4,), ("a",), axis_types=(AxisType.Auto,))
    x = jnp.tile(X[0], (4, 1))  # every device has the same values

    def rounded(x, key, fold):
        key = jax.random.fold_in(key, jax.lax.axis_index("a")) if fold else key
        return ifjax.fake_quantize(x, "nvfp4", rounding="stochastic", key=key, amax=4.0)

    def parts(fold):
        fn = jax.shard_map(lambda x, key: rounded(x, key, fold), mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"))
        return np.split(np.asarray(jax.jit(fn)(x, jax.random.key(0))), 4)

    same, apart = parts(False), parts(True)
    for i in range(1, 4):
        np.testing.assert_array_equal(same[i], same[0])
        assert all((apart[i] != apart[j]).any() for j in range(i))
    alone = ifjax.fake_quantize(X[0], "nvfp4", rounding="stochastic", amax=4.0,
                                key=jax.random.fold_in(jax.random.key(0), 2))  # fmt: skip
    np.testing.assert_array_equal(apart[2], alone)
    described = str(ifjax.quantize.__doc__).partition("key: ")[2].partition("block_2d: ")[0]
    assert "the same noise" in described and "fold_in(key, jax.lax.axis_index(axis))" in described


def test_an_amax_of_0_is_refused_where_it_would_lose_values():
    x = jnp.asarray([[1.0, -2] * 8, [0, 0] * 8])
    for amax, axes in ((0.0, ()), (jnp.array([0.0, 1.0]), (0,))):
        with pytest.raises(ValueError, match="Leave amax= out"):
            ifjax.quantize(x, "if4", amax=amax, amax_axes=axes)
    with pytest.raises(ValueError, match="Leave amax= out"):
        jax.jit(lambda x: ifjax.fake_quantize(x, "nvfp4", amax=0.0))(x)
    kept = ifjax.quantize(x, "if4", amax=jnp.array([2.0, 0.0]), amax_axes=(0,))
    np.testing.assert_array_equal(kept.dequantize(), ifjax.quantize(x, "if4", amax_axes=(0,)).dequantize())
    assert not ifjax.quantize(jnp.zeros(16), "if4", amax=0.0).dequantize().any()
