"""Packed caches of keys and values for models that keep their own cache."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ifjax.arrays import QTensor, quantize
from ifjax.codec import Encoding
from ifjax.formats import Format
from ifjax.models.leaves import is_leaf, raw_value, with_value
from ifjax.models.sites import join_path


def pack_cache(
    cache: Any, fmt: str | Format | Encoding = "if4", *, where: Callable[[str, Any], bool] | None = None
) -> Any:
    """Return a model's cache of keys and values with its float arrays packed, for use with `ifjax.quantized`.

    Blocks lie along the last axis, the head size. Every vector along it has an amax of its own, so that a token is
    quantized once, when it is written. The model needs no change. `ifjax.quantized(fn)` follows the cache through the
    program, packs what fn writes by `dynamic_update_slice` or `.at[].set`, multiplies by packed bytes, and returns the
    packed cache. Integer arrays, such as the position, stay as they are.

    Args:
        cache: a tree of arrays: linen's collection "cache", an NNX state of `nnx.Cache`, or a dictionary.
        fmt: a format's name or record, or an Encoding.
        where: called with the path and the array of each float leaf; returns whether to pack it. Unless given, arrays
            of at least three axes are packed.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> import ifjax
        >>> model, x = nn.MultiHeadDotProductAttention(4, decode=True), jnp.ones((1, 16, 64))
        >>> variables = model.init(jax.random.key(0), x)  # a cache of 16 tokens
        >>> variables["cache"] = ifjax.pack_cache(variables["cache"], "if4")
        >>> step = jax.jit(ifjax.quantized(lambda v, x: model.apply(v, x, mutable=["cache"])))
        >>> y, changed = step(variables, x[:, :1])
        >>> changed["cache"]["cached_key"]
        QTensor(if4, 1x16x4x16 float32, axis=-1, 6.500 bits a value)
    """

    def one(keys, leaf):
        value = raw_value(leaf)
        if isinstance(value, QTensor) or not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.floating):
            return leaf
        if not (value.ndim >= 3 if where is None else where(join_path(keys), value)):
            return leaf
        axes = range(value.ndim - 1) if Encoding.of(fmt).fmt.has_tensor_scale else ()
        return with_value(leaf, quantize(value, fmt, amax_axes=axes))

    return jax.tree_util.tree_map_with_path(one, cache, is_leaf=is_leaf)
