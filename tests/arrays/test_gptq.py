"""gptq against the published recursion in float64, against quantize, and at its edges."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ifjax
from ifjax import FORMATS, codec

IF4_BS4 = dataclasses.replace(FORMATS["if4"], name="if4_bs4", block=4)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def correlated(rows, k, seed=1):
    """Inputs [rows, k], most of whose variance lies in k / 3 directions, and of different sizes."""
    x = random(rows, k // 3, seed=seed) @ random(k // 3, k, seed=seed + 1) + 0.3 * random(rows, k, seed=seed + 2)
    return x * np.linspace(0.5, 2, k, dtype=np.float32)[np.random.default_rng(seed).permutation(k)]


def product_error(x, w, q):
    return np.linalg.norm(x @ (np.asarray(w) - np.asarray(q.dequantize())))


def assert_same_bytes(a, b):
    assert (a.fmt, a.shape, a.dtype, a.axis) == (b.fmt, b.shape, b.dtype, b.axis)
    assert_array_equal(a.codes, b.codes)
    assert_array_equal(a.scales, b.scales)
    if b.amax is not None:
        assert_array_equal(a.amax, b.amax)


# --- against quantize ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "search", "loss"),
    [("if4_bs8", None, "mae"),
     *(pytest.param(*case, marks=pytest.mark.slow) for case in (
         ("if4_bs8", None, None), ("if4_bs8", "fast", None), ("fouroversix", None, None), ("mxfp4", None, None)
     ))],
)  # fmt: skip
def test_inputs_without_correlation_give_what_quantize_gives(fmt, search, loss):
    w = random(40, 6) * np.exp(random(40, 6, seed=1))
    w[3, 0], w[:, 1] = -0.0, 0  # a signed zero; a column without anything
    q = ifjax.gptq(w, 0.37 * np.eye(40, dtype=np.float32), fmt, search=search, loss=loss)
    assert_same_bytes(q, ifjax.quantize(w, fmt, axis=-2, search=search, loss=loss))


@pytest.mark.slow
def test_inputs_that_never_fire_give_what_quantize_gives():
    w = random(12, 4)
    assert_same_bytes(ifjax.gptq(w, np.zeros((12, 12)), IF4_BS4), ifjax.quantize(w, IF4_BS4, axis=-2))


@pytest.mark.slow
def test_products_of_correlated_inputs_err_less_with_feedback_with_the_loss_of_products_and_with_search():
    w, x = random(40, 6), correlated(200, 40)
    plain, by_values, by_products, searched = (
        product_error(x, w, q)
        for q in [
            ifjax.quantize(w, "if4_bs8", axis=-2),
            ifjax.gptq(w, x.T @ x, "if4_bs8", loss="mae"),
            ifjax.gptq(w, x.T @ x, "if4_bs8"),
            ifjax.gptq(w, x.T @ x, "if4_bs8", search="fast"),
        ]
    )
    assert searched < 0.95 * by_products < 0.9 * by_values < 0.6 * plain


# --- against the published recursion ---------------------------------------------------------------------------------


def published(w, hessian, fmt, damping, choose):
    """GPTQ in float64 with a Cholesky factor of the inverse, one column of w at a time: values and losses of blocks.

    `choose(losses)` picks one of all scale bytes and decodings of a block, by the error that they lead to.
    """
    k, columns = w.shape
    block, m = fmt.block, k // fmt.block
    order = np.argsort(-np.diagonal(hessian).reshape(m, block).sum(1), kind="stable")
    rows = (order[:, None] * block + np.arange(block)).ravel()
    w, h = w.astype(np.float64)[rows], hessian.astype(np.float64)[rows][:, rows]
    h += damping * np.mean(np.diagonal(h)) * np.eye(k)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    table = decoded_values(fmt, np.abs(w).max())
    q, losses = np.zeros_like(w), np.zeros((m, columns))
    for at in range(m):
        for n in range(columns):
            mine = np.arange(at * block, at * block + block)
            x = np.repeat(w[None, mine, n], len(table), 0)  # each scale byte and decoding has a copy
            values, terms = np.zeros_like(x), np.zeros_like(x)
            for i, row in enumerate(mine):
                values[:, i] = nearest(x[:, i], table)
                e = (x[:, i] - values[:, i]) / u[row, row]
                terms[:, i] = e**2
                x[:, i:] -= e[:, None] * u[row, mine[i:]][None]
            best = choose(terms.sum(1), at, n)
            q[mine, n], losses[at, n] = values[best], terms[best].sum()
            for row in mine:
                e = (w[row, n] - q[row, n]) / u[row, row]
                w[row:, n] -= e * u[row, row:]
    undone = np.argsort(rows)
    return q[undone], losses, h[undone][:, undone]


def decoded_values(fmt, amax):
    """float64 [decodings * scale bytes, codes]: all that a block can hold."""
    tables = []
    payloads = np.arange(1, fmt.scale.top + 1, dtype=np.int32)[:, None]
    for selector, decoding in enumerate(fmt.decodings):
        codes = [code for code in range(2**fmt.bits) if code not in decoding.grid.unused]
        codes, headers = np.broadcast_arrays(np.resize(codes, 2**fmt.bits)[None], fmt.join(selector, payloads))
        tables.append(codec.decode(jnp.asarray(codes), jnp.asarray(headers), fmt, amax=jnp.float32(amax)))
    return np.concatenate(tables).astype(np.float64)


def nearest(x, table):
    return np.take_along_axis(table, np.abs(table - x[:, None]).argmin(1)[:, None], 1)[:, 0]


@pytest.mark.slow
def test_exhaustive_search_is_the_published_recursion_with_the_best_scale_of_each_block():
    w, x = random(12, 4), correlated(40, 12)
    hessian = x.T @ x
    q = ifjax.gptq(w, hessian, IF4_BS4, search="exhaustive", damping=0.02)
    values, losses, damped = published(w, hessian, IF4_BS4, 0.02, lambda losses, at, n: losses.argmin())
    # Equal but for float32's rounding of what is fed back: no value of the format lies as near to another.
    np.testing.assert_allclose(q.dequantize(), values, rtol=1e-5)
    error = w - np.asarray(q.dequantize(), np.float64)
    np.testing.assert_allclose(np.trace(error.T @ damped @ error), losses.sum(), rtol=1e-4)


# --- axes, blocks, dtypes --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_other_axes_are_columns():
    w, x = random(12, 4), correlated(30, 12)
    flat = ifjax.gptq(w, x.T @ x, IF4_BS4)
    middle = ifjax.gptq(w.reshape(12, 2, 2).transpose(1, 0, 2), x.T @ x, IF4_BS4, axis=1)
    assert_array_equal(middle.dequantize(), flat.dequantize().reshape(12, 2, 2).transpose(1, 0, 2))
    last = ifjax.gptq(w.T, x.T @ x, IF4_BS4, axis=-1)
    assert_array_equal(last.dequantize(), flat.dequantize().T)
    assert (flat.axis, middle.axis, last.axis) == (-2, -2, -1)


@pytest.mark.slow
def test_a_partial_last_block_is_filled_up_with_inputs_that_never_fire():
    w, x = random(10, 4), correlated(30, 10)
    filled = ifjax.gptq(np.pad(w, ((0, 2), (0, 0))), np.pad(x.T @ x, (0, 2)), IF4_BS4, damping=0)
    q = ifjax.gptq(w, x.T @ x, IF4_BS4, damping=0)
    assert_array_equal(q.codes, filled.codes)
    assert_array_equal(q.dequantize(), filled.dequantize()[:10])


def test_an_input_that_never_fires_changes_no_other_block():
    w, x = random(12, 4), correlated(30, 12)
    x[:, 5] = 0
    q = ifjax.gptq(w, x.T @ x, IF4_BS4)
    assert np.isfinite(q.dequantize()).all()
    w[5] = 0
    other = ifjax.gptq(w, x.T @ x, IF4_BS4)
    assert_array_equal(q.dequantize()[:4], other.dequantize()[:4])
    assert_array_equal(q.dequantize()[8:], other.dequantize()[8:])
    assert_array_equal(other.dequantize()[5], 0)


def test_neither_the_size_of_inputs_nor_that_of_weights_matters():
    w, x = random(12, 4), correlated(30, 12)
    hessian, codes = x.T @ x, ifjax.gptq(w, x.T @ x, IF4_BS4).codes
    for power in (-100, 100):
        assert_array_equal(ifjax.gptq(w, hessian * np.float32(2.0**power), IF4_BS4).codes, codes)
    for power in (-40, 40):
        assert_array_equal(ifjax.gptq(w * np.float32(2.0**power), hessian, IF4_BS4).codes, codes)


def test_bfloat16_is_computed_in_float32():
    w, x = jnp.asarray(random(12, 4), jnp.bfloat16), correlated(30, 12)
    q = ifjax.gptq(w, x.T @ x, IF4_BS4)
    assert q.dtype == jnp.bfloat16
    assert_array_equal(q.codes, ifjax.gptq(w.astype(jnp.float32), x.T @ x, IF4_BS4).codes)


def test_jit_and_vmap_give_the_same_bytes():
    w, x = random(2, 12, 4), np.stack([correlated(30, 12), correlated(30, 12, seed=5)])
    hessians = x.swapaxes(1, 2) @ x
    batched = jax.jit(jax.vmap(lambda w, h: ifjax.gptq(w, h, IF4_BS4)))(w, hessians)
    for i in range(2):
        assert_same_bytes(batched[i], ifjax.gptq(w[i], hessians[i], IF4_BS4))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_spoils_its_own_block(bad):
    w, x = random(12, 4), correlated(30, 12)
    w[0, 0] = 9  # so that amax is the same
    clean = ifjax.gptq(w, x.T @ x, IF4_BS4).dequantize()
    w[6, 1] = bad
    q = ifjax.gptq(w, x.T @ x, IF4_BS4).dequantize()
    assert np.isnan(q[4:8, 1]).all() and np.isnan(q).sum() == 4
    assert_array_equal(q[:, [0, 2, 3]], clean[:, [0, 2, 3]])


def test_an_empty_array_gives_an_empty_tensor():
    assert ifjax.gptq(np.zeros((0, 3), np.float32), np.zeros((0, 0), np.float32)).shape == (0, 3)
    assert ifjax.gptq(np.zeros((4, 0), np.float32), np.eye(4, dtype=np.float32)).shape == (4, 0)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hessian": np.eye(5, dtype=np.float32)}, r"\[K, K\] with K = 4.*\(5, 5\)"),
        ({"hessian": np.eye(4, dtype=np.int32)}, "must be float, got int32"),
        ({"hessian": np.full((4, 4), np.nan, np.float32)}, "must be finite"),
        ({"hessian": -np.eye(4, dtype=np.float32)}, "no negative diagonal"),
        ({"hessian": np.triu(np.full((4, 4), 0.5, np.float32)) + 0.5 * np.eye(4, dtype=np.float32)}, "be symmetric"),
        ({"hessian": np.ones((4, 4), np.float32) - 0.5 * np.eye(4, dtype=np.float32)}, "no Cholesky factor"),
        ({"damping": -1.0}, "damping must be finite and not negative"),
        ({"damping": np.nan}, "damping must be finite and not negative"),
        ({"w": np.ones(4, np.float32)}, r"axis must lie in \[-1, 1\)"),
        ({"fmt": "if5"}, "if5"),
        ({"search": "slow"}, "unknown search"),
        ({"loss": "l3"}, "unknown loss"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"w": np.ones((4, 2), np.float32), "hessian": np.eye(4, dtype=np.float32), "fmt": "if4"} | change
    with pytest.raises(ValueError, match=message):
        ifjax.gptq(**arguments)


def test_a_hessian_that_is_none_gives_nan_under_jit():
    hessian = np.ones((12, 12), np.float32) - 0.5 * np.eye(12, dtype=np.float32)
    q = jax.jit(lambda w, h: ifjax.gptq(w, h, IF4_BS4))(np.ones((12, 4), np.float32), hessian)
    assert np.isnan(q.dequantize()).all()


def test_weights_that_are_no_floats_are_refused():
    with pytest.raises(TypeError, match="float array"):
        ifjax.gptq(np.ones((4, 2), np.int32), np.eye(4, dtype=np.float32))
    with pytest.raises(TypeError, match="dequantize"):
        ifjax.gptq(ifjax.quantize(np.ones((4, 2), np.float32)), np.eye(4, dtype=np.float32))
