"""Models that keep a cache of their own run with a packed one, which their programs write and read."""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from samples import initialized, normal

import ifjax

X = normal(2, 6, 32, seed=1)
FMT = "nvfp4"


def decoded(attend, q, k, v, mask=None, **options):
    """Attention that reads the cache as its packed copy decodes."""
    del options
    k, v = (ifjax.fake_quantize(a, FMT, amax_axes=(0, 1, 2)) for a in (k, v))
    return attend(q, k, v, mask=mask)


def test_linen_attention_decodes_by_a_packed_cache():
    model = nn.MultiHeadDotProductAttention(2, decode=True)
    plain = nn.MultiHeadDotProductAttention(
        2, decode=True, attention_fn=functools.partial(decoded, nn.dot_product_attention)
    )
    variables = initialized(model, X)
    packed = {**variables, "cache": ifjax.pack_cache(variables["cache"], FMT)}
    apply = ifjax.quantized(functools.partial(model.apply, mutable=["cache"]))

    @jax.jit
    def run(variables, x):
        def step(cache, x):
            y, changed = apply({**variables, "cache": cache}, x[:, None])
            return changed["cache"], y[:, 0]

        return jax.lax.scan(step, variables["cache"], x.swapaxes(0, 1))

    cache, y = run(packed, X)
    for t in range(X.shape[1]):
        expected, changed = plain.apply(variables, X[:, t : t + 1], mutable=["cache"])
        variables = {**variables, **changed}
        np.testing.assert_allclose(y[t][:, None], expected, atol=2e-6)
    assert jax.tree.structure(cache) == jax.tree.structure(packed["cache"])
    exact = variables["cache"]["cached_key"]
    np.testing.assert_allclose(
        cache["cached_key"].dequantize(), ifjax.fake_quantize(exact, FMT, amax_axes=(0, 1, 2)), atol=1e-5
    )
    assert int(cache["cache_index"]) == 6


@pytest.mark.slow
def test_layers_that_are_scanned_keep_their_packed_caches():
    class Layer(nn.Module):
        attend: Callable[..., jax.Array] = nn.dot_product_attention

        @nn.compact
        def __call__(self, x, _):
            attention = nn.remat(nn.MultiHeadDotProductAttention)
            return x + attention(2, decode=True, attention_fn=self.attend, name="attention")(x), None

    stack = nn.scan(Layer, variable_axes={"params": 0, "cache": 0}, split_rngs={"params": True}, length=3)
    layers, plain = stack(), stack(functools.partial(decoded, nn.dot_product_attention))
    variables = initialized(layers, X, None)
    cache = ifjax.pack_cache(variables["cache"], FMT)
    apply = jax.jit(ifjax.quantized(lambda v, x: layers.apply(v, x, None, mutable=["cache"])))
    (y, _), changed = apply({**variables, "cache": cache}, X[:, :1])
    assert jax.tree.structure(changed["cache"]) == jax.tree.structure(cache)
    (exact, _), floats = plain.apply(variables, X[:, :1], None, mutable=["cache"])
    np.testing.assert_allclose(y, exact, atol=1e-4)
    first = jax.tree.map(lambda a: a[0], floats["cache"])["attention"]["cached_value"]  # of equal inputs
    q = changed["cache"]["attention"]["cached_value"]
    np.testing.assert_allclose(
        q[0].dequantize(), ifjax.fake_quantize(first, FMT, amax_axes=(0, 1, 2)), atol=1e-5
    )


@pytest.mark.slow
def test_nnx_attention_decodes_by_a_packed_cache():
    def model(**options):
        made = nnx.MultiHeadAttention(2, 32, 32, decode=True, rngs=nnx.Rngs(0), **options)
        made.init_cache((2, 6, 32))
        return made

    plain = model(attention_fn=functools.partial(decoded, nnx.dot_product_attention))
    graph, cache, rest = nnx.split(model(), nnx.Cache, ...)
    packed = nnx.merge(graph, ifjax.pack_cache(cache, FMT), rest)
    run = ifjax.quantized(lambda model, x: model(x))
    for t in range(3):
        np.testing.assert_allclose(run(packed, X[:, t : t + 1]), plain(X[:, t : t + 1]), atol=2e-6)
    assert isinstance(packed.cached_key.get_raw_value(), ifjax.QTensor)
    assert int(packed.cache_index[...]) == 3


@pytest.mark.by_default("fori")
@pytest.mark.parametrize("loop", ["scan", "while", "fori"])
def test_plain_functions_write_by_index_in_loops(loop):
    def fn(params, cache, xs):
        def step(i, cache):
            return cache.at[jnp.arange(2), i + jnp.array([0, 1])].set(xs[i] @ params)

        if loop == "scan":
            return jax.lax.scan(lambda c, i: (step(i, c), None), cache, jnp.arange(3))[0]
        if loop == "fori":
            return jax.lax.fori_loop(0, 3, step, cache)
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, step(s[0], s[1])), (0, cache))[1]

    params, xs = normal(16, 16), normal(3, 2, 16, seed=1)
    cache = jnp.zeros((2, 4, 16))
    got = jax.jit(ifjax.quantized(fn))(params, ifjax.pack_cache(cache, FMT), xs)
    np.testing.assert_allclose(
        got.dequantize(), ifjax.fake_quantize(fn(params, cache, xs), FMT, amax_axes=(0, 1)), atol=1e-5
    )


def test_a_cache_whose_amax_cannot_be_is_refused():
    x = jnp.ones((2, 4, 16))

    def fn(params, cache, x):
        return jax.lax.dynamic_update_slice(cache, x * params, (0, 1, 0))

    with pytest.raises(ValueError, match="amax of this QTensor"):
        ifjax.quantized(fn)(jnp.ones(()), ifjax.quantize(x, FMT), x[:, :1])
