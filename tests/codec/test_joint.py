"""The joint scale: amax and block scales fitted to each other. What it gives, beside the vectors of SOAR."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ifjax
from ifjax.codec import Encoding, Search
from ifjax.convert import quantize_file

ONE_ROUND = Search("one round", (0,), rounds=1)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def block_errors(x, q):
    error = np.square(np.asarray(q.dequantize(), np.float64) - x)
    return error.reshape(*x.shape[:-1], -1, q.fmt.block).sum(-1)


def assert_same(a, b):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert_array_equal(left, right)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["if4", "quad", "nvfp4", "razer", "if3"])
def test_no_tensor_errs_more_and_no_block_errs_more_by_what_is_tried_after(fmt):
    x = normal(16, 256) * np.exp(normal(16, 1, seed=1))
    x[3] = 0
    plain, joint = (ifjax.quantize(x, fmt, search=search) for search in (None, "joint"))
    searched = ifjax.quantize(x, fmt, search=Search("then", (0, -1, 1), rounds=15))
    assert block_errors(x, joint).sum() < 0.99 * block_errors(x, plain).sum()
    assert_array_equal(searched.amax, joint.amax)
    assert (block_errors(x, searched) <= block_errors(x, joint) * (1 + 1e-5)).all()
    assert not np.asarray(searched.dequantize())[3].any()


@pytest.mark.slow
def test_each_member_has_rounds_of_its_own():
    """Of tensors that need other numbers of rounds; mapped, with an amax each, jitted and alone."""
    x = np.stack([normal(8, 64), normal(8, 64, seed=1) ** 3 * 1000, np.zeros((8, 64), np.float32)])
    alone = [ifjax.quantize(member, "nvfp4", search="joint") for member in x]
    together = ifjax.quantize(x, "nvfp4", search="joint", amax_axes=(0,))
    assert_array_equal(together.amax, [q.amax for q in alone])
    for i, q in enumerate(alone):
        assert_array_equal(together.codes[i], q.codes)
        assert_array_equal(together.scales[i], q.scales)
    assert_same(jax.vmap(lambda x: ifjax.quantize(x, "nvfp4", search="joint"))(x), together)
    assert_same(jax.jit(lambda x: ifjax.quantize(x, "nvfp4", search="joint", amax_axes=(0,)))(x), together)


@pytest.mark.slow
def test_a_power_of_two_changes_nothing_and_a_nan_spoils_its_own_block():
    x = normal(8, 64)
    q, moved = (ifjax.quantize(a, "nvfp4", search="joint") for a in (x, x * np.float32(2.0**-90)))
    assert_array_equal(moved.codes, q.codes)
    assert_array_equal(moved.scales, q.scales)
    assert_array_equal(moved.amax, q.amax * np.float32(2.0**-90))
    spoiled, without = x.copy(), x.copy()
    spoiled[2, 5], without[2, :16] = np.nan, 0
    got, want = (np.array(ifjax.quantize(a, "nvfp4", search="joint").dequantize()) for a in (spoiled, without))
    assert np.isnan(got[2, :16]).all()
    got[2, :16] = 0
    assert_array_equal(got, want)


@pytest.mark.slow
def test_weights_of_errors_are_those_of_the_tensor():
    """Blocks that count a thousand times as much decide amax: their error shrinks."""
    x, weights = normal(64, 32), np.ones(32, np.float32)
    weights[16:] = 1000
    plain, weighed = (ifjax.quantize(x, "nvfp4", search="joint", **w) for w in ({}, {"weights": weights}))
    (_, before), (_, after) = (block_errors(x, q).sum(0) for q in (plain, weighed))
    assert after < before
    alone = ifjax.quantize(x[:, 16:], "nvfp4", search="joint")
    assert float(alone.amax) == pytest.approx(float(weighed.amax), rel=0.01)


@pytest.mark.slow
def test_gptq_starts_from_the_joint_scale():
    w = normal(64, 12)
    q = ifjax.gptq(w, np.eye(64, dtype=np.float32), "nvfp4", search=ONE_ROUND)
    assert_same(q, ifjax.quantize(w, "nvfp4", axis=-2, search=ONE_ROUND))


def test_what_it_does_not_go_with_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'soar' fits the tensor's scale, and mxfp4 has none: use another search"):
        Encoding.of("mxfp4", search="soar")
    with pytest.raises(ValueError, match="'soar' fits amax to the values at hand: leave amax= out"):
        ifjax.quantize(jnp.ones((2, 16)), search="soar", amax=1.0)
    for rounds in (-1, 1.5, True):
        with pytest.raises(ValueError, match="rounds must be an integer >= 0"):
            Search("mine", (0,), rounds=rounds)
    with pytest.raises(ValueError, match="'soar' sums over 1-D blocks: leave block_2d out"):
        Encoding.of("if4", search="soar", block_2d=True)
    ifjax.save_file({"w": jnp.ones((16, 16))}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="'soar' fits a tensor's amax to all of it, and files are quantized in pieces"):
        quantize_file(tmp_path / "w.safetensors", tmp_path / "q.safetensors", (ifjax.Rule(".*", search="soar"),))
