"""A packed key-value cache, and attention that reads it."""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ifjax.arrays import QTensor, dynamic_update_slice, quantize
from ifjax.codec import Encoding
from ifjax.formats import Format
from ifjax.products.einsum import einsum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedCache:
    """The keys and values of past tokens, packed in blocks along the head size; a pytree, created by `zeros`.

    With formats that have a tensor scale, each token and head has its own amax, so that a token is quantized once, when
    it is written, independently of later tokens. The last `window` tokens are also kept in floats, and attention reads
    those instead of their packed copies. All methods return new caches and work inside jit, scan and vmap. A function
    with a cache among its arguments may be passed to `ifjax.quantized`, which quantizes its weights.

    Attributes:
        keys: QTensor [batch, length, heads, head size]; a float array if the format is None, for comparison.
        values: the same; the head size may differ.
        recent: float arrays [batch, window, heads, head size] of keys and of values, with token i at index i % window;
            () without a window.
        count: int32 [], the number of tokens written.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import ifjax
        >>> cache = ifjax.PackedCache.zeros((1, 128, 4, 64), "if4")
        >>> k, v, q = jax.random.normal(jax.random.key(0), (3, 1, 10, 4, 64))
        >>> cache = cache.append(k, v)
        >>> cache.attend(q).shape, int(cache.count)
        ((1, 10, 4, 64), 10)
    """

    keys: QTensor | Array
    values: QTensor | Array
    recent: tuple[Array, ...]
    count: Int[Array, ""]

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, int, int, int],
        fmt: str | Format | Encoding | None = "if4",
        *,
        value_fmt: str | Format | Encoding | None = None,
        value_size: int | None = None,
        window: int = 0,
        dtype: DTypeLike = jnp.float32,
    ) -> "PackedCache":
        """Return an empty cache.

        Args:
            shape: batch, length, heads (key heads, if several query heads share one), head size.
            fmt: the format of keys, and of values unless `value_fmt` is given; None keeps both in floats.
            value_fmt: the format of values, if it differs.
            value_size: the head size of values, if it differs.
            window: the number of last tokens that are also kept in floats.
            dtype: the dtype of the dequantized arrays and of the window.

        Raises:
            ValueError: `shape` does not have four positive lengths; `window` is negative or longer than the cache.
        """
        shape = tuple(operator.index(n) for n in shape)  # pyright: ignore[reportAssignmentType]
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"shape must be [batch, length, heads, head size], got {shape}")
        if not 0 <= window <= shape[1]:
            raise ValueError(f"window must lie between 0 and the cache's length {shape[1]}, got {window}")
        value_shape = (*shape[:3], shape[3] if value_size is None else value_size)
        shapes, formats = (shape, value_shape), (fmt, fmt if value_fmt is None else value_fmt)
        keys, values = (_zeros(s, f, dtype) for s, f in zip(shapes, formats, strict=True))
        recent = tuple(jnp.zeros((s[0], window, *s[2:]), dtype) for s in shapes) if window else ()
        return cls(keys, values, recent, jnp.int32(0))

    @property
    def window(self) -> int:
        """The number of last tokens that are also kept in floats."""
        return self.recent[0].shape[1] if self.recent else 0

    @property
    def nbytes(self) -> int:
        """The total bytes of all arrays."""
        return self.keys.nbytes + self.values.nbytes + sum(a.nbytes for a in self.recent) + 4

    def append(self, key: Float[ArrayLike, "b s h d"], value: Float[ArrayLike, "b s h v"]) -> "PackedCache":
        """Return the cache with s more tokens.

        Tokens beyond the cache's length raise an error if `count` is concrete. If `count` is traced, they are written
        as NaN, and attention returns NaN from then on.

        Raises:
            ValueError: the shapes do not fit the cache's; the cache is full.
        """
        new = [jnp.asarray(a) for a in (key, value)]
        for a, q, name in zip(new, (self.keys, self.values), ("key", "value"), strict=True):
            if a.ndim != 4 or (a.shape[0], *a.shape[2:]) != (q.shape[0], *q.shape[2:]) or a.shape[1] > q.shape[1]:
                raise ValueError(f"{name} must be [batch, tokens, heads, head size] for a cache of {q.shape}, got "
                                 f"{a.shape}")
        tokens, length = new[0].shape[1], self.keys.shape[1]
        if new[1].shape[1] != tokens:
            raise ValueError(f"key has {tokens} tokens and value {new[1].shape[1]}")
        if not isinstance(self.count, Tracer) and int(self.count) + tokens > length:
            raise ValueError(f"the cache is full: {int(self.count)} of {length} tokens are written, {tokens} more came")
        fits = self.count + tokens <= length
        new = [jnp.where(fits, a, jnp.asarray(jnp.nan, a.dtype)) for a in new]
        zero = np.int32(0)
        keys, values = (
            _written(q, a, (zero, self.count, zero, zero))
            for q, a in zip((self.keys, self.values), new, strict=True)
        )
        kept = min(tokens, self.window)
        recent = self.recent
        if kept:
            places = (self.count + jnp.arange(tokens - kept, tokens, dtype=jnp.int32)) % self.window
            last = [a[:, tokens - kept :].astype(old.dtype) for old, a in zip(recent, new, strict=True)]
            recent = tuple(old.at[:, places].set(a) for old, a in zip(recent, last, strict=True))
        return PackedCache(keys, values, recent, self.count + tokens)

    def attend(
        self,
        query: Float[ArrayLike, "b s n d"],
        *,
        scale: float | None = None,
        mask: Bool[ArrayLike, "..."] | None = None,
    ) -> Float[Array, "b s n v"]:
        """Return the causal attention of the last s tokens to themselves and to all earlier tokens.

        The products with keys and values read the packed bytes. Softmax is in float32.

        Args:
            query: the queries of the s tokens that were appended last. n is a multiple of the cache's heads;
                neighbouring query heads share a key head.
            scale: the factor of the logits; 1 / sqrt(d) by default.
            mask: bool, broadcast to [b, n, s, length]. Tokens where it is False, such as padding, are masked out too.

        Raises:
            ValueError: the query's shape does not fit the cache's; `mask` is not bool or has more than 4 axes.
        """
        query = jnp.asarray(query)
        batch, length, heads, size = self.keys.shape
        if query.ndim != 4 or query.shape[0] != batch or query.shape[3] != size or query.shape[2] % heads:
            raise ValueError(f"query must be [{batch}, tokens, a multiple of {heads} heads, {size}], got {query.shape}")
        tokens, groups = query.shape[1], query.shape[2] // heads
        q = query.reshape(batch, tokens, heads, groups, size).astype(jnp.float32)
        q = q * np.float32(size**-0.5 if scale is None else scale)
        last = self.count - tokens + jnp.arange(tokens, dtype=jnp.int32)[:, None]  # position of each query

        places = [jnp.arange(length, dtype=jnp.int32)]
        keys, values = [self.keys.astype(jnp.float32)], [self.values.astype(jnp.float32)]
        seen = [places[0] < self.count - self.window]
        if self.window:
            places.append(self._recent_places())
            keys, values = ([q, a.astype(jnp.float32)] for q, a in zip((keys[0], values[0]), self.recent, strict=True))
            seen.append(places[1] >= 0)
        logits = []
        for k, place, is_here in zip(keys, places, seen, strict=True):
            allowed = (is_here[None] & (place[None] <= last))[None, None, None]
            if mask is not None:
                allowed = allowed & self._masked(jnp.asarray(mask), place, tokens, heads, groups)
            logits.append(jnp.where(allowed, einsum("bshgd,bthd->bhgst", q, k), -jnp.inf))
        weights = jax.nn.softmax(jnp.concatenate(logits, -1), axis=-1)
        parts = jnp.split(weights, [length], -1) if self.window else [weights]
        out: Any = sum(einsum("bhgst,bthd->bshgd", p, v) for p, v in zip(parts, values, strict=True))
        return out.reshape(batch, tokens, heads * groups, -1).astype(query.dtype)

    def dequantize(self) -> tuple[Float[Array, "b t h d"], Float[Array, "b t h v"]]:
        """Return keys and values as attention reads them: decoded, with the window's tokens in full precision."""
        out = [q.dequantize() if isinstance(q, QTensor) else q for q in (self.keys, self.values)]
        if self.window:
            place = self._recent_places()
            place = jnp.where(place < 0, self.keys.shape[1], place)  # out of range: `set` drops them
            out = [a.at[:, place].set(r.astype(a.dtype)) for a, r in zip(out, self.recent, strict=True)]
        return out[0], out[1]

    def _recent_places(self):
        """Return the position of the token at each index of the window; negative where there is none yet."""
        slots = jnp.arange(self.window, dtype=jnp.int32)
        return self.count - 1 - (self.count - 1 - slots) % self.window

    def _masked(self, mask, place, tokens, heads, groups):
        """Return the mask at the positions `place`: [b, h, g, s, positions]."""
        batch, length = self.keys.shape[:2]
        if mask.dtype != jnp.bool_ or mask.ndim > 4:
            raise ValueError(f"mask must be bool of at most 4 axes, got {mask.dtype} {mask.shape}")
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = jnp.broadcast_to(mask, (batch, heads * groups, tokens, length))
        return jnp.take(mask.reshape(batch, heads, groups, tokens, length), jnp.clip(place, 0), axis=-1)


def _written(q: Any, a: jax.Array, start: tuple[Any, ...]) -> Any:
    """Return q with a written at `start`; q is an array in a float cache, and while `ifjax.quantized` traces."""
    if isinstance(q, QTensor):
        return dynamic_update_slice(q, a, start)
    return lax.dynamic_update_slice(q, a.astype(q.dtype), start)


def _zeros(shape: tuple[int, ...], fmt: str | Format | Encoding | None, dtype: DTypeLike) -> Any:
    """Return packed zeros, blocked along the last axis, with an amax of 0 per vector; no float array is allocated."""
    if fmt is None:
        return jnp.zeros(shape, dtype)
    lead = len(shape) - 1
    has_amax = Encoding.of(fmt).fmt.has_tensor_scale
    one = quantize(jnp.zeros((1,) * lead + shape[-1:], dtype), fmt, amax_axes=range(lead) if has_amax else ())
    codes, scales = (jnp.broadcast_to(a, (*shape[:-1], a.shape[-1])) for a in (one.codes, one.scales))
    amax = jnp.zeros(shape[:-1], jnp.float32) if has_amax else None
    return one.replaced(codes=codes, scales=scales, amax=amax)
