"""The arrays of jax.nn.scaled_matmul."""

import jax
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import E2M1_VALUES, F8, assert_same, tensor
from numpy.testing import assert_array_equal

from ifjax import exchange

# With a factor that is a power of two, so that it and amax are one to one.
AMAX = {"nvfp4": 2.625, "fouroversix": 1.5, "mxfp4": None}


@pytest.mark.parametrize(
    "fmt, shape, axis",
    [("nvfp4", (4, 64), -1), ("fouroversix", (32, 6), -2), ("mxfp4", (2, 3, 64), -1), ("nvfp4", (2, 40, 3), 1)],
)
def test_ml_dtypes_there_and_back(fmt, shape, axis):
    q = tensor(fmt, shape, axis - len(shape) if axis > 0 else axis, amax=AMAX[fmt])
    arrays = exchange.to_ml_dtypes(q)
    back = exchange.from_ml_dtypes(*arrays, fmt=fmt, axis=axis, length=shape[axis])
    assert_same(back, q)


def test_ml_dtypes_from_numpy_and_under_jit():
    q = tensor("nvfp4", amax=np.array([2.625, 0.65625], np.float32), shape=(2, 5, 32))
    elements, scales, factor = exchange.to_ml_dtypes(q)
    assert_same(exchange.from_ml_dtypes(np.asarray(elements), np.asarray(scales), np.asarray(factor)), q)
    assert_same(jax.jit(exchange.from_ml_dtypes)(elements, scales, factor), q)


def test_ml_dtypes_keep_the_factor_to_the_last_bit():
    rng = np.random.default_rng(3)
    q = tensor("nvfp4", (300, 16), amax=rng.uniform(1, 2, 300).astype(np.float32))
    elements, scales, factor = exchange.to_ml_dtypes(q)
    assert_array_equal(exchange.to_ml_dtypes(exchange.from_ml_dtypes(elements, scales, factor))[2], factor)


def test_ml_dtypes_by_hand():
    """What jax.nn.scaled_matmul computes, sum of element * scale * factor, from a QTensor and into one."""
    elements = np.arange(16, dtype=np.uint8).reshape(1, 16).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    q = exchange.from_ml_dtypes(elements, np.full((1, 1), 1.5, F8), np.float32(2))
    assert_array_equal(q.dequantize(), E2M1_VALUES[None] * 3)
    assert q.fmt.name == "nvfp4" and q.amax == 5376
    q = exchange.from_ml_dtypes(elements, np.full((1, 1), 1.5, F8))
    assert_array_equal(q.dequantize(), E2M1_VALUES[None] * 1.5)


FP4 = np.zeros((2, 32), ml_dtypes.float4_e2m1fn)


@pytest.mark.parametrize(
    "arguments, settings, error, message",
    [
        ((np.zeros((2, 32), np.uint8), np.ones((2, 2), F8)), {}, TypeError, "float4_e2m1fn"),
        ((FP4, np.ones((2, 2), np.float32)), {}, TypeError, "float8_e4m3fn"),
        ((FP4, np.ones((2, 1), F8)), {}, ValueError, r"need scales \(2, 2\)"),
        ((FP4, np.ones((2, 2), F8)), {"axis": 0}, ValueError, "need scales"),
        ((FP4, np.ones((2, 2), F8)), {"axis": 2}, ValueError, "out of range"),
        ((FP4, np.ones((2, 2), F8)), {"length": 16}, ValueError, "length"),
        ((FP4, -np.ones((2, 2), F8)), {}, ValueError, "signs"),
        ((FP4, np.ones((2, 2), F8)), {"fmt": "if4"}, ValueError, "not made of"),
        ((FP4, np.ones((2, 2), F8)), {"fmt": "mxfp4"}, ValueError, "not made of"),
        ((FP4, np.ones((2, 1), ml_dtypes.float8_e8m0fnu), np.float32(1)), {}, ValueError, "leave factor out"),
    ],
)
def test_other_ml_dtypes_are_refused(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        exchange.from_ml_dtypes(*arguments, **settings)
