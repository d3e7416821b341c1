"""Functions that split an axis into blocks, and arithmetic on the places (positions) of a block.

With the blocked axis at `axis` (negative), [..., n, ...] becomes [..., m, B, ...], where B keeps that negative index.
Arrays with one entry per block have the shape [..., m, ...]. No axis is moved or merged with another, so leading axes
keep their sharding, and axis=-2 needs no transposition.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ifjax.formats.floats import as_float
from ifjax.numerics.xla import where


def split_blocks(x: jax.Array, block: int, axis: int) -> jax.Array:
    """Split an axis into blocks: [..., n, ...] -> [..., m, B, ...], padded with zeros."""
    count = -(-x.shape[axis] // block)
    x = pad_axis(x, count * block, axis)
    at = x.ndim + axis
    return x.reshape(*x.shape[:at], count, block, *x.shape[at + 1 :])


def merge_blocks(blocks: jax.Array, axis: int) -> jax.Array:
    """Merge the block axes: [..., m, B, ...] -> [..., m * B, ...]."""
    at = blocks.ndim + axis
    return blocks.reshape(*blocks.shape[: at - 1], blocks.shape[at - 1] * blocks.shape[at], *blocks.shape[at + 1 :])


def pad_axis(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Append zeros to x along the negative `axis`, up to `length`."""
    missing = length - x.shape[axis]
    return jnp.pad(x, [(0, missing if i == x.ndim + axis else 0) for i in range(x.ndim)]) if missing else x


def crop(x: jax.Array, length: int, axis: int) -> jax.Array:
    """Return the first `length` entries of x along the negative `axis`."""
    return x if x.shape[axis] == length else lax.slice_in_dim(x, 0, length, axis=x.ndim + axis)


def repeat(a: jax.Array, count: int, axis: int) -> jax.Array:
    """Repeat each entry along `axis` `count` times."""
    at = a.ndim + axis + 1
    shape = (*a.shape[:at], count, *a.shape[at:])
    return merge_blocks(jnp.broadcast_to(jnp.expand_dims(a, at), shape), axis)


def gather_squares(a: jax.Array, other: int) -> jax.Array:
    """Gather the values of each 2-D block: [..., R, ..., B] -> [..., R / B, ..., B * B]."""
    a = jnp.moveaxis(split_blocks(a, a.shape[-1], other), other, -2)
    return a.reshape(*a.shape[:-2], -1)


def insert_axis(arrays, axis: int):
    """Insert an axis into arrays [..., m, ...], at the negative index `axis` of B, so that they broadcast to blocks."""
    return jax.tree.map(lambda a: jnp.expand_dims(a, axis), arrays)


def unstack(a: jax.Array, axis: int) -> list[jax.Array]:
    """Return the entries along an axis as a list."""
    return [lax.index_in_dim(a, i, axis, keepdims=False) for i in range(a.shape[axis])]


def places(blocks: jax.Array, axis: int) -> list[jax.Array]:
    """Return a list of float32 arrays [..., m, ...], one for each place in the block."""
    if blocks.dtype != jnp.bfloat16:
        return [x.astype(jnp.float32) for x in unstack(blocks, axis)]
    # To slice bfloat16, XLA:CPU converts the whole array to float32, and it copies an array that more than 15 slices of
    # one fusion read. So bfloat16 is widened from its bits, and odd places read them under another integer type.
    views = [lax.bitcast_convert_type(blocks, dtype) for dtype in (jnp.uint16, jnp.int16)]
    bits = [lax.index_in_dim(views[i % 2], i, axis, keepdims=False) for i in range(blocks.shape[axis])]
    return [as_float(b.astype(jnp.int32) << 16) for b in bits]


def tree(op: Callable[[jax.Array, jax.Array], jax.Array], parts: Sequence[jax.Array]) -> jax.Array:
    """Reduce the parts with `op` in one fixed, balanced order, so that every program gives the same bits."""
    parts = list(parts)
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [op(a, b) for a, b in zip(parts[:half], parts[half:], strict=False)] + parts[len(parts) - half : half]
    return parts[0]


def tree_along(op: Callable[[jax.Array, jax.Array], jax.Array], a: jax.Array, axis: int) -> jax.Array:
    """Reduce an array along a negative axis, in the order of `tree`, with few operations to compile."""
    at = a.ndim + axis
    while a.shape[at] % 2 == 0:
        half = a.shape[at] // 2
        a = op(lax.slice_in_dim(a, 0, half, axis=at), lax.slice_in_dim(a, half, None, axis=at))
    return lax.squeeze(a, (at,)) if a.shape[at] == 1 else tree(op, unstack(a, axis))


def pick(index: jax.Array | int, options: Sequence[jax.Array]) -> jax.Array:
    """Return options[index], element-wise."""
    if isinstance(index, int):
        return options[index]
    picked = options[0]
    for i, option in enumerate(options[1:], 1):
        picked = where(index == i, option, picked)
    return picked


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n that is at most `limit`."""
    return next(d for d in range(min(n, limit), 0, -1) if n % d == 0)
