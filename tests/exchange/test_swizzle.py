"""The 128x4 layout puts every scale where the formula says, and gives it back."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from ifjax.exchange.swizzle import swizzle_scales, unswizzle_scales


def padded_shape(rows, columns):
    return -(-rows // 128) * 128, -(-columns // 4) * 4


def offsets(rows, columns):
    """Where the scale at (r, c) goes, by the published formula."""
    r, c = np.mgrid[:rows, :columns]
    wide = padded_shape(rows, columns)[1]
    return ((r // 128) * (wide // 4) + c // 4) * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4


def numbered(*shape, dtype=np.int32):
    return np.arange(1, np.prod(shape, dtype=int) + 1, dtype=dtype).reshape(shape)


# --- against the reference


@pytest.fixture(scope="module")
def golden(golden_dir):
    return np.load(golden_dir / "layout.npz")


@pytest.mark.parametrize("kind", ["index", "scales"])
def test_the_order_is_the_references(golden, kind):
    linear, swizzled = golden[f"swizzle_{kind}_linear"], golden[f"swizzle_{kind}_swizzled"]
    assert_array_equal(swizzle_scales(linear), swizzled)
    assert_array_equal(unswizzle_scales(swizzled, *linear.shape), linear)


@pytest.mark.parametrize("name, block", [("nvfp4_mse", 16), ("mxfp4_static_6", 32)])
def test_a_padded_tensor_of_the_reference_is_ours(golden, name, block):
    flat = golden[f"pad_{name}__scales_flat"]
    rows, columns = golden["pad_x_bf16bits"].shape
    scales = unswizzle_scales(flat, rows, -(-columns // block))
    assert scales.dtype == np.uint8 and (scales != 0).all()
    # The reference pads the tensor first, so that its padding is zero scales, as ours is.
    assert_array_equal(swizzle_scales(scales), flat)


# --- the formula


@jax.jit  # one compilation for each shape, not one for each operation
def there_and_back(scales):
    flat = swizzle_scales(scales)
    return flat, unswizzle_scales(flat, *scales.shape)


@given(st.integers(0, 300), st.integers(0, 14))
def test_every_scale_lies_at_its_offset_and_the_rest_is_zero(rows, columns):
    scales = numbered(rows, columns)
    expected = np.zeros(np.prod(padded_shape(rows, columns)), np.int32)
    expected[offsets(rows, columns)] = scales
    flat, back = there_and_back(scales)
    assert_array_equal(flat, expected)
    assert_array_equal(back, scales)


@pytest.mark.by_default("batch0-129-5", "batch1-1-1", "batch2-5-0", "batch0-0-7", "batch1-256-8")
@pytest.mark.parametrize("rows, columns", [(1, 1), (129, 5), (256, 8), (0, 0), (0, 7), (5, 0)])
@pytest.mark.parametrize("batch", [(3,), (2, 1, 3), (0,)])
def test_batches_are_swizzled_matrix_by_matrix(batch, rows, columns):
    scales = numbered(*batch, rows, columns)
    flat = swizzle_scales(scales)
    assert flat.shape == (*batch, np.prod(padded_shape(rows, columns)))
    for index in np.ndindex(batch):
        assert_array_equal(np.asarray(flat)[index], swizzle_scales(scales[index]))
    assert_array_equal(unswizzle_scales(flat, rows, columns), scales)


@pytest.mark.parametrize(
    "dtype",
    [np.uint8, np.int8, np.bool_, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, np.uint16, np.float32],
)
def test_any_dtype_keeps_its_bits_and_pads_with_zero_bytes(dtype):
    size = np.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    scales = rng.integers(0, 2 if dtype is np.bool_ else 256, (100, 7 * size), np.uint8).view(dtype)
    flat = swizzle_scales(scales)
    assert flat.dtype == dtype
    expected = np.zeros((1024, size), np.uint8)
    expected[offsets(100, 7)] = scales.view(np.uint8).reshape(100, 7, size)
    assert_array_equal(np.asarray(flat).view(np.uint8).reshape(1024, size), expected)
    assert_array_equal(np.asarray(unswizzle_scales(flat, 100, 7)).view(np.uint8), scales.view(np.uint8))


# --- transformations


def test_jit_and_vmap_change_nothing():
    scales = numbered(3, 130, 6)
    flat = swizzle_scales(scales)
    assert_array_equal(jax.jit(swizzle_scales)(scales), flat)
    assert_array_equal(jax.vmap(swizzle_scales)(scales), flat)
    back = jax.jit(unswizzle_scales, static_argnums=(1, 2))
    assert_array_equal(back(flat, 130, 6), scales)
    assert_array_equal(jax.vmap(lambda f: unswizzle_scales(f, 130, 6))(flat), scales)


@pytest.mark.parametrize("convert", [swizzle_scales, lambda s: unswizzle_scales(s.reshape(2, -1), 100, 8)])
def test_nothing_is_gathered(convert):
    text = str(jax.make_jaxpr(convert)(jnp.zeros((2, 128, 8), jnp.uint8)))
    assert "gather" not in text and "scatter" not in text


# --- errors


@pytest.mark.parametrize("shape", [(), (128,)])
def test_scales_without_rows_and_columns_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[\.\.\., rows, columns\]"):
        swizzle_scales(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("shape", [(), (511,), (800,), (2, 2048), (512, 1)])
def test_a_wrong_length_is_refused(shape):
    with pytest.raises(ValueError, match="100 x 8 scales in whole tiles of 128 x 4 take 1024 values, got"):
        unswizzle_scales(np.zeros(shape, np.uint8), 100, 8)


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="must not be negative, got -1 and -4"):
        unswizzle_scales(np.zeros(512, np.uint8), -1, -4)
