"""Packing of codes of 1 to 8 bits into bytes, low bits first.

A group of codes fills the fewest whole bytes: 4-bit codes two in a byte, 3-bit codes eight in three bytes, 6-bit codes
four in three bytes. The first code of a group is in its lowest bits, and the group is stored lowest byte first.
"""

import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def group_of(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) of the smallest group that fills whole bytes: (2, 1), (8, 3), (4, 3) for 4, 3, 6 bits."""
    return 8 // math.gcd(8, bits), bits // math.gcd(8, bits)


def packed_length(length: int, bits: int) -> int:
    """Return the number of bytes that hold `length` codes."""
    codes, width = group_of(bits)
    return -(-length // codes) * width


def pack(codes: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Pack integer codes [..., n, ...] along `axis` into uint8 bytes; the last group is padded with zeros.

    Codes must fit into `bits` bits; they are not masked.
    """
    axis = axis - codes.ndim if axis >= 0 else axis
    group, width = group_of(bits)
    missing = -codes.shape[axis] % group
    if missing:
        codes = jnp.pad(codes, [(0, missing if i == codes.ndim + axis else 0) for i in range(codes.ndim)])
    # [..., groups, group, ...]: the new axis has the same negative index as the old one.
    shape = codes.shape
    codes = codes.reshape(*shape[: codes.ndim + axis], shape[axis] // group, group, *shape[codes.ndim + axis + 1 :])
    members = [lax.index_in_dim(codes, i, axis, keepdims=False).astype(jnp.int32) for i in range(group)]
    packed = [_byte(members, bits, j).astype(jnp.uint8) for j in range(width)]
    if width == 1:
        return packed[0]
    return jnp.stack(packed, axis).reshape(
        *shape[: len(shape) + axis], shape[axis] // group * width, *shape[len(shape) + axis + 1 :]
    )


def _byte(codes, bits, j):
    """Return byte j of a group, made of the codes that overlap bits [8j, 8j + 8)."""
    starts = {i: i * bits - 8 * j for i in range(len(codes))}
    parts = [_shifted(codes[i], at) for i, at in starts.items() if -bits < at < 8]
    return functools.reduce(operator.or_, parts) & 0xFF


def _shifted(a, left):
    return a << left if left > 0 else a >> -left if left else a


def unpack(packed: jax.Array, bits: int, axis: int = -1) -> jax.Array:
    """Unpack bytes from `pack` to int32 codes [..., groups, codes of a group, ...], padding included.

    Merging the two axes gives the codes in order. Consumers that can work on groups are faster without merging.
    """
    axis = axis - packed.ndim if axis >= 0 else axis
    group, width = group_of(bits)
    before, after = packed.shape[: packed.ndim + axis], packed.shape[packed.ndim + axis + 1 :]
    packed = packed.reshape(*before, packed.shape[axis] // width, width, *after)
    if width > 4:  # a group of 5- or 7-bit codes is wider than a word, but each code lies in two adjacent bytes
        members = [lax.index_in_dim(packed, j, axis, keepdims=False).astype(jnp.int32) for j in range(width)]
        members.append(jnp.zeros_like(members[0]))
        starts = [divmod(i * bits, 8) for i in range(group)]
        codes = jnp.stack([(members[j] | members[j + 1] << 8) >> shift for j, shift in starts], axis)
        return codes & (2**bits - 1)
    parts = [packed] if width == 1 else [lax.index_in_dim(packed, j, axis) for j in range(width)]
    parts = [part.astype(jnp.int32) for part in parts]
    word = functools.reduce(operator.or_, [_shifted(part, 8 * j) for j, part in enumerate(parts)])
    # Shift by a small constant array: interleaving `group` arrays instead would cost another pass over memory.
    shifts = (np.arange(group, dtype=np.int32) * bits).reshape(*(1 for _ in before), 1, group, *(1 for _ in after))
    return (word >> shifts) & (2**bits - 1)
