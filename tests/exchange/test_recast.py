"""MXFP4 as NVFP4: the same codes, the same values, or a sentence."""

import jax.numpy as jnp
import numpy as np
import pytest
from exchange_cases import tensor
from numpy.testing import assert_array_equal

import ifjax
from ifjax.exchange import recast


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("low", [3, 100, 230])
def test_all_codes_in_the_whole_window_keep_their_values(low, axis):
    scales = low + np.arange(18)
    q = tensor("mxfp4", (18, 512), scales=scales[:, None])
    q = q.replaced(codes=jnp.asarray(np.tile(np.arange(256, dtype=np.uint8), (18, 1))))
    if axis == -2:
        q = q.replaced(codes=q.codes.T, scales=q.scales.T, axis=-2)
    new = recast(q)
    assert (new.fmt.name, new.shape, new.axis) == ("nvfp4", q.shape, axis)
    assert_array_equal(new.codes, q.codes)
    assert_array_equal(new.dequantize(), q.dequantize())
    # Powers of two: exponents 7 to 1 of E4M3, and its subnormals 1, 2 and 4.
    assert set(np.unique(new.scales)) == {*(8 * e for e in range(1, 16)), 1, 2, 4}


def test_a_block_below_the_window_is_told_unless_it_is_zero():
    scales = np.array([[100, 118], [118, 118]])
    q = tensor("mxfp4", (2, 64), scales=scales)
    with pytest.raises(ValueError, match=r"1 of 4 blocks have a scale more than 2\^17 below the largest"):
        recast(q)
    codes = np.array(q.codes)
    codes[0, :16] = 0x80
    q = q.replaced(codes=jnp.asarray(codes))
    assert_array_equal(recast(q).dequantize(), q.dequantize())
    assert_array_equal(np.asarray(recast(q).scales)[0, :2], [0, 0])


def test_matrices_of_a_stack_share_the_factor_if_they_can():
    near = tensor("mxfp4", (3, 2, 64), scales=np.array([120, 121, 130])[:, None, None])
    assert recast(near).amax.shape == ()
    far = tensor("mxfp4", (3, 2, 64), scales=np.array([60, 121, 180])[:, None, None])
    assert recast(far).amax.shape == (3,)
    for q in (near, far):
        assert_array_equal(recast(q).dequantize(), q.dequantize())


def test_a_last_block_that_is_not_full():
    q = ifjax.quantize(jnp.arange(80.0).reshape(2, 40), "mxfp4")
    new = recast(q)
    assert new.scales.shape == (2, 3) and new.codes.shape == (2, 24)
    assert_array_equal(new.dequantize(), q.dequantize())


def test_zeros_and_extremes():
    zeros = ifjax.quantize(jnp.zeros((2, 32)), "mxfp4")
    assert not np.asarray(recast(zeros).dequantize()).any()
    with pytest.raises(ValueError, match="no normal float32"):
        recast(tensor("mxfp4", (2, 32), scales=254))


@pytest.mark.parametrize("source, target", [("nvfp4", "mxfp4"), ("mxfp4", "if4"), ("mxfp3", "nvfp4"), ("if4", "nvfp4")])
def test_other_formats_are_refused(source, target):
    with pytest.raises(ValueError, match=f"{source} cannot be recast to {target} code for code"):
        recast(tensor(source, (2, 64)), target)
