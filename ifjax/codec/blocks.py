"""Blocks: an axis split into blocks, and arithmetic place by place.

With the block axis at `axis` (negative), [..., n, ...] becomes [..., m, B, ...], where B keeps that negative index, and
what belongs to a block has the shape [..., m, ...]. No axis is moved or merged with another, so leading axes keep their
sharding, and axis=-2 needs no transposition.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax


def split_blocks(x: jax.Array, block: int, axis: int) -> jax.Array:
    """[..., n, ...] -> [..., m, B, ...], filled up with zeros."""
    count = -(-x.shape[axis] // block)
    x = pad_axis(x, count * block, axis)
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], count, block, *x.shape[at + 1 :])


def merge_blocks(blocks: jax.Array, axis: int) -> jax.Array:
    """[..., m, B, ...] -> [..., m * B, ...]"""
    at = blocks.ndim + axis
    return blocks.reshape(*blocks.shape[: at - 1], blocks.shape[at - 1] * blocks.shape[at], *blocks.shape[at + 1 :])


def pad_axis(x: jax.Array, length: int, axis: int) -> jax.Array:
    """x with zeros appended along the negative `axis` up to `length`."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == x.ndim + axis else 0) for i in range(x.ndim)]) if missing else x


def crop(x: jax.Array, length: int, axis: int) -> jax.Array:
    """The first `length` entries of x along the negative `axis`."""
    return x if x.shape[axis] == length else lax.slice_in_dim(x, 0, length, axis=x.ndim + axis)


def repeat(a: jax.Array, count: int, axis: int) -> jax.Array:
    """Each entry along `axis`, `count` times."""
    at = a.ndim + axis + 1
    shape = (*a.shape[:at], count, *a.shape[at:])
    return merge_blocks(jnp.broadcast_to(jnp.expand_dims(a, at), shape), axis)


def gather_squares(a: jax.Array, other: int) -> jax.Array:
    """[..., R, ..., B] -> [..., R / B, ..., B * B]"""
    a = jnp.moveaxis(split_blocks(a, a.shape[-1], other), other, -2)
    return a.reshape(*a.shape[:-2], -1)


def insert_axis(arrays, axis: int):
    """Arrays [..., m, ...] of what a block has one of, with a new axis at the negative `axis`, where B is."""
    return jax.tree.map(lambda a: jnp.expand_dims(a, axis), arrays)


def unstack(a: jax.Array, axis: int) -> list[jax.Array]:
    """The entries along an axis."""
    return [lax.index_in_dim(a, i, axis, keepdims=False) for i in range(a.shape[axis])]


def places(blocks: jax.Array, axis: int) -> list[jax.Array]:
    """float32 arrays [..., m, ...], one for each place in the block."""
    if blocks.dtype != jnp.bfloat16:
        return [x.astype(jnp.float32) for x in unstack(blocks, axis)]
    # XLA:CPU slices bfloat16 by way of a float32 copy of the whole array, and copies what more than 15 slices of one
    # fusion read. So bfloat16 is widened from its bits, and every other place reads them under another type.
    views = [lax.bitcast_convert_type(blocks, dtype) for dtype in (jnp.uint16, jnp.int16)]
    bits = [lax.index_in_dim(views[i % 2], i, axis, keepdims=False) for i in range(blocks.shape[axis])]
    return [as_float(b.astype(jnp.int32) << 16) for b in bits]


def tree(op: Callable[[jax.Array, jax.Array], jax.Array], parts: Sequence[jax.Array]) -> jax.Array:
    """op over the parts in one fixed, balanced order: the same bits in whatever program it is compiled into."""
    parts = list(parts)
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [op(a, b) for a, b in zip(parts[:half], parts[half:], strict=False)] + parts[len(parts) - half : half]
    return parts[0]


def pick(index: jax.Array | int, options: Sequence[jax.Array]) -> jax.Array:
    """options[index], element-wise."""
    if isinstance(index, int):
        return options[index]
    picked = options[0]
    for i, option in enumerate(options[1:], 1):
        picked = jnp.where(index == i, option, picked)
    return picked


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n that is at most `limit`."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def bits_of(x: jax.Array) -> jax.Array:
    """The bits of float32 as int32."""
    return lax.bitcast_convert_type(x, jnp.int32)


def as_float(bits: jax.Array) -> jax.Array:
    """The float32 with these bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(bits: jax.Array) -> jax.Array:
    """Bits without the sign: integers that are ordered as the magnitudes are."""
    return lax.bitwise_and(bits, lax.full_like(bits, 0x7FFFFFFF))
