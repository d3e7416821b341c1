"""The Hopper matmul's tables of sixteen values: a lane's instructions, emulated for all codes under all scale bytes."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_gpu_matmul import decode_unit

import ifjax
from ifjax.products.backends import decoding_of
from pallas_kernels import gpu_matmul


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["quad", "split87", "nf4", "octet", "sfp4"])
def test_every_code_with_every_scale_byte_is_decoded(name, dtype):
    """A value is rounded to the type, and its product with the scale once more; NaN bytes make NaN of all 16 codes."""
    fmt = ifjax.get_format(name)
    decoding = decoding_of(fmt)
    assert gpu_matmul.supports(decoding, dtype) is None
    scales = np.arange(8 * 256, dtype=np.uint32).astype(np.uint8).reshape(128, 16)
    nibbles = (np.arange(16) + np.arange(8 * 256)[:, None] // 256 * 3) % 16  # all codes in each block, in eight orders
    nibbles = nibbles.astype(np.uint8).reshape(128, 256)
    words, scale_words = gpu_matmul.pack(jnp.asarray(nibbles), jnp.asarray(scales), decoding)
    decoded = np.block([[decode_unit(words[i, j], scale_words[i, j], decoding, dtype) for j in (0, 1)] for i in (0, 1)])

    rows, byte = np.float32(decoding.values), np.repeat(scales, 16, axis=1).astype(int)
    scale = np.asarray(fmt.scale.decode(jnp.asarray(byte & 2**decoding.bits - 1)), np.float64)
    values = rows[np.minimum(byte >> decoding.bits, len(rows) - 1), nibbles].astype(dtype).astype(np.float64)
    wanted = (values * scale).astype(np.float32).astype(dtype)
    written = byte >> decoding.bits < len(rows)  # of three modes the fourth is none
    np.testing.assert_array_equal(decoded[written].astype(np.float64), wanted[written].astype(np.float64))
    assert np.isnan(decoded).any() == (decoding.nan is not None)
    exact = gpu_matmul.reference(jnp.eye(256, dtype=jnp.float32), nibbles, scales, jnp.float32(1), decoding).T
    kept = ~np.isnan(scale).any(1) & written.all(1)
    formula = rows[np.minimum(byte >> decoding.bits, len(rows) - 1), nibbles] * scale
    np.testing.assert_allclose(np.asarray(exact)[kept], formula[kept], rtol=1e-6)


def test_what_float16_cannot_hold_is_refused():
    assert "at most E4M3" in gpu_matmul.supports(decoding_of(ifjax.get_format("nvfp4_ue5m3")), jnp.float16)
