"""Smoothing and rotations of activations and weights: published vectors, and products that stay what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifjax
from ifjax.arrays.smoothing import awq_scales, smooth_scales
from ifjax.numerics.hadamard import hadamard
from ifjax.numerics.rotations import base_rotation, greedy_rotation


def test_published_vectors(golden_dir):
    with np.load(golden_dir / "frontier_rotation.npz") as data:
        for n in (4, 16, 32):
            np.testing.assert_allclose(base_rotation(n), data[f"base{n}"], atol=1e-12)
        x, w = data["x"], data["w"]
        found = greedy_rotation(x, 32, steps=64)
        np.testing.assert_allclose(found.rotation, data["rotation"], atol=1e-12)
        np.testing.assert_allclose(found.peaks, data["peaks"], rtol=1e-12)
        assert found.columns == tuple(data["ids"])
        for alpha, name in ((0.5, "smooth_05"), (0.6, "smooth_06")):
            np.testing.assert_allclose(smooth_scales(abs(x).max(0), abs(w).max(0), alpha), data[name], rtol=1e-5)
        awq = awq_scales(x, w.T, "nvfp4")
        np.testing.assert_allclose(awq.losses, data["awq_losses"], rtol=1e-4)
        assert awq.index == data["awq_index"]
        np.testing.assert_allclose(awq.scales, data["awq_scales"], rtol=1e-5)


def test_rotations_are_orthogonal_and_lower_outliers():
    for n in (2, 16, 32):
        base = base_rotation(n)
        np.testing.assert_allclose(base @ base.T, np.eye(n), atol=1e-12)
    rows = np.array(jax.random.normal(jax.random.key(0), (64, 64)))
    rows[:, 37] *= 40
    found = greedy_rotation(rows, 16)
    np.testing.assert_allclose(found.rotation @ found.rotation.T, np.eye(16), atol=1e-12)
    spread = np.abs(rows.reshape(-1, 16) @ found.rotation).max()
    assert spread < 0.35 * np.abs(rows).max() and found.peaks.min() == found.peaks[len(found.columns)]
    with pytest.raises(ValueError, match="no blocks of 16"):
        greedy_rotation(rows[:, :20], 16)
    with pytest.raises(ValueError, match="alpha"):
        smooth_scales(jnp.ones(4), jnp.ones(4), 1.5)


def test_awq_sees_the_product_as_it_will_run():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(32, 64)).astype(np.float32), rng.normal(size=(64, 32)).astype(np.float32)
    x[:, ::16] *= rng.random((32, 4)) < 0.06  # seldom used: a small mean, and large values
    x[:, ::16] *= 20
    weights_alone, whole = (awq_scales(x, w, "nvfp4", rotate=16, act_fmt=fmt) for fmt in (None, "nvfp4"))

    def error(scales):
        y, v = hadamard(x / scales[None]), hadamard(w * scales[:, None], axis=0)
        y, v = ifjax.fake_quantize(y, "nvfp4"), ifjax.fake_quantize(v, "nvfp4", axis=0)
        return float(((jnp.matmul(y, v, precision="highest") - x @ w) ** 2).mean())

    np.testing.assert_allclose(whole.losses[whole.index], error(whole.scales), rtol=1e-4)
    assert whole.index == whole.losses.argmin()
    assert error(whole.scales) < error(weights_alone.scales)
