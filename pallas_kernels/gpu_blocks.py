"""Block-scaled encoding and decoding on NVIDIA GPUs, in one pass over a matrix.

The interface is that of `pallas_kernels.tpu_blocks`: the number format's arithmetic is passed as a `Codec`. Each thread
processes a whole block, so that its scale is computed once and its values stay in registers. With blocks along rows
(axis=-2) adjacent threads read adjacent columns. With blocks along columns (axis=-1) each thread reads the bytes of its
own block, which lie in one sector. The blocks of a square belong to adjacent threads. Only requested outputs are
written to memory.

This module has not run on a GPU. It is compiled for an H200 and run in the interpreter.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.tpu_blocks import LANES, Codec, Noise, Rotation, rotated, rounded

__all__ = ["Noise", "decode", "encode", "supports"]

THREADS = 128


def supports(codec: Codec, x: Any, axis: int, rotation: Rotation | None = None) -> str | None:
    """Return the reason why `encode` cannot take an array or shape x [L, R, C]; None if it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"values must be float32 or bfloat16, got {x.dtype}"
    if axis not in (-1, -2):
        return f"blocks must lie along one of the last two axes, got {axis}"
    if codec.bits > 4:
        return f"it takes codes of up to 4 bits, got {codec.bits}: Triton does not round to integers"
    if rotation is not None and (rotation.signs is None or codec.block % rotation.size or x.shape[axis] % codec.block):
        return f"it rotates within whole blocks of {codec.block} by known signs, got runs of {rotation.size}"
    at = _Blocks(x.shape, axis, codec)
    if at.matrices * at.threads * codec.block >= 2**31:
        return "it counts elements in 31 bits"
    return None


@functools.partial(
    jax.jit, static_argnames=("codec", "axis", "rotation", "wants_codes", "wants_values", "interpret")
)  # fmt: skip
def encode(
    x: jax.Array,
    scalars: jax.Array,
    tables: jax.Array,
    noise: Noise | None = None,
    *,
    codec: Codec,
    axis: int,
    rotation: Rotation | None = None,
    wants_codes: bool = True,
    wants_values: bool = False,
    interpret: Any = False,
) -> list[jax.Array]:
    """Return codes and headers, or their decoded values, or both, as `tpu_blocks.encode` does.

    Raises:
        ValueError: `supports` returns a reason; the codec draws noise and `noise` is None.
    """
    if reason := supports(codec, x, axis, rotation):
        raise ValueError(reason)
    if codec.noises and noise is None:
        raise ValueError("this codec draws noise, got noise=None: pass a Noise")
    del scalars  # they are in the last row of the tables: a slice of its own would cost a launch
    at, args = _Blocks(x.shape, axis, codec), [tables, x]
    if codec.noises and noise is not None:
        args += [noise.base, noise.strides, noise.seeds]
    shapes = []
    if wants_codes:
        lengths = at.count * codec.block * codec.bits // 8, at.count
        shapes += [jax.ShapeDtypeStruct(at.with_length(length), jnp.uint8) for length in lengths]
    if wants_values:
        shapes.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    body = functools.partial(
        _encode_blocks, at=at, codec=codec, own=len(tables) > 1, rotation=rotation, wants_codes=wants_codes,
        wants_values=wants_values,
    )  # fmt: skip
    return _run(body, "encode_blocks", at, args, shapes, interpret)


@functools.partial(jax.jit, static_argnames=("codec", "axis", "length", "dtype", "interpret"))
def decode(
    codes: jax.Array,
    headers: jax.Array,
    tables: jax.Array,
    *,
    codec: Codec,
    axis: int,
    length: int,
    dtype: Any,
    interpret: Any = False,
) -> jax.Array:
    """Return the values [L, R, C] of codes and headers, as `tpu_blocks.decode` does."""
    shape = list(codes.shape)
    shape[axis] = length
    at = _Blocks(tuple(shape), axis, codec)
    body = functools.partial(_decode_blocks, at=at, codec=codec, own=len(tables) > 1)
    (values,) = _run(
        body, "decode_blocks", at, [tables, codes, headers], [jax.ShapeDtypeStruct(tuple(shape), dtype)], interpret
    )
    return values


def _run(body, name, at, args, shapes, interpret):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    flat = [jax.ShapeDtypeStruct((math.prod(s.shape),), s.dtype) for s in shapes]
    moved = sum(a.size * a.dtype.itemsize for a in [*args, *shapes])
    found = pl.pallas_call(
        body,
        out_shape=flat,
        grid=(at.matrices, pl.cdiv(at.threads, THREADS)),
        in_specs=[whole] * len(args),
        out_specs=[whole] * len(flat),
        compiler_params=plgpu.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),
        interpret=interpret,
        name=name,
    )(*(a.reshape(-1) for a in args))
    return [a.reshape(s.shape) for a, s in zip(found, shapes, strict=True)]


class _Blocks:
    """The assignment of a matrix's blocks to threads, such that adjacent threads access adjacent memory.

    The blocks of a square are in `block` adjacent threads; a square at the edge has threads without a block.
    """

    def __init__(self, shape, axis, codec):
        self.shape, self.axis, self.block = shape, axis, codec.block
        self.matrices, rows, columns = shape
        self.across, self.along = (rows, columns) if axis == -1 else (columns, rows)
        self.count = -(-self.along // codec.block)  # blocks along the axis
        self.together = codec.block if codec.is_square else 1
        self.groups = -(-self.across // self.together)
        self.threads = self.groups * self.together * self.count

    def with_length(self, length):
        """Return the shape with another length along the blocked axis."""
        return (*self.shape[:-1], length) if self.axis == -1 else (self.shape[0], length, self.shape[2])

    def here(self):
        """Return (matrix, block along the axis, row or column across, whether it exists) of the program's threads."""
        thread = pl.program_id(1) * THREADS + lax.iota(jnp.int32, THREADS)
        is_there, place = thread < self.threads, thread % self.together
        group = thread // self.together
        if self.axis == -1:
            block, group = group % self.count, group // self.count
        else:
            block, group = group // self.groups, group % self.groups
        across = group * self.together + place
        return pl.program_id(0), block, across, is_there & (across < self.across)

    def index(self, matrix, along, across, length):
        """Return the flat index of an element of [L, ...] whose length along the blocked axis is `length`."""
        if self.axis == -1:
            return (matrix * self.across + across) * length + along
        return (matrix * length + along) * self.across + across


def _encode_blocks(tables, x, *refs, at, codec, own, rotation, wants_codes, wants_values):
    refs = iter(refs)
    numbers = [next(refs) for _ in range(3)] if codec.noises else None
    codes, headers = (next(refs), next(refs)) if wants_codes else (None, None)
    values = next(refs) if wants_values else None
    matrix, block, across, is_there = at.here()
    places = [block * codec.block + i for i in range(codec.block)]
    masks = [is_there & (place < at.along) for place in places]
    ats = [at.index(matrix, place, across, at.along) for place in places]
    xs = [plgpu.load(x.at[i], mask=mask, other=0.0).astype(jnp.float32) for i, mask in zip(ats, masks, strict=True)]
    if rotation is not None:
        xs = [rounded(y, x.dtype) for y in _rotated(xs, rotation)]
    end = tables.shape[0] // at.matrices * (matrix + 1) if own else tables.shape[0]
    known = [tables[end - LANES + i] for i in range(codec.scalars)]
    noise = None
    if numbers is not None:
        base, strides, seeds = numbers
        row, column = strides[0], strides[1]
        along, other = (column, row) if at.axis == -1 else (row, column)
        drawn = [
            codec.noise(base[matrix] + place * along + across * other, seeds[2 * matrix], seeds[2 * matrix + 1])
            for place in places
        ]
        noise = list(zip(*drawn, strict=True))
    words, header, some = codec.encode(
        xs, noise, known, _lookup(tables, at, matrix, own), wants_codes=wants_codes, wants_values=wants_values,
        across=functools.partial(_across, size=codec.block) if codec.is_square else None,
    )  # fmt: skip
    if codes is not None and headers is not None:
        nbytes = codec.block * codec.bits // 8
        for i in range(nbytes):
            byte = lax.shift_right_logical(words[i // 4], 8 * (i % 4)).astype(jnp.uint8)
            plgpu.store(codes.at[at.index(matrix, block * nbytes + i, across, at.count * nbytes)], byte, mask=is_there)
        plgpu.store(headers.at[at.index(matrix, block, across, at.count)], header.astype(jnp.uint8), mask=is_there)
    if values is not None:
        for i, mask, value in zip(ats, masks, some, strict=True):
            plgpu.store(values.at[i], value.astype(x.dtype), mask=mask)


def _decode_blocks(tables, codes, headers, out, *, at, codec, own):
    matrix, block, across, is_there = at.here()
    nbytes = codec.block * codec.bits // 8
    words = [0] * -(-nbytes // 4)
    for i in range(nbytes):
        source = codes.at[at.index(matrix, block * nbytes + i, across, at.count * nbytes)]
        byte = plgpu.load(source, mask=is_there, other=0)
        words[i // 4] = words[i // 4] | byte.astype(jnp.int32) << 8 * (i % 4)
    header = plgpu.load(headers.at[at.index(matrix, block, across, at.count)], mask=is_there, other=0).astype(jnp.int32)
    for i, value in enumerate(codec.decode(words, header, _lookup(tables, at, matrix, own))):
        place = block * codec.block + i
        target = out.at[at.index(matrix, place, across, at.along)]
        plgpu.store(target, value.astype(out.dtype), mask=is_there & (place < at.along))


def _rotated(xs, rotation):
    size, signs = rotation.size, rotation.signs
    runs = [xs[i : i + size] for i in range(0, len(xs), size)]
    return [y for run in runs for y in rotated([x * s for x, s in zip(run, signs, strict=True)])]


def _across(op, a, size):
    """Reduce every `size` adjacent threads by op, as a balanced tree that combines the farthest threads first."""
    a = a.reshape(-1, size)
    while a.shape[1] > 1:
        a = op(*lax.split(a, [a.shape[1] // 2] * 2, axis=1))
    return jnp.broadcast_to(a, (a.shape[0], size)).reshape(-1)


def _lookup(tables, at, matrix, own):
    first = matrix * (tables.shape[0] // at.matrices) if own else 0
    return lambda row, index: plgpu.load(tables.at[first + row * LANES + index])
