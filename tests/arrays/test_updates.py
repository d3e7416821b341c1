"""Writing into QTensors, cutting, joining and rearranging them: bytes equal to those of the whole array, quantized."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import normal

import ifjax

FORMATS = ["nvfp4", pytest.param("if3", marks=pytest.mark.slow), "mxfp4"]
SHAPE = (2, 6, 3, 64)  # batch, tokens, heads, head size


def values(shape, seed=0):
    return normal(*shape, seed=seed) * np.exp(normal(*shape, seed=seed + 9))


def own_axes(fmt, axes=(0, 1, 2)):
    return axes if ifjax.get_format(fmt).has_tensor_scale else ()


def packed(x, fmt="nvfp4", axes=(0, 1, 2), **how):
    return ifjax.quantize(x, fmt, amax_axes=own_axes(fmt, axes), **how)


def assert_same(one, two):
    assert one.blocking == two.blocking and one.shape == two.shape
    for name in ("codes", "scales", "amax"):
        a, b = getattr(one, name), getattr(two, name)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(a, b, strict=True, err_msg=name)


@pytest.mark.by_default("mxfp4")
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_cache_written_token_by_token_is_the_whole_quantized(fmt):
    x = values(SHAPE)
    write = jax.jit(lambda q, x, at: ifjax.dynamic_update_slice(q, x, (0, at, 0, 0)))
    set_at = jax.jit(lambda q, x, at: q.at[:, at].set(x))
    one = two = packed(jnp.zeros(SHAPE), fmt)
    for t in range(SHAPE[1]):
        one, two = write(one, x[:, t : t + 1], jnp.int32(t)), set_at(two, x[:, t], jnp.int32(t))
    assert_same(one, packed(x, fmt))
    assert_same(two, packed(x, fmt))
    _, scanned = jax.lax.scan(lambda q, xs: (set_at(q, *xs), None), one, (x.swapaxes(0, 1) * 2, jnp.arange(6)))[::-1]
    assert_same(scanned, packed(x * 2, fmt))


@pytest.mark.by_default("index0")
@pytest.mark.parametrize(
    "index",
    [
        (slice(None), 2), (1, 2), (slice(None), slice(1, 4)), (1, slice(1, 5, 2), 0), (..., 1, slice(None)),
        (np.array([0, 1]), np.array([3, 5])), (slice(None), np.array([[0, 2], [5, 1]])), (-1, -1, -1), (),
    ],
)  # fmt: skip
def test_set_writes_where_arrays_do(index):
    x = values(SHAPE)
    new = values(x[index].shape, 5)
    assert_same(packed(x).at[index].set(new), packed(x.at[index].set(new)))
    token = packed(x, axes=(1,))  # all of the batch and its heads share a token's amax
    if index and isinstance(index[0], slice) and len(index) == 2:
        assert_same(token.at[index].set(new), packed(x.at[index].set(new), axes=(1,)))
    assert_same(packed(x).at[index].set(new[..., :1]), packed(x.at[index].set(new[..., :1])))


def test_what_is_out_of_range_is_dropped_or_moved_as_by_jax():
    x = values(SHAPE)
    assert_same(packed(x).at[:, jnp.array([9])].set(1.0), packed(x))
    assert_same(ifjax.dynamic_update_slice(packed(x), jnp.ones((2, 2, 3, 64)), (0, 9, 0, 0)),
                packed(jax.lax.dynamic_update_slice(x, jnp.ones((2, 2, 3, 64)), (0, 9, 0, 0))))  # fmt: skip


@pytest.mark.slow
def test_an_amax_that_entries_share_is_kept_only_if_asked():
    x = values(SHAPE)
    whole, heads = ifjax.quantize(x, "nvfp4"), packed(x, axes=(0, 2)).transpose(0, 2, 1, 3)
    assert heads.amax.shape == (2, 3)
    for update in (lambda q, **how: q.at[:, 1].set(1.0, **how),
                   lambda q, **how: ifjax.dynamic_update_slice(q, jnp.ones((2, 1, 3, 64)), (0, 1, 0, 0), **how)):
        with pytest.raises(ValueError, match=r"amax_axes=\(0, 1, 2\), or keep one that was fixed for all, keep_amax"):
            update(whole)
    fixed = ifjax.quantize(jnp.zeros(SHAPE), "nvfp4", amax=8.0)
    kept = fixed.at[:, 1].set(x[:, 1], keep_amax=True)
    expected = ifjax.quantize(jnp.zeros(SHAPE).at[:, 1].set(x[:, 1]), "nvfp4", amax=8.0)
    assert_same(kept, expected)
    assert_same(ifjax.dynamic_update_slice(fixed, x[:, 1:2], (0, 1, 0, 0), keep_amax=True), expected)
    amax = jnp.arange(1.0, 7).reshape(2, 3)
    per_head = ifjax.quantize(jnp.zeros((2, 3, 6, 64)), "nvfp4", amax=amax, amax_axes=(0, 1))
    new = x[:, 1]
    after = ifjax.quantize(jnp.zeros((2, 3, 6, 64)).at[:, :, 4].set(new), "nvfp4", amax=amax, amax_axes=(0, 1))
    assert_same(per_head.at[:, :, 4].set(new, keep_amax=True), after)
    assert_same(ifjax.dynamic_update_slice(per_head, new[:, :, None], (0, 0, 4, 0), keep_amax=True), after)
    with pytest.raises(ValueError, match="amax of 0"):
        ifjax.quantize(jnp.zeros((4, 64))).at[1].set(1.0, keep_amax=True)
    with pytest.raises(ValueError, match="no tensor scale, so keep_amax"):
        packed(x, "mxfp4").at[:, 1].set(1.0, keep_amax=True)
    # Written as a whole it may change.
    assert_same(whole.at[...].set(x * 3), ifjax.quantize(x * 3, "nvfp4"))


@pytest.mark.slow
def test_along_blocks_whole_blocks_are_written_and_cut():
    x = values((3, 72))
    q = ifjax.quantize(x, "mxfp4")
    new = values((2, 32), 3)
    assert_same(ifjax.dynamic_update_slice(q, new, (1, 32)),
                ifjax.quantize(jax.lax.dynamic_update_slice(x, new, (1, 32)), "mxfp4"))
    assert_same(ifjax.dynamic_slice(q, (1, 32), (2, 40)), ifjax.quantize(x[1:, 32:], "mxfp4"))
    fixed = ifjax.quantize(x, "nvfp4", amax=30.0)
    assert_same(ifjax.dynamic_update_slice(fixed, new, (0, 16), keep_amax=True),
                ifjax.quantize(jax.lax.dynamic_update_slice(x, new, (0, 16)), "nvfp4", amax=30.0))
    with pytest.raises(ValueError, match="begin or end inside a block of mxfp4: they need multiples of 32"):
        ifjax.dynamic_update_slice(q, new, (0, 16))
    with pytest.raises(ValueError, match="inside a block"):
        ifjax.dynamic_slice(q, (0, 0), (3, 20))
    with pytest.raises(ValueError, match="known while tracing"):
        jax.jit(lambda at: ifjax.dynamic_slice(q, (0, at), (3, 32)))(0)
    with pytest.raises(ValueError, match="blocked"):
        q.at[:, 3].set(1.0)
    square = ifjax.quantize(values((3, 32, 48)), "nvfp4", block_2d=True, amax_axes=(0,))
    assert_same(square.at[1].set(jnp.ones((32, 48))),
                ifjax.quantize(values((3, 32, 48)).at[1].set(1.0), "nvfp4", block_2d=True, amax_axes=(0,)))


def test_values_of_other_kinds_are_refused():
    q = packed(values(SHAPE))
    with pytest.raises(ValueError, match="does not fit"):
        ifjax.dynamic_update_slice(q, jnp.ones((2, 7, 3, 64)), (0, 0, 0, 0))
    with pytest.raises(TypeError, match="floats"):
        q.at[:, 1].set(jnp.ones((2, 3, 64), jnp.int32))
    with pytest.raises(IndexError, match="next to each other"):
        q.at[np.array([0]), :, np.array([1])].set(1.0)
    with pytest.raises(IndexError, match="out of range"):
        q.at[2].set(1.0)
    with pytest.raises(ValueError, match="pass the rounding"):
        packed(values((4, 64)), axes=(0,), rounding="stochastic_unbiased", key=jax.random.key(0)).at[1].set(1.0)
    with pytest.raises(ValueError, match="packed otherwise"):
        ifjax.dynamic_update_slice(q, ifjax.quantize(jnp.ones((2, 1, 3, 64))), (0, 0, 0, 0))
    x = values((2, 1, 3, 64))
    assert_same(ifjax.dynamic_update_slice(q, packed(x), (0, 2, 0, 0)), ifjax.dynamic_update_slice(q, x, (0, 2, 0, 0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fmt, axes", [("nvfp4", (0, 1)), ("mxfp4", ()), ("nvfp4", (0, 1, 2)), ("nvfp4", (1,)), ("if3", (0, 2))]
)
def test_slices_and_joins_decode_to_those_of_the_values(fmt, axes):
    x, y = values(SHAPE), values(SHAPE, 3)
    p, q = packed(x, fmt, axes), packed(y, fmt, axes)
    a, b = p.dequantize(), q.dequantize()
    same = functools.partial(np.testing.assert_array_equal, strict=True)
    cut = jax.jit(lambda q, at: ifjax.dynamic_slice(q, (0, at, 1, 0), (2, 3, 2, 64)))(p, 2)
    same(cut.dequantize(), a[:, 2:5, 1:])
    for axis in (0, 1, -2):
        same(ifjax.concatenate([p, q, p], axis).dequantize(), jnp.concatenate([a, b, a], axis))
    for axis in (0, 2, 3, 4):
        stacked = ifjax.stack([p, q], axis)
        same(stacked.dequantize(), jnp.stack([a, b], axis))
    for order in ((1, 0, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2), (0, 2, 3, 1)):
        moved = p.transpose(order)
        same(moved.dequantize(), a.transpose(order))
        same(moved.transpose(np.argsort(order).tolist()).dequantize(), a)
    same(p.swapaxes(1, -2).dequantize(), a.swapaxes(1, -2))
    same(p.moveaxis(0, 2).dequantize(), jnp.moveaxis(a, 0, 2))
    for shape in ((12, 3, 64), (36, 64), (2, 18, 64), (2, 2, 3, 3, 64), (2, -1, 1, 64), (4, 9, 64)):
        same(p.reshape(shape).dequantize(), a.reshape(shape))
    same(p.transpose(0, 3, 1, 2).reshape(2, 64, 18).dequantize(), a.transpose(0, 3, 1, 2).reshape(2, 64, 18))


def test_joins_and_rearrangements_that_cannot_be_are_refused():
    q = packed(values(SHAPE))
    with pytest.raises(ValueError, match="blocked"):
        ifjax.concatenate([q, q], -1)
    with pytest.raises(ValueError, match="differ in format"):
        ifjax.concatenate([q, packed(values(SHAPE), "mxfp4")])
    with pytest.raises(TypeError, match="joins QTensors"):
        ifjax.stack([q, values(SHAPE)])
    with pytest.raises(ValueError, match="differ along other axes"):
        ifjax.concatenate([q, q[:, :2]], 0)
    with pytest.raises(ValueError, match="one QTensor at least"):
        ifjax.stack([])
    with pytest.raises(ValueError, match="tears or joins"):
        q.reshape(2, 6, 192)
    with pytest.raises(ValueError, match="values of shape"):
        q.reshape(5, 64)
    with pytest.raises(ValueError, match="once"):
        q.transpose(0, 0, 1, 2)
    with pytest.raises(ValueError, match="squares"):
        ifjax.quantize(jnp.ones((2, 16, 16)), block_2d=True).transpose(0, 2, 1)
