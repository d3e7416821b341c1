"""The packed cache: its bytes are those of the tokens quantized at once, attention that of the decoded cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import normal

import ifjax

B, T, H, D = 2, 12, 2, 32


def tokens(n, heads=H, seed=0, size=D):
    shape = (B, n, heads, size)
    return tuple(normal(*shape, seed=3 * seed + i) for i in range(3))


def attention(q, k, v, count, mask=None):
    """In float64, causal for the last tokens of `count`."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k[:, :count], v[:, :count]))
    k, v = (np.repeat(a, q.shape[2] // a.shape[2], 2) for a in (k, v))
    logits = np.einsum("bsnd,btnd->bnst", q, k) / np.sqrt(q.shape[-1])
    allowed = np.arange(count) <= np.arange(count - q.shape[1], count)[:, None]
    logits = np.where(allowed if mask is None else allowed & np.asarray(mask)[..., :count], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bnst,btnd->bsnd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.slow
@pytest.mark.parametrize("fmt, window", [("nvfp4", 0), ("nvfp4", 3), ("mxfp4", 5)])
def test_attention_is_that_of_the_decoded_cache(fmt, window):
    cache = ifjax.PackedCache.zeros((B, T, H, D), fmt, window=window)
    q, k, v = tokens(9, heads=4)
    k, v = k[:, :, :H], v[:, :, :H]
    cache = cache.append(k[:, :4], v[:, :4])
    first = cache.attend(q[:, :4])
    np.testing.assert_allclose(first, attention(q[:, :4], *cache.dequantize(), 4), atol=2e-6)

    @jax.jit
    def run(cache, xs):
        def step(cache, one):
            q, k, v = (a[:, None] for a in one)
            cache = cache.append(k, v)
            return cache, cache.attend(q)[:, 0]

        return jax.lax.scan(step, cache, [a.swapaxes(0, 1) for a in xs])

    cache, y = run(cache, (q[:, 4:], k[:, 4:], v[:, 4:]))
    assert int(cache.count) == 9
    together = ifjax.PackedCache.zeros((B, T, H, D), fmt, window=window).append(k, v)
    for one, other in zip(jax.tree.leaves(cache), jax.tree.leaves(together), strict=True):
        np.testing.assert_array_equal(one, other)
    keys, values = cache.dequantize()
    axes = (0, 1, 2) if cache.keys.amax is not None else ()
    decoded = ifjax.fake_quantize(k, fmt, amax_axes=axes)
    np.testing.assert_array_equal(keys[:, : 9 - window], decoded[:, : 9 - window])
    np.testing.assert_array_equal(keys[:, 9 - window : 9], k[:, 9 - window :])
    np.testing.assert_array_equal(keys[:, 9:], 0)
    np.testing.assert_allclose(y[-1][:, None], attention(q[:, 8:9], keys, values, 9), atol=2e-6)
    mask = jnp.ones((B, 1, 1, T), bool).at[0, ..., :2].set(False).at[1, ..., 7].set(False)
    np.testing.assert_allclose(
        cache.attend(q[:, 8:9], mask=mask), attention(q[:, 8:9], keys, values, 9, mask), atol=2e-6
    )


@pytest.mark.slow
def test_errors_do_not_grow_with_the_context_and_a_window_lowers_them():
    q, k, v = (normal(1, 256, 1, 64, seed=i) for i in range(3))

    def error(count, window=0):
        cache = ifjax.PackedCache.zeros((1, 256, 1, 64), "nvfp4", window=window).append(k[:, :count], v[:, :count])
        exact = attention(q[:, :16], k, v, count)
        return float(jnp.sqrt(((cache.attend(q[:, :16]) - exact) ** 2).mean() / (exact**2).mean()))

    errors = {count: error(count) for count in (16, 64, 256)}
    assert all(0.05 < e < 0.2 for e in errors.values()), errors  # nvfp4's own is .095
    assert error(64, window=32) < 0.85 * errors[64]
    assert error(64, window=64) < 1e-5


def test_a_token_too_many_is_an_error_or_nan():
    _, k, v = tokens(T)
    full = ifjax.PackedCache.zeros((B, T, H, D), "nvfp4").append(k, v)
    with pytest.raises(ValueError, match=r"full: 12 of 12 tokens are written, 1 more"):
        full.append(k[:, :1], v[:, :1])
    more = jax.jit(lambda cache: cache.append(k[:, :1], v[:, :1]).attend(k[:, :1]))(full)
    assert bool(jnp.isnan(more).all())


@pytest.mark.slow
def test_bytes_and_shapes():
    cache = ifjax.PackedCache.zeros((1, 64, 4, 64), "if4", dtype=jnp.bfloat16, value_fmt="mxfp4")
    assert cache.keys.fmt.name == "if4" and cache.values.fmt.name == "mxfp4"
    assert cache.keys.bits_per_value == 5.0  # an amax for each 64 values
    assert cache.nbytes == 64 * 4 * (64 * 5.0 + 64 * 4.25) / 8 + 4
    with pytest.raises(ValueError, match="window must lie between"):
        ifjax.PackedCache.zeros((1, 8, 4, 64), window=9)
    with pytest.raises(ValueError, match="shape must be"):
        ifjax.PackedCache.zeros((8, 4, 64))
    with pytest.raises(ValueError, match="key must be"):
        cache.append(jnp.ones((1, 1, 4, 32)), jnp.ones((1, 1, 4, 64)))
    with pytest.raises(ValueError, match="query must be"):
        cache.attend(jnp.ones((1, 1, 3, 64)))
