"""A statistic that has seen no values is refused, or told, wherever one enters: others would be zeros or NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ifjax
from ifjax.exchange import from_ml_dtypes, to_ml_dtypes

X = np.random.default_rng(0).standard_normal((4, 32), np.float32)
NONE = [0.0, 1e-42, 1e300, np.nan, np.inf, -1.0]  # 1e-42 is flushed to zero, and 1e300 is infinite in float32


@pytest.mark.by_default("0.0", "1e-42")
@pytest.mark.parametrize("value", NONE)
def test_calibrated_and_fixed_maxima(value):
    rule = ifjax.Rule("w", "mxfp4", act_fmt="nvfp4", act_amax="static")
    params = {"w": X.T}

    def by(calibration):
        return ifjax.quantized(lambda p, x: x @ p["w"], rule, calibration=calibration)(params, X)

    with pytest.warns(UserWarning, match="the calibrated amax of 'w' is .* inputs at hand is used"):
        got = by(ifjax.Calibration({"w": value}, {}, {}))
    np.testing.assert_array_equal(got, by(ifjax.Calibration({"w": float(abs(X).max())}, {}, {})))
    with pytest.raises(ValueError, match="amax must be a finite number > 0"):
        ifjax.recipes.Operand("nvfp4", amax=value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_maxima_of_ms_eden_and_factors_that_cannot_be(value):
    with pytest.raises(ValueError, match="amax must be finite and not negative"):
        ifjax.ms_eden(X, key=jax.random.key(0), amax=value)
    elements, scales, _ = to_ml_dtypes(ifjax.quantize(X, "nvfp4"))
    with pytest.raises(ValueError, match="factor must be finite and not negative"):
        from_ml_dtypes(elements, scales, value)


def test_zero_stands_for_the_one_at_hand_or_is_refused():
    key = jax.random.key(0)
    np.testing.assert_array_equal(ifjax.ms_eden(X, key=key, amax=0.0), ifjax.ms_eden(X, key=key))
    elements, scales, _ = to_ml_dtypes(ifjax.quantize(X, "nvfp4"))
    with pytest.raises(ValueError, match="factor is 0 where scales are not"):
        from_ml_dtypes(elements, scales, 0.0)
    zeros = from_ml_dtypes(elements, jnp.zeros_like(scales), 0.0)  # of zeros it is their own
    np.testing.assert_array_equal(zeros.dequantize(), 0)
