"""Block-scaled encoding and decoding on NVIDIA GPUs, in one pass over a matrix.

The interface is that of `pallas_kernels.tpu_blocks`: the number format's arithmetic is passed as a `Codec`. Each thread
processes a whole block, so that its scale is computed once and its values stay in registers. With blocks along rows
(axis=-2) adjacent threads read adjacent columns. With blocks along columns (axis=-1) each thread reads the bytes of its
own block, which lie in one sector, as words of 32 bits. The blocks of a square belong to adjacent threads. Only
requested outputs are written to memory.

This module has not run on a GPU. It is compiled for an H200 and run in the interpreter.
"""

import functools
import math
import struct
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
    at, numbers = _Blocks(x.shape, axis, codec), [tables]
    if codec.noises and noise is not None:
        numbers += [noise.base, noise.seeds]
    shapes = []
    if wants_codes:
        lengths = at.count * codec.block * codec.bits // 8, at.count
        shapes += [jax.ShapeDtypeStruct(at.with_length(length), jnp.uint8) for length in lengths]
    if wants_values:
        shapes.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
    body = functools.partial(
        _encode_blocks, at=at, codec=codec, dtype=x.dtype, own=len(tables) > 1, rotation=rotation,
        wants_codes=wants_codes, wants_values=wants_values, machine=None if interpret else Instructions,
    )  # fmt: skip
    return _run(body, "encode_blocks", at, [x], numbers, shapes, interpret)


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
    body = functools.partial(_decode_blocks, at=at, codec=codec, dtype=dtype, own=len(tables) > 1)
    shapes = [jax.ShapeDtypeStruct(tuple(shape), dtype)]
    (values,) = _run(body, "decode_blocks", at, [codes, headers], [tables], shapes, interpret)
    return values


def _run(body, name, at, arrays, numbers, shapes, interpret):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    flat = [jax.ShapeDtypeStruct((math.prod(s.shape),), s.dtype) for s in shapes]
    flat = [
        jax.ShapeDtypeStruct((f.size * f.dtype.itemsize // 4,), jnp.int32) if at.in_words(s) else f
        for f, s in zip(flat, shapes, strict=True)
    ]
    args = [_as_words(a) if at.in_words(a) else a.reshape(-1) for a in arrays] + [a.reshape(-1) for a in numbers]
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
    )(*args)
    return [_of_words(a, s) if at.in_words(s) else a.reshape(s.shape) for a, s in zip(found, shapes, strict=True)]


def _as_words(a):
    """Return the bytes of an array as int32 [n], which XLA does not copy."""
    parts = 4 // a.dtype.itemsize
    return lax.bitcast_convert_type(a.reshape((-1,) if parts == 1 else (-1, parts)), jnp.int32)


def _of_words(words, like):
    return lax.bitcast_convert_type(words, like.dtype).reshape(like.shape)


class Instructions:
    """Instructions that Triton does not make of arithmetic."""

    @staticmethod
    def fma(a: jax.Array, b: Any, c: jax.Array) -> jax.Array:
        """Return a * b + c, rounded once. `b` is an array or a Python number."""
        if isinstance(b, float):
            return _asm(f"fma.rn.f32 $0, $1, 0f{struct.pack('>f', b).hex()}, $2;", "=f,f,f", a, c)
        return _asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)

    @staticmethod
    def maximum(a: jax.Array, b: jax.Array) -> jax.Array:
        """Return the larger of two floats, NaN if one is."""
        return _asm("max.NaN.f32 $0, $1, $2;", "=f,f,f", a, b)

    @staticmethod
    def permute(a: jax.Array, b: jax.Array, selector: int) -> jax.Array:
        """Return the int32 of four bytes of b and a, 7 to 0, whose numbers are the selector's hexadecimal digits."""
        return _asm(f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r", a, b)


def _asm(text, constraints, *args):
    args = jnp.broadcast_arrays(*args)
    like = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    (found,) = plgpu.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=1, result_shape_dtypes=[like]
    )
    return found


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
        self.has_full_blocks = self.along % codec.block == 0
        self.has_idle_threads = self.threads % THREADS > 0 or self.across % self.together > 0

    def in_words(self, a):
        """Whether each block has whole words of its own in an array [L, R, C], adjacent in memory."""
        return self.axis == -1 and self.has_full_blocks and a.shape[-1] * a.dtype.itemsize % (4 * self.count) == 0

    def with_length(self, length):
        """Return the shape with another length along the blocked axis."""
        return (*self.shape[:-1], length) if self.axis == -1 else (self.shape[0], length, self.shape[2])

    def here(self):
        """Return (matrix, block along the axis, row or column across, mask of those that exist) of the threads.

        The mask is None if all exist.
        """
        thread = pl.program_id(1) * THREADS + lax.iota(jnp.int32, THREADS)
        is_there, place = thread < self.threads, thread % self.together
        group = thread // self.together
        if self.axis == -1:
            block, group = group % self.count, group // self.count
        else:
            block, group = group // self.groups, group % self.groups
        across = group * self.together + place
        mask = is_there & (across < self.across) if self.has_idle_threads else None
        return pl.program_id(0), block, across, mask

    def index(self, matrix, along, across, length):
        """Return the flat index of an element of [L, ...] whose length along the blocked axis is `length`."""
        if self.axis == -1:
            return (matrix * self.across + across) * length + along
        return (matrix * length + along) * self.across + across


    def masks(self, places, mask):
        """Return for each place of a block the mask of the threads for which it exists; None for all."""
        if self.has_full_blocks:
            return [mask] * len(places)
        is_inside = [place < self.along for place in places]
        return is_inside if mask is None else [mask & each for each in is_inside]


def _encode_blocks(x, tables, *refs, at, codec, dtype, own, rotation, wants_codes, wants_values, machine):
    refs = iter(refs)
    numbers = (next(refs), next(refs)) if codec.noises else None
    codes, headers = (next(refs), next(refs)) if wants_codes else (None, None)
    values = next(refs) if wants_values else None
    matrix, block, across, mask = at.here()
    places = [block * codec.block + i for i in range(codec.block)]
    masks, ats = at.masks(places, mask), [at.index(matrix, place, across, at.along) for place in places]
    if x.dtype == jnp.int32:
        count = codec.block * dtype.itemsize // 4
        words = _load_words(x, at.index(matrix, block * count, across, at.count * count), count, mask)
        xs = _floats(words, dtype, machine)
    else:
        xs = [_load(x.at[i], each).astype(jnp.float32) for i, each in zip(ats, masks, strict=True)]
    if rotation is not None:
        xs = [rounded(y, dtype) for y in _rotated(xs, rotation)]
    end = tables.shape[0] // at.matrices * (matrix + 1) if own else tables.shape[0]
    known = [tables[end - LANES + i] for i in range(codec.scalars)]
    noise = None
    if numbers is not None:
        base, seeds = numbers
        along, other = (1, at.along) if at.axis == -1 else (at.across, 1)
        drawn = [
            codec.noise(base[matrix] + place * along + across * other, seeds[2 * matrix], seeds[2 * matrix + 1])
            for place in places
        ]
        noise = list(zip(*drawn, strict=True))
    words, header, some = codec.encode(
        xs, noise, known, _lookup(tables, at, matrix, own), wants_codes=wants_codes, wants_values=wants_values,
        across=functools.partial(_across, size=codec.block) if codec.is_square else None, machine=machine,
    )  # fmt: skip
    if codes is not None and headers is not None:
        nbytes = codec.block * codec.bits // 8
        if codes.dtype == jnp.int32:
            _store_words(codes, at.index(matrix, block * len(words), across, at.count * len(words)), words, mask)
        else:
            for i in range(nbytes):
                byte = lax.shift_right_logical(words[i // 4], 8 * (i % 4)).astype(jnp.uint8)
                plgpu.store(codes.at[at.index(matrix, block * nbytes + i, across, at.count * nbytes)], byte, mask=mask)
        plgpu.store(headers.at[at.index(matrix, block, across, at.count)], header.astype(jnp.uint8), mask=mask)
    if values is not None:
        _store_values(values, at, (matrix, block, across), some, ats, masks, dtype)


def _decode_blocks(codes, headers, tables, out, *, at, codec, dtype, own):
    matrix, block, across, mask = at.here()
    nbytes = codec.block * codec.bits // 8
    if codes.dtype == jnp.int32:
        count = nbytes // 4
        words = _load_words(codes, at.index(matrix, block * count, across, at.count * count), count, mask)
    else:
        words = [0] * -(-nbytes // 4)
        for i in range(nbytes):
            byte = _load(codes.at[at.index(matrix, block * nbytes + i, across, at.count * nbytes)], mask)
            words[i // 4] = words[i // 4] | byte.astype(jnp.int32) << 8 * (i % 4)
    header = _load(headers.at[at.index(matrix, block, across, at.count)], mask).astype(jnp.int32)
    places = [block * codec.block + i for i in range(codec.block)]
    ats = [at.index(matrix, place, across, at.along) for place in places]
    found = codec.decode(words, header, _lookup(tables, at, matrix, own))
    _store_values(out, at, (matrix, block, across), found, ats, at.masks(places, mask), dtype)


def _load(ref, mask):
    return plgpu.load(ref, mask=mask, other=None if mask is None else 0)


def _load_words(ref, first, count, mask):
    """Return `count` adjacent words for each thread, from the index `first` on; up to four are one instruction."""
    size = min(count, 4)
    words = []
    for start in range(0, count, size):
        index = first[:, None] + (start + lax.iota(jnp.int32, size))[None]
        some = _load(ref.at[index], None if mask is None else jnp.broadcast_to(mask[:, None], index.shape))
        parts = lax.split(some, [1] * size, axis=1) if size > 1 else [some]
        words += [part.reshape(-1) for part in parts]
    return words


def _store_words(ref, first, words, mask):
    """Store adjacent words of each thread, from the index `first` on; up to four are one instruction."""
    size = min(len(words), 4)
    for start in range(0, len(words), size):
        some = words[start : start + size]
        while len(some) > 1:
            half = len(some) // 2
            some = [jnp.stack(pair, axis=-1) for pair in zip(some[:half], some[half:], strict=True)]
        index = first[:, None] + (start + lax.iota(jnp.int32, size))[None]
        where = None if mask is None else jnp.broadcast_to(mask[:, None], index.shape)
        plgpu.store(ref.at[index], some[0].reshape(index.shape), mask=where)


def _floats(words, dtype, machine):
    """Return the float32 values of words that hold numbers of this type, the first in the lowest bits."""
    if dtype != jnp.float32 and machine is None:
        words = [half for word in words for half in (word << 16, word & -(2**16))]
    elif dtype != jnp.float32:
        # LLVM would mask the halves once more for their magnitudes, which cost nothing as modifiers of operands.
        words = [machine.permute(word, jnp.zeros_like(word), half) for word in words for half in (0x1044, 0x3244)]
    return [lax.bitcast_convert_type(word, jnp.float32) for word in words]


def _store_values(ref, at, where, values, ats, masks, dtype):
    """Store the values of blocks, float32 numbers that `dtype` represents."""
    if ref.dtype != jnp.int32:
        for i, mask, value in zip(ats, masks, values, strict=True):
            plgpu.store(ref.at[i], value.astype(dtype), mask=mask)
        return
    words = [lax.bitcast_convert_type(value, jnp.int32) for value in values]
    if dtype != jnp.float32:
        words = [lax.shift_right_logical(a, 16) | b for a, b in zip(words[::2], words[1::2], strict=True)]
    matrix, block, across = where
    _store_words(ref, at.index(matrix, block * len(words), across, at.count * len(words)), words, masks[0])


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
