"""Losses: what a block loses if a candidate encodes it."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from ifjax.codec.blocks import (
    _as_float,
    _bits,
    _gather_squares,
    _insert_axis,
    _largest_divisor,
    _places,
    _repeat,
    _tree,
    _unstack,
    split_blocks,
)
from ifjax.codec.decode import _value
from ifjax.formats import Candidate, Format
from ifjax.numerics.xla import divide, stage

Loss = str | Callable[[jax.Array, jax.Array], jax.Array]


def _inverse(scale_value, tensor, fmt, headroom):
    """What takes x to units of the first grid; 0 for blocks whose scale is zero or NaN.

    A rounded reciprocal, because the published code multiplies by one; it never divides by the scale.
    """
    if tensor is not None:
        _, largest = fmt.constants(headroom)
        scale_value = divide(1.0, divide(largest, tensor.amax)) * scale_value
    return jnp.where(scale_value > 0, divide(1.0, scale_value), 0)


def _to_grid(y, candidate: Candidate, fmt: Format):
    factor = fmt.input_factor(candidate)
    return y if factor == 1 else y * factor


def _squared(e):
    # The last bit is cleared so that compilers cannot contract the square and the sum to a fused multiply-add: they do
    # so in some programs and not in others, and the choice of a block would depend on what surrounds it.
    return _as_float(_bits(e * e) & ~1)


@jax.jit(static_argnames=("candidate", "fmt", "headroom"))  # traced once for all places
def _decoded(x, r, inverse, scale, tensor, candidate, fmt, headroom):
    """x and what it decodes to, in units of `tensor`."""
    x = x if tensor is None else x * tensor.power
    v = candidate.grid.round(_to_grid(x * inverse, candidate, fmt), r)
    return x, _value(v, scale, candidate.step, tensor, fmt.constants(headroom)[1])


LOSSES = {"mse": (_squared, jnp.add), "mae": (jnp.abs, jnp.add), "abs_max": (jnp.abs, jnp.maximum)}


def _block_loss(blocks, noise, byte, tensor, fmt, i, axis, loss, headroom, square) -> jax.Array:
    """The loss [..., m, ...] of each block if candidate i encodes it with these scale bytes."""

    def decoded(blocks, noise, byte, tensor, axis):
        """x and what it decodes to, in units of `tensor`: a pair of arrays for each place along `axis`."""
        scale = fmt.scale.decode(byte)
        inverse = _inverse(scale, tensor, fmt, headroom)
        rs = [None] * blocks.shape[axis] if noise is None else _unstack(noise, axis)
        return [
            _decoded(x, r, inverse, scale, tensor, fmt.candidates[i], fmt, headroom)
            for x, r in zip(_places(blocks, axis), rs, strict=True)
        ]

    if callable(loss):
        xs, ds = zip(*decoded(blocks, noise, byte, tensor, axis), strict=True)
        x, d = jnp.stack(xs, -1), jnp.stack(ds, -1)
        if square is None:
            return jnp.asarray(loss(x, d))
        return _repeat(loss(_gather_squares(x, square - 1), _gather_squares(d, square - 1)), fmt.block, square)

    term, op = LOSSES[loss]

    def along(axis, blocks, noise, byte, tensor):
        part = _largest_divisor(blocks.shape[axis], 32)
        if part == blocks.shape[axis]:
            return _tree(op, [term(d - x) for x, d in decoded(blocks, noise, byte, tensor, axis)])
        # A long block in parts: unrolled as a whole it would take minutes to compile.
        blocks, noise = jax.tree.map(lambda a: split_blocks(a, part, axis), (blocks, noise))
        byte, tensor = _insert_axis(byte, tensor, axis)
        parts = stage(functools.partial(along, axis), blocks, noise, byte, tensor)
        return _tree(op, _unstack(parts, axis))

    if square is None:
        return along(axis, blocks, noise, byte, tensor)
    # Summed over rows first and over columns first, and both added: transposing the square changes no bit.
    over_rows = stage(functools.partial(along, axis), blocks, noise, byte, tensor)
    over_rows = _tree(op, _unstack(split_blocks(over_rows, fmt.block, square), square))
    other = square - 1 if square < axis else square  # the same axis, where the array has B too
    blocks, noise = jax.tree.map(lambda a: split_blocks(a, fmt.block, other), (blocks, noise))
    byte = lax.index_in_dim(split_blocks(byte, fmt.block, square), 0, square, keepdims=False)
    byte, tensor = _insert_axis(byte, tensor, axis)
    over_columns = stage(functools.partial(along, other), blocks, noise, byte, tensor)
    over_columns = _tree(op, _unstack(over_columns, axis))
    return _repeat(op(over_rows, over_columns), fmt.block, square)
