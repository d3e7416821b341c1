"""Blocks: an axis split into blocks, and what is done place by place."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def _insert_axis(byte, tensor, axis):
    """Scale bytes with a new axis at `axis`, and the tensor's scale, which has entries along leading axes only."""
    return jnp.expand_dims(byte, axis), jax.tree.map(lambda a: jnp.expand_dims(a, -1), tensor)


def _largest_divisor(n, limit):
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)


def _gather_squares(a, other):
    """[..., R, ..., B] -> [..., R / B, ..., B * B]"""
    a = jnp.moveaxis(split_blocks(a, a.shape[-1], other), other, -2)
    return a.reshape(*a.shape[:-2], -1)


def _repeat(a, count, axis) -> jax.Array:
    """Each entry along `axis`, `count` times."""
    at = a.ndim + axis + 1
    shape = (*a.shape[:at], count, *a.shape[at:])
    return merge_blocks(jnp.broadcast_to(jnp.expand_dims(a, at), shape), axis)


def split_blocks(x, block: int, axis: int):
    """[..., n, ...] -> [..., m, B, ...], filled up with zeros."""
    count = -(-x.shape[axis] // block)
    x = pad_axis(x, count * block, axis)
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], count, block, *x.shape[at + 1 :])


def merge_blocks(blocks, axis: int):
    """[..., m, B, ...] -> [..., m * B, ...]"""
    at = blocks.ndim + axis
    return blocks.reshape(*blocks.shape[: at - 1], blocks.shape[at - 1] * blocks.shape[at], *blocks.shape[at + 1 :])


def pad_axis(x, length: int, axis: int):
    """x with zeros appended along the negative `axis` up to `length`."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == x.ndim + axis else 0) for i in range(x.ndim)]) if missing else x


def _unstack(a, axis):
    return [lax.index_in_dim(a, i, axis, keepdims=False) for i in range(a.shape[axis])]


def _places(blocks, axis):
    """float32 arrays [..., m, ...], one for each place in the block."""
    if blocks.dtype != jnp.bfloat16:
        return [x.astype(jnp.float32) for x in _unstack(blocks, axis)]
    # XLA:CPU slices bfloat16 by way of a float32 copy of the whole array, and copies what more than 15 slices of one
    # fusion read. So bfloat16 is widened from its bits, and every other place reads them under another type.
    views = [lax.bitcast_convert_type(blocks, dtype) for dtype in (jnp.uint16, jnp.int16)]
    bits = [lax.index_in_dim(views[i % 2], i, axis, keepdims=False) for i in range(blocks.shape[axis])]
    return [_as_float(b.astype(jnp.int32) << 16) for b in bits]


def _tree(op, parts: Sequence[jax.Array]) -> jax.Array:
    """op over the parts in one fixed, balanced order: the same bits in whatever program it is compiled into."""
    parts = list(parts)
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [op(a, b) for a, b in zip(parts[:half], parts[half:], strict=False)] + parts[len(parts) - half : half]
    return parts[0]


def _pick(index, options):
    """options[index], element-wise."""
    picked = options[0]
    for i, option in enumerate(options[1:], 1):
        picked = jnp.where(index == i, option, picked)
    return picked


def _bits(x):
    return lax.bitcast_convert_type(x, jnp.int32)


def _as_float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _magnitude(bits):
    return bits & 0x7FFFFFFF
