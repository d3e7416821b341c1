"""QTensor as a value: an array-like pytree that keeps its bytes through everything jax does to a pytree."""

import copy
import dataclasses
import itertools
import math
import operator
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from jax import export
from jax.sharding import PartitionSpec

import ifjax

# Blocks of 4 and 8 go through the same code as those of 16 and compile in a fraction of the time.
IF4 = dataclasses.replace(ifjax.FORMATS["if4"], name="if4_bs4", block=4)
NVINT6 = dataclasses.replace(ifjax.FORMATS["nvint6"], name="nvint6_bs4", block=4)
NVFP4 = dataclasses.replace(ifjax.FORMATS["nvfp4"], name="nvfp4_bs4", block=4)
MXFP4 = dataclasses.replace(ifjax.FORMATS["mxfp4"], name="mxfp4_bs4", block=4)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def described(shape, dtype=jnp.float32, **settings):
    """The QTensor of an array of this shape, with shapes for arrays: nothing is computed."""
    return jax.eval_shape(lambda x: ifjax.quantize(x, **settings), jax.ShapeDtypeStruct(shape, dtype))


def leaves(q):
    return jax.tree.leaves(q)


def assert_same(a, b):
    """Equal types and equal bytes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(leaves(a), leaves(b), strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_array_equal(as_bytes(one), as_bytes(other))


def as_bytes(leaf):
    leaf = np.asarray(leaf)
    return leaf.view(f"u{leaf.dtype.itemsize}")


def values_of(q):
    """The values of a QTensor of 4-bit codes, by the specification; compiles nothing."""
    codes, scales = (np.moveaxis(as_bytes(leaf), q.axis, -1) for leaf in (q.codes, q.scales))
    codes = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], 2 * codes.shape[-1])
    amax = np.float32(1)
    if q.amax is not None:
        amax = np.asarray(q.amax)
        amax = np.broadcast_to(amax.reshape(*amax.shape, *[1] * (codes.ndim - 1 - amax.ndim)), codes.shape[:-1])
        amax = amax.reshape(-1, 1, 1)
    rows = codes.reshape(-1, codes.shape[-1]), scales.reshape(-1, scales.shape[-1])
    values = oracle.dequantize(*rows, amax, q.fmt.name.removesuffix("_bs4"), block=q.fmt.block)
    return np.moveaxis(values.reshape(codes.shape)[..., : q.blocking.length], -1, q.axis)


def with_every_scale_byte(q):
    """q, 256 blocks of it, with each of the 256 scale bytes once and all codes."""
    assert q.scales.size == 256
    scales = np.arange(256, dtype=np.uint8).reshape(q.scales.shape)
    codes = np.random.default_rng(3).integers(0, 256, q.codes.shape).astype(np.uint8)
    return q.replaced(codes=jnp.asarray(codes), scales=jnp.asarray(scales))


# --- a pytree ---------------------------------------------------------------------------------------------------------


def test_leaves_are_codes_scales_and_amax_under_their_names():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(described((2, 32)))]
    assert paths == [".codes", ".scales", ".amax"]
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(described((32,), fmt="mxfp4"))]
    assert paths == [".codes", ".scales"]


def test_leaves_have_the_documented_types():
    q = described((3, 5, 33), amax_axes=(0,))
    assert (q.codes.dtype, q.scales.dtype, q.amax.dtype) == (jnp.uint8, jnp.uint8, jnp.float32)
    assert (q.codes.shape, q.scales.shape, q.amax.shape) == ((3, 5, 24), (3, 5, 3), (3,))
    q = described((3, 65, 5), fmt="mxfp4", axis=1)
    assert (q.scales.dtype, q.amax) == (jnp.uint8, None)
    assert (q.codes.shape, q.scales.shape) == ((3, 48, 5), (3, 3, 5))


def test_settings_are_static_and_readable():
    q = described((8, 32), jnp.bfloat16, fmt="fouroversix", axis=0, block_2d=True)
    assert q.fmt == ifjax.FORMATS["fouroversix"]
    assert (q.axis, q.blocking.length, q.dtype, q.block_2d, q.headroom) == (-2, 8, jnp.bfloat16, True, 1)
    key = jax.random.key(0)
    assert described((32,), rounding="stochastic", key=key).headroom == 1
    assert described((32,), rounding="stochastic_unbiased", key=key).headroom == 16 / 17


def test_tree_map_maps_the_arrays():
    q = ifjax.quantize(normal(3, 8), IF4)
    assert_same(jax.tree.map(lambda a: a, q), q)
    shapes = jax.tree.map(lambda a: a.shape, q)
    assert isinstance(shapes, ifjax.QTensor)
    assert (shapes.codes, shapes.scales, shapes.amax) == ((3, 4), (3, 2), ())
    stacked = jax.tree.map(lambda *a: np.stack(a), q, q)
    assert stacked.shape == (2, 3, 8)
    assert_same(jax.tree.unflatten(jax.tree.structure(q), leaves(q)), q)


@pytest.mark.parametrize("fmt", ["if4", "nvfp4"])
def test_equal_settings_have_equal_types_whatever_the_loss(fmt):
    losses = [None, "mse", "mae", "abs_max", lambda x, d: jnp.sum(jnp.abs(x - d) ** 3, -1)]
    types = {jax.tree.structure(described((2, 16), fmt=fmt, loss=loss)) for loss in losses}
    types |= {jax.tree.structure(described((5, 16), fmt=fmt, search="fast"))}
    types |= {jax.tree.structure(described((2, 16), fmt=ifjax.FORMATS[fmt], axis=1))}
    types |= {jax.tree.structure(described((2, 16), fmt=fmt, rounding="stochastic", key=jax.random.key(0)))}
    assert len(types) == 1


def test_settings_that_change_the_meaning_of_the_bytes_change_the_type():
    key = jax.random.key(0)
    others = [
        described((16, 16), fmt="nvfp4"),
        described((16, 16), axis=0),
        described((16, 16), block_2d=True),
        described((16, 16), jnp.bfloat16),
        described((16, 17)),
        described((16, 16), rounding="stochastic_unbiased", key=key),
        described((16, 16), fmt=dataclasses.replace(ifjax.FORMATS["if4"], block=8)),
        described((16, 16)),
    ]
    assert len({jax.tree.structure(q) for q in others}) == len(others)


def test_copies_and_pickles_are_equal():
    for fmt in (IF4, "mxfp4"):
        q = ifjax.quantize(normal(2, 32).astype(jnp.bfloat16), fmt)
        for other in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
            assert_same(other, q)


# --- what it says of itself -------------------------------------------------------------------------------------------


# Bytes counted by hand: codes, scales, amax.
SIZES = {
    "4 bits": ((2, 32), {"fmt": "if4"}, 32 + 4 + 4),
    "4 bits, an amax a row": ((2, 32), {"fmt": "if4", "amax_axes": (0,)}, 32 + 4 + 8),
    "4 bits, odd length": ((3, 17), {"fmt": "nvfp4"}, 3 * (16 + 2) + 4),
    "4 bits, one value": ((1,), {"fmt": "fouroversix"}, 8 + 1 + 4),
    "4 bits, blocks of 8": ((2, 24), {"fmt": "nvint4_bs8"}, 24 + 6 + 4),
    "4 bits, blocks of one": ((2, 5), {"fmt": dataclasses.replace(IF4, block=1)}, 2 * (3 + 5) + 4),
    "4 bits, 2-D": ((17, 17), {"fmt": "if4", "block_2d": True}, 17 * (16 + 2) + 4),
    "4 bits, first axis": ((17, 3), {"fmt": "if4", "axis": 0}, 3 * (16 + 2) + 4),
    "3 bits": ((2, 32), {"fmt": "if3"}, 24 + 4 + 4),
    "3 bits, an amax a matrix": ((2, 3, 32), {"fmt": "nvfp3", "amax_axes": (0,)}, 72 + 12 + 8),
    "3 bits, an amax a row": ((2, 3, 32), {"fmt": "nvfp3", "amax_axes": (0, 1)}, 72 + 12 + 24),
    "3 bits, odd length": ((3, 9), {"fmt": "if3_bs8"}, 3 * (6 + 2) + 4),
    "3 bits, blocks of 4": ((1, 4), {"fmt": dataclasses.replace(ifjax.FORMATS["if3"], block=4)}, 3 + 1 + 4),
    "6 bits": ((2, 32), {"fmt": "if6"}, 48 + 4 + 4),
    "6 bits, odd length": ((3, 17), {"fmt": "nvint6"}, 3 * (24 + 2) + 4),
    "MX 4 bits": ((2, 32), {"fmt": "mxfp4"}, 32 + 2),
    "MX 4 bits, odd length": ((2, 33), {"fmt": "mxfp4"}, 2 * (32 + 2)),
    "MX 3 bits": ((2, 64), {"fmt": "mxfp3"}, 2 * (24 + 2)),
    "MX 6 bits": ((5, 33), {"fmt": "mxfp6_e2m3"}, 5 * (48 + 2)),
}


@pytest.mark.parametrize(("shape", "settings", "nbytes"), SIZES.values(), ids=SIZES)
def test_size_is_that_of_all_arrays(shape, settings, nbytes):
    q = described(shape, jnp.bfloat16, **settings)
    assert (q.shape, q.ndim, q.size, q.dtype) == (shape, len(shape), math.prod(shape), jnp.bfloat16)
    assert len(q) == shape[0]
    assert q.nbytes == nbytes == sum(leaf.size * leaf.dtype.itemsize for leaf in leaves(q))
    assert q.bits_per_value == 8 * nbytes / math.prod(shape)


def test_bits_approach_those_of_the_format():
    for name, bits in {"if4": 4.5, "if3": 3.5, "if6": 6.5, "nvfp4_bs8": 5, "mxfp4": 4.25, "mxfp6_e3m2": 6.25}.items():
        bits_per_value = described((1024, 1024), fmt=name).bits_per_value
        assert ifjax.FORMATS[name].bits_per_value == bits <= bits_per_value <= bits + 1e-4


def test_empty_arrays_have_no_bits_per_value():
    assert math.isnan(described((0, 16), fmt="mxfp4").bits_per_value)


@pytest.mark.by_default("mxfp4")
@pytest.mark.parametrize("fmt", ["if4_bs8", "if3_bs8", "fouroversix_bs8", "nvint6", "mxfp4"])
def test_codes_and_scale_bytes_decode_by_the_specification(fmt):
    x = normal(3, 37, seed=1)
    q = ifjax.quantize(x, fmt)
    codes, scales = np.asarray(q.unpacked_codes()), np.asarray(q.scales)
    assert (codes.shape, codes.dtype, scales.dtype) == (x.shape, np.uint8, np.uint8)
    assert codes.max() < 2**q.fmt.bits
    np.testing.assert_array_equal(scales, as_bytes(q.scales))
    padded = np.pad(codes, [(0, 0), (0, -codes.shape[1] % q.fmt.block)])
    amax = 1 if q.amax is None else np.asarray(q.amax)
    np.testing.assert_array_equal(oracle.dequantize(padded, scales, amax, fmt)[:, :37], q.dequantize())


@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
def test_unpacked_codes_keep_the_order_of_axes(axis):
    x = normal(9, 10, 11)
    q = ifjax.quantize(x, "nvint3_bs8", axis=axis)
    last = ifjax.quantize(jnp.moveaxis(x, axis, -1), "nvint3_bs8")
    np.testing.assert_array_equal(q.unpacked_codes(), np.moveaxis(last.unpacked_codes(), -1, axis))
    np.testing.assert_array_equal(q.scales, np.moveaxis(last.scales, -1, axis))


def test_choices_are_the_top_bits_of_the_headers():
    q = ifjax.quantize(normal(4, 64), IF4)
    assert (q.choices().shape, q.choices().dtype) == ((4, 16), np.uint8)
    np.testing.assert_array_equal(q.choices(), np.asarray(q.scales) >> 7)
    assert 0 < np.mean(q.choices()) < 1


@pytest.mark.parametrize("fmt", ["nvfp4", "fouroversix", "nvint4", "mxfp4"])
def test_formats_of_one_decoding_have_no_choices(fmt):
    with pytest.raises(ValueError, match=f"{fmt} stores no choice"):
        described((16,), fmt=fmt).choices()


def test_repr_is_one_short_line():
    q = described((64, 64), jnp.bfloat16, fmt="if4", axis=0, block_2d=True)
    assert repr(q) == "QTensor(if4, 64x64 bfloat16, axis=-2, 2-D blocks, 4.508 bits a value)"
    assert repr(ifjax.quantize(jnp.zeros((0, 16)), IF4)) == "QTensor(if4_bs4, 0x16 float32, axis=-1, nan bits a value)"


@pytest.mark.parametrize(
    "leaf",
    [
        None,
        0,
        True,
        "text",
        (),
        np.float32(1),
        object(),
        PartitionSpec("a"),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        jax.ShapeDtypeStruct((), jnp.float32),
        np.zeros(0, jax.dtypes.float0),
    ],
    ids=lambda leaf: type(leaf).__name__,
)
def test_repr_is_short_whatever_the_leaves(leaf):
    for fmt in (IF4, MXFP4):
        text = repr(jax.tree.unflatten(jax.tree.structure(described((3, 4), fmt=fmt)), [leaf] * (3 - (fmt is MXFP4))))
        assert text.startswith(f"QTensor({fmt.name}, ")
        assert len(text) < 300
        assert "\n" not in text


def test_repr_works_while_tracing():
    seen = []
    jax.eval_shape(jax.vmap(lambda q: seen.append(repr(q))), described((3, 5, 4), fmt=MXFP4))
    assert seen == ["QTensor(mxfp4_bs4, 5x4 float32, axis=-1, 6.000 bits a value)"]


@pytest.mark.parametrize(
    "densify",
    [
        np.asarray,
        np.array,
        jnp.asarray,
        jnp.array,
        jnp.sum,
        lambda q: np.array(q, dtype=np.float32, copy=True),
        lambda q: q + 1,
        lambda q: np.ones(4) - q,
        lambda q: -q,
        lambda q: jnp.dot(jnp.ones((2, 3)), q),
        lambda q: jnp.stack([q, q]),
        float,
    ],
)
def test_it_never_turns_into_an_array_silently(densify):
    with pytest.raises(TypeError):
        densify(ifjax.quantize(jnp.ones((3, 4)), IF4))


def test_the_error_says_how_to_turn_it_into_an_array():
    for densify in (np.asarray, jnp.asarray):
        with pytest.raises(TypeError, match=r"write q\.dequantize\(\)"):
            densify(ifjax.quantize(jnp.ones(4), IF4))


# --- indices ----------------------------------------------------------------------------------------------------------


# What blocks take: (shape, settings, the axes that may be indexed).
ARRANGEMENTS = {
    "last axis": ((4, 3, 5, 6), {"axis": -1}, (0, 1, 2)),
    "last axis, an amax an entry": ((4, 3, 5, 6), {"axis": -1, "amax_axes": (0,)}, (0, 1, 2)),
    "last axis, an amax a row": ((4, 3, 5, 6), {"axis": -1, "amax_axes": (0, 1, 2)}, (0, 1, 2)),
    "last axis but one": ((4, 3, 6, 5), {"axis": -2, "amax_axes": (0, 1)}, (0, 1, 3)),
    "second axis": ((4, 6, 3, 5), {"axis": 1, "amax_axes": (0,)}, (0, 2, 3)),
    "first axis": ((6, 4, 3, 5), {"axis": 0}, (1, 2, 3)),
    "MX": ((4, 3, 5, 6), {"axis": 2, "fmt": MXFP4}, (0, 1, 3)),
    "2-D": ((4, 3, 5, 6), {"block_2d": True, "amax_axes": (0,)}, (0, 1)),
    "2-D, last axis but one": ((4, 3, 5, 6), {"block_2d": True, "axis": -2}, (0, 1)),
}


def entries(length):
    """What may stand in an index, for an axis of this length."""
    yield from (0, -1, length - 1, -length, np.int64(1), np.uint8(2))
    yield from (slice(1, 3), slice(None, None, -2), slice(-1, None), slice(2, 2), slice(0, 99))
    yield from (np.array([2, 0, -1]), np.array([[0, 1], [2, 2]]), np.array([], np.int32), np.array([1], np.uint8))


def indices(shape, axes):
    for axis in axes:
        for entry in entries(shape[axis]):
            yield (slice(None),) * axis + (entry,)
    first, second = axes[:2]
    both = [slice(None)] * len(shape)
    for one, other in [(1, 2), (slice(1, 2), 0), (-1, slice(None, None, -1)), (slice(3), np.array([[0], [2]]))]:
        both[first], both[second] = one, other
        yield tuple(both)
    yield from ((), ..., (slice(None),), (slice(None),) * len(shape), (..., *(slice(None),) * len(shape)))
    if axes[0] == 0:
        yield from (1, slice(1, 3), (1, ...), (-1, ..., slice(None)), (1, *(slice(None),) * (len(shape) - 1)))
    if axes[-1] == len(shape) - 1:
        yield from ((..., 1), (..., slice(None, None, -1)))


@pytest.fixture(scope="module", params=ARRANGEMENTS.values(), ids=ARRANGEMENTS.keys())
def arranged(request):
    """A QTensor, its values, and the axes that may be indexed."""
    shape, settings, axes = request.param
    q = ifjax.quantize(normal(*shape), **{"fmt": NVFP4} | settings)
    np.testing.assert_array_equal(values_of(q), q.dequantize())
    return q, values_of(q), axes


@pytest.mark.by_default("last axis, an amax a row")
def test_indexing_picks_what_indexing_the_values_picks(arranged):
    q, values, axes = arranged
    several = list(indices(q.shape, axes))
    parts = jax.jit(lambda q: [q[index] for index in several])(q)
    for index, part in zip(several, parts, strict=True):
        np.testing.assert_array_equal(values_of(part), values[index], err_msg=str(index))


@pytest.mark.by_default("first axis")
def test_take_picks_what_take_of_the_values_picks(arranged):
    q, values, axes = arranged
    indices = (1, -1, np.array([2, 0, -2]), np.array([[0, 1, 2]]), np.array([1, 99, -99]))
    several = [(index, axis - back) for axis in axes for back in (0, q.ndim) for index in indices]
    taken = jax.jit(lambda q: [q.take(*pair) for pair in several])(q)
    for (index, axis), part in zip(several, taken, strict=True):
        length = q.shape[axis]
        valid = (-length <= np.asarray(index)) & (np.asarray(index) < length)
        expected = np.take(values, np.where(valid, index, 0), axis)
        valid = np.expand_dims(valid, tuple(range(valid.ndim, expected.ndim - axis % q.ndim)))
        np.testing.assert_array_equal(values_of(part), np.where(valid, expected, np.nan), err_msg=f"{index}, {axis}")


@pytest.mark.by_default("last axis", "*but one")
def test_what_is_picked_describes_itself(arranged):
    q, values, axes = arranged
    for index in [(slice(None),) * axis + (entry,) for axis in axes for entry in (1, slice(2), np.array([[0, 1, 0]]))]:
        part = jax.eval_shape(lambda q, index=index: q[index], q)
        assert (part.shape, part.ndim, part.dtype) == (values[index].shape, values[index].ndim, values.dtype)
        assert (part.blocking.length, part.fmt, part.block_2d) == (q.blocking.length, q.fmt, q.block_2d)


@pytest.mark.by_default("amax_axes0")
@pytest.mark.parametrize("amax_axes", [(), (0,)])
def test_traced_integers_index_too(amax_axes):
    q = ifjax.quantize(normal(5, 3, 8), NVFP4, amax_axes=amax_axes)
    total = jax.jit(lambda q: jax.lax.fori_loop(0, 5, lambda i, sum_: sum_ + q[i].dequantize(), jnp.zeros((3, 8))))
    expected = np.zeros((3, 8), np.float32)
    for layer in np.asarray(q.dequantize()):
        expected = expected + layer
    np.testing.assert_array_equal(total(q), expected)
    np.testing.assert_array_equal(jax.jit(lambda q, i: q[:, i].dequantize())(q, 2), q.dequantize()[:, 2])


def test_embedding_rows_look_up_under_jit_and_vmap():
    q = ifjax.quantize(normal(10, 8), NVFP4)
    tokens = np.array([[1, 9, 1], [0, 3, 7]])
    expected = np.asarray(q.dequantize())[tokens]
    np.testing.assert_array_equal(jax.jit(lambda q, i: q[i].dequantize())(q, tokens), expected)
    np.testing.assert_array_equal(jax.vmap(lambda i: q.take(i).dequantize())(tokens), expected)


@pytest.mark.slow
def test_an_index_out_of_range_is_an_error_but_take_gives_nan():
    q = ifjax.quantize(normal(3, 2, 8), IF4, amax_axes=(0,))
    for index in (3, -4, (0, 2), (..., -3, slice(None)), np.int32(7)):
        with pytest.raises(IndexError, match="out of range"):
            q[index]
    for fmt, settings in [(NVFP4, {}), (NVFP4, {"amax_axes": (0,)}), (MXFP4, {})]:
        picked = ifjax.quantize(normal(3, 8), fmt, **settings).take(np.array([1, 3, -4])).dequantize()
        np.testing.assert_array_equal(np.isnan(picked), np.array([[False], [True], [True]]).repeat(8, 1))


def test_indices_that_make_no_sense_are_refused():
    q = ifjax.quantize(normal(3, 2, 8), IF4)
    for index in [(0, 0, slice(None), 0), (slice(None),) * 4, (..., 0, ...), (np.array([0]), np.array([1]))]:
        with pytest.raises(IndexError):
            q[index]
    for index in [1.0, None, "a", [0, 1], True, np.array([True, False, True]), np.array([1.0]), slice(0.5)]:
        with pytest.raises((TypeError, IndexError)):
            q[index]
    for axis in (3, -4):
        with pytest.raises(ValueError, match="out of range"):
            q.take(0, axis)


def test_blocked_axes_are_never_indexed(arranged):
    q, _, axes = arranged
    for axis in set(range(q.ndim)) - set(axes):
        for entry in (0, slice(0, 4), slice(None, None, -1), np.array([0])):
            with pytest.raises(ValueError, match=f"axis {axis} .* is blocked"):
                q[(slice(None),) * axis + (entry,)]
        for at in (axis, axis - q.ndim):
            with pytest.raises(ValueError, match=f"axis {axis} .* is blocked"):
                q.take(np.array([0]), at)


def test_iteration_gives_the_entries_of_the_first_axis():
    q = ifjax.quantize(normal(3, 2, 8), IF4, amax_axes=(0,))
    assert len(list(q)) == len(q) == 3
    for i, entry in enumerate(q):
        assert_same(entry, q[i])
    first, *_ = q
    assert first.shape == (2, 8)
    with pytest.raises(ValueError, match="is blocked"):
        list(ifjax.quantize(normal(8), IF4))


# --- transposition ----------------------------------------------------------------------------------------------------


@pytest.mark.by_default("if4, first axis")
@pytest.mark.parametrize(
    ("shape", "fmt", "axis"),
    [
        pytest.param((4, 16), NVFP4, -1, id="whole blocks"),
        pytest.param((5, 9), IF4, -1, id="if4"),
        pytest.param((9, 5), IF4, -2, id="if4, first axis"),
        pytest.param((1, 7), NVFP4, -1, id="one row"),
        pytest.param((7, 1), NVFP4, -2, id="one column, first axis"),
        pytest.param((13, 3), MXFP4, -1, id="mxfp4"),
        pytest.param((20, 37), "nvint3_bs8", -1, id="3 bits"),
        pytest.param((6, 7), NVINT6, -2, id="6 bits"),
    ],
)
def test_the_transpose_is_the_quantized_transpose(shape, fmt, axis):
    x = normal(*shape, seed=2)
    q = ifjax.quantize(x, fmt, axis=axis, block_2d=True)
    once, twice, values = jax.jit(lambda q: (q.T, q.T.T, (q.dequantize(), q.T.dequantize())))(q)
    assert_same(once, ifjax.quantize(x.T, fmt, axis=axis, block_2d=True))
    assert_same(twice, q)
    np.testing.assert_array_equal(values[0].T, values[1])


@pytest.mark.slow
def test_transposition_needs_no_jit():
    x = normal(5, 9)
    assert_same(ifjax.quantize(x, NVFP4, block_2d=True).T, ifjax.quantize(x.T, NVFP4, block_2d=True))


@pytest.mark.slow
def test_batches_of_matrices_transpose():
    x = normal(2, 3, 5, 9)
    q = ifjax.quantize(x, NVFP4, block_2d=True, amax_axes=(0, 1))
    together, mapped = jax.jit(lambda q: (q.mT, jax.vmap(jax.vmap(lambda q: q.T))(q)))(q)
    assert together.shape == (2, 3, 9, 5)
    assert_same(together, ifjax.quantize(x.mT, NVFP4, block_2d=True, amax_axes=(0, 1)))
    assert_same(mapped, together)


def test_only_square_blocks_transpose():
    for axis, name in itertools.product((0, 1), ("T", "mT")):
        with pytest.raises(ValueError, match="block_2d=True"):
            operator.attrgetter(name)(described((4, 4), axis=axis))
    with pytest.raises(ValueError, match=r"q\.mT"):
        _ = described((2, 4, 4), fmt=IF4, block_2d=True).T


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_rounds_once_to_the_dtype(dtype):
    x = normal(4, 6)
    values = np.asarray(ifjax.quantize(x, NVINT6).dequantize())
    q = ifjax.quantize(x, NVINT6).astype(dtype)
    for result in (q.dequantize(), ifjax.dequantize(q), q.dequantize(dtype), ifjax.dequantize(q, np.dtype(dtype).name)):
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, values.astype(dtype))
    for other in (jnp.float32, jnp.bfloat16, jnp.float16):
        np.testing.assert_array_equal(ifjax.dequantize(q, other), values.astype(other))


def test_dequantize_needs_a_qtensor():
    for x in (jnp.ones(4), [1.0], None):
        with pytest.raises(TypeError, match=r"ifjax\.quantize"):
            ifjax.dequantize(x)


# --- what jax does to pytrees -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stack():
    """Five layers, each with an amax of its own."""
    return ifjax.quantize(normal(5, 3, 8) * jnp.arange(1, 6, dtype=jnp.float32)[:, None, None], IF4, amax_axes=(0,))


def test_eval_shape_knows_the_result(stack):
    shapes = jax.eval_shape(lambda x: ifjax.quantize(x, IF4, amax_axes=(0,)), jnp.ones((5, 3, 8)))
    assert jax.tree.structure(shapes) == jax.tree.structure(stack)
    assert [(s.shape, s.dtype) for s in leaves(shapes)] == [(s.shape, s.dtype) for s in leaves(stack)]
    assert (shapes.shape, shapes.nbytes) == (stack.shape, stack.nbytes)


def test_jit_takes_and_returns_it(stack):
    @jax.jit
    def through(q):
        return {"same": q, "values": q.dequantize(), "part": q[1:3]}

    result = through(stack)
    assert_same(result["same"], stack)
    assert_same(result["part"], stack[1:3])
    np.testing.assert_array_equal(result["values"], stack.dequantize())
    x = normal(4, 8)
    assert_same(jax.jit(lambda x: ifjax.quantize(x, IF4))(x), ifjax.quantize(x, IF4))


def test_equal_types_share_a_compiled_program(stack):
    traced = []
    f = jax.jit(lambda q: traced.append(q) or q.dequantize())
    for loss in ("mse", "mae"):
        f(ifjax.quantize(normal(5, 3, 8), IF4, amax_axes=(0,), loss=loss))
    assert len(traced) == 1


def test_vmap_maps_over_stacked_layers(stack):
    def layer(q):
        assert (q.shape, q.amax.shape) == ((3, 8), ())
        return q, q.dequantize()

    same, values = jax.vmap(layer)(stack)
    assert_same(same, stack)
    np.testing.assert_array_equal(values, stack.dequantize())


def test_vmap_of_quantize_stacks_layers(stack):
    x = normal(5, 3, 8) * jnp.arange(1, 6, dtype=jnp.float32)[:, None, None]
    assert_same(jax.vmap(lambda x: ifjax.quantize(x, IF4))(x), stack)


def test_scan_runs_over_layers(stack):
    def step(total, q):
        assert (q.shape, q.amax.shape) == ((3, 8), ())
        return total + q.dequantize(), q

    total, same = jax.jit(lambda q: jax.lax.scan(step, jnp.zeros((3, 8)), q))(stack)
    assert_same(same, stack)
    expected = np.zeros((3, 8), np.float32)
    for layer in np.asarray(stack.dequantize()):
        expected = expected + layer
    np.testing.assert_array_equal(total, expected)


def test_scan_can_carry_it():
    x = normal(3, 8)

    def step(q, _):
        return ifjax.quantize(-q.dequantize(), IF4), None

    carried, _ = jax.lax.scan(step, ifjax.quantize(x, IF4), length=2)
    once = ifjax.quantize(x, IF4)
    assert jax.tree.structure(carried) == jax.tree.structure(once)
    np.testing.assert_array_equal(
        carried.dequantize(),
        ifjax.quantize(-ifjax.quantize(-once.dequantize(), IF4).dequantize(), IF4).dequantize(),
    )


def test_gradients_flow_around_it(stack):
    q = stack[0]
    x = normal(2, 8)
    values = np.asarray(q.dequantize(), np.float64)
    expected = np.ones((2, 3)) @ values

    def product(x, q):
        return jnp.sum(x @ q.dequantize().T)

    gradients = {
        "closed over": jax.grad(lambda x: product(x, q))(x),
        "an argument": jax.jit(jax.grad(product))(x, q),
        "remat": jax.grad(jax.checkpoint(product))(x, q),
        "remat, closed over": jax.grad(jax.checkpoint(lambda x: product(x, q)))(x),
    }
    for name, gradient in gradients.items():
        # a sum of three products, rounded in float32
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_gradients_flow_past_a_scan_over_layers(stack):
    def network(x, q):
        def layer(x, w):
            return jnp.tanh(x @ w.dequantize().T @ w.dequantize()), None

        return jnp.sum(jax.lax.scan(jax.checkpoint(layer), x, q)[0])

    def dense(x, w):
        for layer in w:
            x = jnp.tanh(x @ layer.T @ layer)
        return jnp.sum(x)

    x = normal(2, 8) / 8
    expected = jax.grad(dense)(x, stack.dequantize())
    np.testing.assert_allclose(jax.grad(network)(x, stack), expected, rtol=1e-4, atol=1e-5)  # compiled apart


def test_no_gradient_flows_through_quantize():
    gradient = jax.grad(lambda x, a: jnp.sum(ifjax.quantize(x, IF4, amax=a).dequantize()), (0, 1))
    for part in gradient(normal(2, 8), jnp.float32(4)):
        np.testing.assert_array_equal(part, np.zeros_like(part))


@pytest.mark.by_default("if4")
@pytest.mark.parametrize("fmt", [IF4, "mxfp4", "nvint3"], ids=["if4", "mxfp4", "nvint3"])
def test_export_round_trips(fmt):
    pytest.importorskip("flatbuffers", reason="jax.export serializes with it")
    x = normal(2, 32)
    q = ifjax.quantize(x.astype(jnp.bfloat16), fmt)

    def function(q, x):
        return {"values": q.dequantize(), "q": ifjax.quantize(x, fmt)}

    exported = export.deserialize(export.export(jax.jit(function))(q, x).serialize())
    result = exported.call(q, x)
    np.testing.assert_array_equal(result["values"], q.dequantize())
    assert_same(result["q"], ifjax.quantize(x, fmt))


# --- every scale byte -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [IF4, MXFP4], ids=["e4m3", "e8m0"])
def test_all_scale_bytes_survive_bit_for_bit(fmt):
    """NaNs with either sign, negative zero, subnormals: the flag lives in bits that arithmetic may not keep."""
    settings = {} if fmt is MXFP4 else {"amax_axes": (0,)}
    q = with_every_scale_byte(ifjax.quantize(jnp.zeros((16, 4, 16)), fmt, **settings))
    np.testing.assert_array_equal(np.asarray(q.scales).ravel(), np.arange(256))

    @jax.jit
    def moved(q, always):
        _, scanned = jax.lax.scan(lambda carry, layer: (carry, layer), None, q)
        _, carried = jax.lax.scan(lambda carry, i: (q.take(i) if i is None else carry, q[i]), q, jnp.arange(16))
        return {
            "itself": q,
            "scan": scanned,
            "carry and index": carried,
            "vmap": jax.vmap(lambda layer: layer)(q),
            "vmap of an index": jax.vmap(lambda i: q[i])(jnp.arange(16)),
            "slice": q[::-1][::-1],
            "take": q.take(jnp.arange(16)),
            "take along another axis": q.take(jnp.arange(4), 1),
            "an index array": q[:, jnp.arange(4)],
            "remat": jax.checkpoint(lambda q: q)(q),
            "cond": jax.lax.cond(always, lambda q: q, lambda q: jax.tree.map(jnp.zeros_like, q), q),
        }

    for name, result in moved(q, True).items():
        np.testing.assert_array_equal(as_bytes(result.scales), as_bytes(q.scales), err_msg=name)
        assert_same(result, q)
    for i in (0, 7, 15):
        np.testing.assert_array_equal(as_bytes(q[i].scales), as_bytes(q.scales)[i])
        np.testing.assert_array_equal(as_bytes(q[:, i % 4].scales), as_bytes(q.scales)[:, i % 4])
    assert_same(pickle.loads(pickle.dumps(q)), q)
    assert_same(jax.device_put(q, jax.devices()[1]), q)


@pytest.mark.by_default("e8m0")
@pytest.mark.parametrize("fmt", [IF4, MXFP4], ids=["e4m3", "e8m0"])
def test_all_scale_bytes_survive_transposition(fmt):
    q = ifjax.quantize(jnp.zeros((64, 64)), fmt, block_2d=True)
    turn = jax.jit(lambda q: q.T)
    squares = np.arange(256, dtype=np.uint8).reshape(16, 16)
    q = q.replaced(scales=jnp.asarray(squares.repeat(4, 0)))
    np.testing.assert_array_equal(as_bytes(turn(q).scales), squares.T.repeat(4, 0))
    assert_same(turn(turn(q)), q)


# --- exchange ---------------------------------------------------------------------------------------------------------


@pytest.mark.by_default("nvfp4--1")
@pytest.mark.parametrize(("fmt", "axis"), [("nvfp4", -1), ("fouroversix_bs8", -1), ("mxfp4", -1), ("nvfp4_bs8", -2)])
def test_ml_dtypes_read_the_same_values(fmt, axis):
    x = normal(64, 32)
    q = ifjax.quantize(x, fmt, axis=axis)
    elements, scales, factor = ifjax.exchange.to_ml_dtypes(q)
    assert (elements.dtype, elements.shape) == (jnp.float4_e2m1fn, x.shape)
    np.testing.assert_array_equal(np.asarray(elements).view(np.uint8) & 15, q.unpacked_codes())
    np.testing.assert_array_equal(as_bytes(scales), q.scales)
    assert scales.dtype == (ml_dtypes.float8_e8m0fnu if fmt == "mxfp4" else ml_dtypes.float8_e4m3fn)
    # Exact in float64: element * scale * factor; what dequantize does in three roundings.
    wide = np.asarray(elements).astype(np.float64) * np.asarray(scales).astype(np.float64).repeat(q.fmt.block, axis)
    if fmt == "mxfp4":
        assert factor is None
        np.testing.assert_array_equal(wide, q.dequantize())
    else:
        largest = 6 * (256 if fmt == "fouroversix_bs8" else 448)
        assert factor == np.float32(q.amax) / np.float32(largest)
        np.testing.assert_allclose(wide * np.float64(factor), q.dequantize(), rtol=3 * 2.0**-24)


def test_ml_dtypes_elements_keep_the_padding_of_the_last_block():
    elements, scales, _ = ifjax.exchange.to_ml_dtypes(ifjax.quantize(normal(3, 5), NVFP4))
    assert (elements.shape, scales.shape) == ((3, 8), (3, 2))
    np.testing.assert_array_equal(np.asarray(elements).astype(np.float32)[:, 5:], 0)


def test_the_unbiased_range_is_part_of_the_exchanged_factor():
    q = ifjax.quantize(normal(2, 8), NVFP4, rounding="stochastic_unbiased", key=jax.random.key(0))
    assert ifjax.exchange.to_ml_dtypes(q)[2] == np.float32(q.amax) / np.float32(6 * 448 * (16 / 17))


@pytest.mark.parametrize("fmt", ["if4", "nvint4", "nvfp3", "nvfp6_e2m3", "mxfp6_e3m2", "if6"])
def test_other_elements_are_not_exchanged(fmt):
    with pytest.raises(ValueError, match="fouroversix or mxfp4"):
        ifjax.exchange.to_ml_dtypes(described((4,), fmt=fmt))


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_scaled_matmul_takes_the_exchanged_arrays(fmt):
    """By its shape and dtype rules; jax 0.10 lowers the primitive for GPUs only."""

    def product(a, b):
        a, a_scales, a_factor = ifjax.exchange.to_ml_dtypes(ifjax.quantize(a, fmt))
        b, b_scales, b_factor = ifjax.exchange.to_ml_dtypes(ifjax.quantize(b, fmt))
        y = jax.nn.scaled_matmul(a, b, a_scales, b_scales, preferred_element_type=jnp.float32)
        return y if a_factor is None else y * (a_factor * b_factor)

    a, b = normal(2, 128, 256), normal(2, 128, 256, seed=1)
    assert jax.eval_shape(product, a, b).shape == (2, 128, 128)
    if jax.default_backend() == "gpu":
        qs = [ifjax.quantize(x, fmt).dequantize() for x in (a, b)]
        expected = jnp.einsum("bmk,bnk->bmn", *qs, precision="highest")
        np.testing.assert_allclose(jax.jit(product)(a, b), expected, rtol=1e-4, atol=1e-4)  # another order of summation
