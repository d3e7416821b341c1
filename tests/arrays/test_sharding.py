"""Sharded arrays: the same bytes, nothing gathered, every leaf where it belongs. On eight virtual devices."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ifjax

# Short blocks compile in a fraction of the time.
IF4 = dataclasses.replace(ifjax.FORMATS["if4"], name="if4_bs4", block=4)
NVFP4 = dataclasses.replace(ifjax.FORMATS["nvfp4"], name="nvfp4_bs4", block=4)
MXFP4 = dataclasses.replace(ifjax.FORMATS["mxfp4"], name="mxfp4_bs4", block=4)

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(AxisType.Auto)


def normal(*shape, seed=0):
    # Amax sits at one place: a device that took its own would differ.
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def as_bytes(leaf):
    leaf = np.asarray(leaf)
    return leaf.view(f"u{leaf.dtype.itemsize}")


def assert_same(a, b):
    """Equal types and equal bytes, wherever they lie."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(as_bytes(one), as_bytes(other))


def assert_placed(array, mesh, spec):
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, spec), array.ndim), array.sharding


def communicated(compiled):
    """(operation, result) of whatever a compiled program sends between devices."""
    sent = r"= (\S+) (all-gather|all-to-all|all-reduce|reduce-scatter|collective-\w+|send|recv)(?:-start)?\("
    return [(operation, result) for result, operation in re.findall(sent, compiled.as_text())]


def assert_only_amax_is_communicated(compiled):
    for operation, result in communicated(compiled):
        assert operation == "all-reduce", f"{operation} of {result}"
        assert re.fullmatch(r"f32\[[1,]*\](\{[\d,]*\})?", result), f"{operation} of {result}"


PLACEMENTS = {
    "if4, batch": ("if4_bs8", -1, P(("a", "b"))),
    "if4, rows": ("if4_bs8", -1, P(None, "a")),
    "if4, blocks": ("if4", -1, P(None, None, "a")),
    "if4, rows and blocks": ("if4_bs8", -1, P(None, "b", "a")),
    "if4, axis -2, blocks": ("if4_bs8", -2, P(None, "b")),
    "if4, axis -2, columns": ("if4_bs8", -2, P(None, None, "a")),
    "fouroversix, blocks": ("fouroversix_bs8", -1, P("b", None, "a")),
    "fouroversix, axis -2, both": ("fouroversix_bs8", -2, P(None, "b", "a")),
    "if3, blocks": ("if3_bs8", -1, P(None, "a", "b")),
    "mxfp4, blocks": ("mxfp4", -1, P(None, "b", "a")),
    "mxfp4, axis -2, both": ("mxfp4_bs8", -2, P(None, "b", "a")),
}


@pytest.mark.by_default("if4, blocks")
@pytest.mark.parametrize(("fmt", "axis", "spec"), PLACEMENTS.values(), ids=PLACEMENTS)
def test_sharded_arrays_give_the_same_bytes_and_nothing_is_gathered(mesh, fmt, axis, spec):
    x = normal(8, 16, 128)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    quantize = jax.jit(lambda x: ifjax.quantize(x, fmt, axis=axis)).lower(placed).compile()
    assert_only_amax_is_communicated(quantize)
    q = quantize(placed)
    assert_same(q, ifjax.quantize(x, fmt, axis=axis))
    assert_placed(q.codes, mesh, spec)
    assert_placed(q.scales, mesh, spec)
    dequantize = jax.jit(ifjax.dequantize).lower(q).compile()
    assert not communicated(dequantize)
    assert_placed(dequantize(q), mesh, spec)
    np.testing.assert_array_equal(dequantize(q), ifjax.quantize(x, fmt, axis=axis).dequantize())


@pytest.mark.slow
def test_an_amax_for_each_shard_needs_no_communication_at_all(mesh):
    x = normal(8, 16, 32)
    placed = jax.device_put(x, NamedSharding(mesh, P("a")))
    quantize = jax.jit(lambda x: ifjax.quantize(x, IF4, amax_axes=(0,))).lower(placed).compile()
    assert not communicated(quantize)
    assert_placed(quantize(placed).amax, mesh, P("a"))
    assert_same(quantize(placed), ifjax.quantize(x, IF4, amax_axes=(0,)))


@pytest.mark.by_default("2-D, columns of blocks")
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (P("b", None, "a"), {"block_2d": True}),
        (P("b", "a"), {"block_2d": True, "axis": -2}),
        (P("b", None, "a"), {"search": "fast"}),
        (P(None, "a", "b"), {"rounding": "stochastic"}),
        (P("a", None, "b"), {"rounding": "stochastic_unbiased", "axis": -2}),
    ],
    ids=["2-D, rows of blocks", "2-D, columns of blocks", "search", "stochastic", "stochastic_unbiased, axis -2"],
)
def test_every_way_to_encode_shards(mesh, spec, settings):
    """Noise too: it belongs to the element, not to the device."""
    x = normal(4, 16, 32)
    keys = {"key": jax.random.key(0)} if "rounding" in settings else {}
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    quantize = jax.jit(lambda x, **keys: ifjax.quantize(x, NVFP4, **settings, **keys)).lower(placed, **keys).compile()
    assert_only_amax_is_communicated(quantize)
    assert_same(quantize(placed, **keys), ifjax.quantize(x, NVFP4, **settings, **keys))


def test_fake_quantize_and_its_gradient_shard(mesh):
    x, g = normal(8, 16, 32), normal(8, 16, 32, seed=1)
    placed = jax.device_put((x, g), NamedSharding(mesh, P("b", None, "a")))

    def both(x, g):
        y, pull = jax.vjp(lambda x: ifjax.fake_quantize(x, NVFP4, gradient="clipped"), x)
        return y, pull(g)[0]

    compiled = jax.jit(both).lower(*placed).compile()
    assert_only_amax_is_communicated(compiled)
    for sharded, whole in zip(compiled(*placed), jax.jit(both)(x, g), strict=True):
        assert_placed(sharded, mesh, P("b", None, "a"))
        np.testing.assert_array_equal(sharded, whole)


@pytest.mark.by_default("if4")
@pytest.mark.parametrize("fmt", [IF4, MXFP4], ids=["if4", "mxfp4"])
def test_meshes_with_explicit_axes_work_alike(fmt):
    mesh = mesh_of(AxisType.Explicit)
    x = normal(8, 16, 32)
    axis, spec = (-1, P("a", None, "b")) if fmt is MXFP4 else (-2, P("a", "b", None))
    whole = ifjax.quantize(x, fmt, axis=axis)
    placed = jax.device_put(x, NamedSharding(mesh, spec))
    q = ifjax.quantize(placed, fmt, axis=axis)
    assert_same(q, whole)
    assert jax.typeof(q.codes).sharding.spec == jax.typeof(q.dequantize()).sharding.spec == spec
    np.testing.assert_array_equal(q.dequantize(), whole.dequantize())
    np.testing.assert_array_equal(ifjax.fake_quantize(placed, fmt, axis=axis), whole.dequantize())


# --- device_put and shardings -----------------------------------------------------------------------------------------


@pytest.mark.by_default("{'axis': -2*")
@pytest.mark.parametrize(
    ("settings", "spec", "amax_spec"),
    [
        ({}, P("a", None, "b"), P()),
        ({}, P(None, "b"), P()),
        ({}, P(), P()),
        ({"amax_axes": (0,)}, P("a", None, "b"), P("a")),
        ({"amax_axes": (0, 1)}, P("a", "b"), P("a", "b")),
        ({"amax_axes": (0,)}, P(None, "a", "b"), P(None)),
        ({"axis": -2, "amax_axes": (0,)}, P(("a", "b"), None, None), P(("a", "b"))),
        ({"axis": -2}, P(None, "a", "b"), P()),
        ({"axis": 0}, P("b", "a"), P()),
        ({"block_2d": True, "amax_axes": (0,)}, P("b", None, "a"), P("b")),
        ({"block_2d": True}, P(None, "a", "b"), P()),
    ],
    ids=str,
)
def test_device_put_places_each_leaf(mesh, settings, spec, amax_spec):
    q = ifjax.quantize(normal(8, 16, 32), NVFP4, **settings)
    placed = ifjax.device_put(q, NamedSharding(mesh, spec))
    assert_same(placed, q)
    assert_placed(placed.codes, mesh, spec)
    assert_placed(placed.scales, mesh, spec)
    assert_placed(placed.amax, mesh, amax_spec)


@pytest.mark.slow
def test_device_put_gives_every_device_its_own_blocks(mesh):
    x = normal(8, 32)
    q = ifjax.device_put(ifjax.quantize(x, MXFP4), NamedSharding(mesh, P("b", "a")))
    assert q.amax is None
    assert {shard.data.shape for shard in q.codes.addressable_shards} == {(4, 4)}
    assert {shard.data.shape for shard in q.scales.addressable_shards} == {(4, 2)}
    for codes, scales in zip(q.codes.addressable_shards, q.scales.addressable_shards, strict=True):
        part = q.replaced(codes=codes.data, scales=scales.data, length=8)
        rows, columns = codes.index
        columns = slice(2 * columns.start, 2 * columns.stop)
        np.testing.assert_array_equal(part.dequantize(), q.dequantize()[rows, columns])


def test_device_put_takes_any_sharding(mesh):
    q = ifjax.quantize(normal(3, 5), IF4)
    there = SingleDeviceSharding(jax.devices()[3])
    placed = ifjax.device_put(q, there)
    assert_same(placed, q)
    assert all(leaf.sharding == there for leaf in jax.tree.leaves(placed))
    everywhere = ifjax.device_put(q, NamedSharding(mesh, P()))
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(everywhere))


@pytest.mark.parametrize(
    ("shape", "settings", "spec", "message"),
    [
        ((8, 16), {}, P(None, ("a", "b")), "axis -1 of .* has 4 blocks of 4, which 8 devices cannot share"),
        ((8, 12), {}, P(None, "a"), "3 blocks of 4, which 4 devices cannot share"),
        ((8, 13), {}, P(None, "a"), "3.25 blocks of 4, which 4 devices"),
        ((8, 6), {}, P(None, "b"), "1.5 blocks of 4, which 2 devices"),
        ((12, 8), {"axis": 0}, P("a"), "axis -2 of .* has 3 blocks of 4, which 4 devices"),
        ((8, 16), {"block_2d": True}, P("a"), "axis -2 of .* has 2 blocks of 4, which 4 devices"),
        ((6, 16), {"block_2d": True}, P("b"), "axis -2 of .* has 1.5 blocks of 4, which 2 devices"),
        ((8, 16), {}, P(None, None, "a"), "more entries than shape"),
    ],
    ids=lambda value: str(value) if isinstance(value, P) else None,
)
def test_no_block_is_torn(mesh, shape, settings, spec, message):
    q = jax.eval_shape(lambda x: ifjax.quantize(x, IF4, **settings), jnp.ones(shape))
    for place in (ifjax.device_put, ifjax.shardings):
        with pytest.raises(ValueError, match=message):
            place(q, NamedSharding(mesh, spec))


def test_uneven_blocks_may_lie_whole_on_one_device(mesh):
    q = ifjax.quantize(normal(8, 13), IF4)
    assert_same(ifjax.device_put(q, NamedSharding(mesh, P("a"))), q)


def test_only_qtensors_are_placed(mesh):
    for place in (ifjax.device_put, ifjax.shardings):
        with pytest.raises(TypeError, match=r"needs a QTensor, got .*: for arrays, jax\.device_put"):
            place(jnp.ones(4), NamedSharding(mesh, P()))


def test_shardings_are_a_tree_like_the_tensor(mesh):
    q = ifjax.quantize(normal(8, 4, 16), IF4, amax_axes=(0,))
    shardings = ifjax.shardings(q, NamedSharding(mesh, P("a", None, "b")))
    assert jax.tree.structure(shardings) == jax.tree.structure(q)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(shardings))
    assert shardings.amax.spec == P("a")
    assert ifjax.shardings(ifjax.quantize(normal(4), MXFP4), NamedSharding(mesh, P())).amax is None


@pytest.mark.slow
def test_shardings_place_what_jit_takes_and_returns(mesh):
    x = normal(8, 16)
    shape = jax.eval_shape(lambda x: ifjax.quantize(x, IF4), x)
    shardings = ifjax.shardings(shape, NamedSharding(mesh, P("b", "a")))
    q = jax.jit(lambda x: ifjax.quantize(x, IF4), out_shardings=shardings)(x)
    assert_same(q, ifjax.quantize(x, IF4))
    assert jax.tree.map(lambda leaf: leaf.sharding, q).codes == shardings.codes
    values = jax.jit(ifjax.dequantize, in_shardings=(shardings,), out_shardings=NamedSharding(mesh, P("b", "a")))(q)
    np.testing.assert_array_equal(values, ifjax.quantize(x, IF4).dequantize())
    with pytest.raises(ValueError, match="sharding"):
        jax.jit(ifjax.dequantize, in_shardings=(shardings,))(ifjax.device_put(q, NamedSharding(mesh, P("a"))))


# --- shard_map --------------------------------------------------------------------------------------------------------


def specs_of(q, mesh, spec):
    return jax.tree.map(lambda sharding: sharding.spec, ifjax.shardings(q, NamedSharding(mesh, spec)))


@pytest.mark.parametrize("fmt", [IF4, MXFP4], ids=["if4", "mxfp4"])
def test_shard_map_with_one_amax_gives_the_bytes_of_the_whole(mesh, fmt):
    x = normal(8, 32)
    whole = ifjax.quantize(x, fmt)

    def quantize(x):
        amax = jax.lax.pmax(jnp.max(jnp.abs(x)), ("a", "b"))
        return ifjax.quantize(x, fmt, **({} if fmt is MXFP4 else {"amax": amax}))

    # a shard's own length is static, so that of the whole is put back
    specs = specs_of(whole, mesh, P("b", "a")).replaced(length=8)
    q = jax.jit(jax.shard_map(quantize, mesh=mesh, in_specs=P("b", "a"), out_specs=specs))(x)
    assert_same(q.replaced(length=32), whole)


def test_shard_map_without_an_amax_takes_each_shards_own(mesh):
    x = normal(8, 4, 8)

    def quantize(x):
        q = ifjax.quantize(x, IF4)
        assert (q.shape, q.amax.shape) == ((1, 4, 8), ())
        return q.replaced(amax=q.amax[None])

    each = ifjax.quantize(x, IF4, amax_axes=(0,))
    specs = specs_of(each, mesh, P(("a", "b")))
    q = jax.jit(jax.shard_map(quantize, mesh=mesh, in_specs=P(("a", "b")), out_specs=specs))(x)
    assert_same(q, each)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"search": "fast"}, {"block_2d": True}, {"rounding": "stochastic"}], ids=str)
def test_everything_runs_inside_shard_map(mesh, settings):
    x = normal(16, 8)
    keys = (jax.random.key(1),) * ("rounding" in settings)

    def fake(x, *keys):
        return ifjax.fake_quantize(x, NVFP4, amax=4.0, **settings, **({"key": keys[0]} if keys else {}))

    mapped = jax.shard_map(fake, mesh=mesh, in_specs=(P("a"), *[P()] * len(keys)), out_specs=P("a"))
    expected = np.concatenate([fake(part, *keys) for part in np.split(x, 4)])  # one key: the same noise on every shard
    np.testing.assert_array_equal(jax.jit(mapped)(x, *keys), expected)


def test_a_sharded_tensor_dequantizes_inside_shard_map(mesh):
    q = ifjax.quantize(normal(8, 4, 8), IF4, amax_axes=(0,))
    specs = specs_of(q, mesh, P("a"))
    values = jax.jit(jax.shard_map(lambda q: q.dequantize(), mesh=mesh, in_specs=(specs,), out_specs=P("a")))(q)
    np.testing.assert_array_equal(values, q.dequantize())
