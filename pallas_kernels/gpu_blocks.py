"""Block-scaled encoding and decoding on NVIDIA GPUs, in one pass over a matrix.

The interface is that of `pallas_kernels.tpu_blocks`: the number format's arithmetic is passed as a `Codec`. Each thread
processes a whole block, so that its scale is computed once and its values stay in registers. With blocks along rows
(axis=-2) adjacent threads read adjacent columns, in most formats two each if their number is even. With blocks along
columns (axis=-1) each thread reads the bytes of its own block, which lie in one sector, as words of 32 bits. The blocks
of a square belong to adjacent threads. Only requested outputs are written to memory.

The values of blocks are one array [places, *slots], whose last axis is the threads. Triton then keeps all places of a
slot in one thread, without being told. It compares each load and store with all operations of a kernel, so a kernel
with an array, a load and a store for each place took up to 16 times as long to compile.

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

from pallas_kernels.tpu_blocks import LANES, Codec, Noise, Rotation
from pallas_kernels.varying import results_of

__all__ = ["Noise", "decode", "encode", "peaks", "supports", "tables"]

THREADS = 128
PARTS = 4096  # maxima of parts of a tensor that `tables` takes


def supports(codec: Codec, x: Any, axis: int, rotation: Rotation | None = None) -> str | None:
    """Return the reason why `encode` cannot take an array or shape x [L, R, C]; None if it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"values must be float32, bfloat16 or float16, got {x.dtype}"
    if axis not in (-1, -2):
        return f"blocks must lie along one of the last two axes, got {axis}"
    if codec.corrects_runs and rotation is None:
        return "it corrects runs of a rotation, got none"
    if rotation is not None:
        run = max(rotation.size, codec.block)
        if run % min(rotation.size, codec.block) or run // codec.block > 8 or x.shape[axis] % run:
            return f"it rotates whole runs of up to 8 blocks of {codec.block}, got {x.shape[axis]} in {rotation.size}"
    at = _Blocks(x.shape, axis, codec, rotation)
    if at.matrices * at.slots * codec.block >= 2**31:
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
    signs: jax.Array | None = None,
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
        ValueError: `supports` returns a reason; noise or signs are missing.
    """
    if reason := supports(codec, x, axis, rotation):
        raise ValueError(reason)
    if codec.noises and noise is None:
        raise ValueError("this codec draws noise, got noise=None: pass a Noise")
    del scalars  # they are in the last row of the tables: a slice of its own would cost a launch
    at, numbers = _Blocks(x.shape, axis, codec, rotation), [tables]
    if codec.noises and noise is not None:
        numbers += [noise.base, noise.strides, noise.seeds]
    numbers += _signs(rotation, signs, at)
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


@functools.partial(jax.jit, static_argnames=("codec", "axis", "rotation", "interpret"))
def peaks(
    x: jax.Array,
    signs: jax.Array | None = None,
    *,
    codec: Codec,
    axis: int,
    rotation: Rotation,
    interpret: Any = False,
) -> jax.Array:
    """Return the largest finite magnitudes of parts of the matrices, rotated in float32: float32 [L, number of parts].

    Blocks with a NaN or an infinity are left out. Arguments are those of `encode`.
    """
    at = _Blocks(x.shape, axis, codec, rotation)
    body = functools.partial(_peaks_of_blocks, at=at, codec=codec, dtype=x.dtype, rotation=rotation,
                             machine=None if interpret else Instructions)  # fmt: skip
    shape = jax.ShapeDtypeStruct((at.matrices, pl.cdiv(at.slots, at.width)), jnp.int32)
    bits = _run(body, "peaks_of_blocks", at, [x], _signs(rotation, signs, at), [shape], interpret)[0]
    return lax.bitcast_convert_type(bits, jnp.float32)


def _signs(rotation, signs, at):
    """Return the list of signs that a kernel is handed: float32 [L, size], or none where it knows a thread's."""
    if not _takes_signs(rotation, at):
        return []
    if rotation.signs is not None:
        signs = jnp.array(rotation.signs, jnp.float32)
    if signs is None:
        raise ValueError("this rotation has no signs of its own, got signs=None: pass float32 [L, size]")
    return [jnp.broadcast_to(signs, (at.matrices, rotation.size))]


def _takes_signs(rotation, at):
    return rotation is not None and (rotation.signs is None or at.run > 1)


@functools.partial(jax.jit, static_argnames=("codec", "interpret"))
def tables(
    codec: Codec, maxima: jax.Array, *, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return each tensor's amax and factor [L], and the scalars and tables of `encode`, as `tpu_blocks.tables`."""
    count, size = maxima.shape
    rows = jax.eval_shape(codec.rows_of_table, jax.ShapeDtypeStruct((LANES,), jnp.float32))[1]
    rows = -(-(sum(map(len, rows)) + 1) // 8) * 8
    whole, maxima = pl.BlockSpec(memory_space=pl.ANY), maxima.reshape(-1)
    written = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (count, count, count * rows * LANES)]
    amax, factor, table = pl.pallas_call(
        functools.partial(_fill_table, size=size, codec=codec, machine=None if interpret else Instructions),
        out_shape=results_of([maxima], written),
        grid=(count,),
        in_specs=[whole],
        out_specs=[whole] * 3,
        compiler_params=plgpu.CompilerParams(num_warps=THREADS // 32, num_stages=1),
        interpret=interpret,
        name="fill_table",
    )(maxima)
    table = table.reshape(count, rows, LANES)
    return (amax, factor), (table[:, -1, : codec.scalars], table)


@functools.partial(jax.jit, static_argnames=("codec", "axis", "length", "dtype", "interpret"))
def decode(
    codes: jax.Array,
    headers: jax.Array,
    amax: jax.Array | None,
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
    numbers = [] if amax is None else [amax]
    body = functools.partial(
        _decode_blocks, at=at, codec=codec, dtype=dtype, machine=None if interpret else Instructions
    )
    shapes = [jax.ShapeDtypeStruct(tuple(shape), dtype)]
    (values,) = _run(body, "decode_blocks", at, [codes, headers], numbers, shapes, interpret)
    return values


def _run(body, name, at, arrays, numbers, shapes, interpret):
    whole = pl.BlockSpec(memory_space=pl.ANY)
    flat = [jax.ShapeDtypeStruct((math.prod(s.shape),), s.dtype) for s in shapes]
    flat = [
        jax.ShapeDtypeStruct((f.size * f.dtype.itemsize // 4,), jnp.int32) if at.in_words(s) else f
        for f, s in zip(flat, shapes, strict=True)
    ]
    args = [_as_words(a) if at.in_words(a) or at.in_pairs(a) else a.reshape(-1) for a in arrays]
    args += [a.reshape(-1) for a in numbers]
    moved = sum(a.size * a.dtype.itemsize for a in [*args, *shapes])
    found = pl.pallas_call(
        body,
        out_shape=results_of(args, flat),
        grid=(at.matrices, pl.cdiv(at.slots, at.width)),
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
    def quotient(a: jax.Array, b: jax.Array) -> jax.Array:
        """Return a / b, correctly rounded."""
        return _asm("div.rn.f32 $0, $1, $2;", "=f,f,f", a, b)

    @staticmethod
    def bfloat16(a: jax.Array, b: jax.Array) -> jax.Array:
        """Return the int32 of two floats rounded to bfloat16, a in the upper half."""
        return _asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", a, b, dtype=jnp.int32)

    @staticmethod
    def permute(a: jax.Array, b: jax.Array, selector: Any) -> jax.Array:
        """Return the int32 of four bytes of b and a, 7 to 0, whose numbers are the selector's hexadecimal digits.

        A digit is the byte's number, plus 8 to repeat the byte's highest bit. The selector is an int or an int32 array
        of four digits.
        """
        if isinstance(selector, int):
            return _asm(f"prmt.b32 $0, $1, $2, {selector:#x};", "=r,r,r", a, b)
        return _asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", a, b, selector)

    @staticmethod
    def rounded(a: jax.Array, dtype: Any) -> jax.Array:
        """Return float32 numbers rounded to a float type of 16 bits, ties to even."""
        if dtype == jnp.bfloat16:
            return lax.bitcast_convert_type(Instructions.bfloat16(a, jnp.zeros_like(a)), jnp.float32)
        return a.astype(dtype).astype(jnp.float32)  # XLA would simplify it to a


def _asm(text, constraints, *args, dtype=None):
    args = jnp.broadcast_arrays(*args)
    like = jax.ShapeDtypeStruct(args[0].shape, dtype or args[0].dtype)
    (found,) = plgpu.elementwise_inline_asm(
        text, args=args, constraints=constraints, pack=1, result_shape_dtypes=[like]
    )
    return found


class _Blocks:
    """The assignment of a matrix's blocks to threads, such that adjacent threads access adjacent memory.

    A slot is a place for a block; a thread has one or two adjacent slots, and a program `width`. The blocks of a square
    are in `block` adjacent slots; a square at the edge has slots without a block. Those of a run of the rotation are
    adjacent, too.
    """

    def __init__(self, shape, axis, codec, rotation=None):
        self.shape, self.axis, self.block = shape, axis, codec.block
        self.matrices, rows, columns = shape
        self.across, self.along = (rows, columns) if axis == -1 else (columns, rows)
        self.count = -(-self.along // codec.block)  # blocks along the axis
        self.together = codec.block if codec.is_square else 1
        self.groups = -(-self.across // self.together)
        self.slots = self.groups * self.together * self.count
        self.run = 1 if rotation is None else max(rotation.size // codec.block, 1)  # blocks
        self.has_full_blocks = self.along % codec.block == 0
        # A second column would take the registers that many levels need.
        takes_two = axis == -2 and columns % 2 == 0 and self.together * self.run == 1 and codec.levels <= 16
        self.width = THREADS * (2 if takes_two else 1)
        self.has_idle_slots = self.slots % self.width > 0 or self.across % self.together > 0

    def in_words(self, a):
        """Whether each block has whole words of its own in an array [L, R, C], adjacent in memory."""
        return self.axis == -1 and self.has_full_blocks and a.shape[-1] * a.dtype.itemsize % (4 * self.count) == 0

    def in_pairs(self, a):
        """Whether words of an array [L, R, C] have the values of a thread's two columns."""
        return self.width > THREADS and a.dtype.itemsize == 2

    def with_length(self, length):
        """Return the shape with another length along the blocked axis."""
        return (*self.shape[:-1], length) if self.axis == -1 else (self.shape[0], length, self.shape[2])

    def here(self, *, firsts=False):
        """Return (matrix, block along the axis, row or column across, mask of those that exist) of the slots.

        They are [THREADS], or [2, THREADS] where a thread has two, of which `firsts` leaves the first. The mask is None
        if all exist.
        """
        # Division that rounds down, as by `//`, would hide from Triton which words of a block are adjacent.
        count, thread = self.width // THREADS, lax.iota(jnp.int32, THREADS)
        if self.axis == -2:  # hide which columns are: Triton would have threads load parts of several columns at once
            thread = thread & (THREADS - 1)
        slot = pl.program_id(1) * self.width + thread * count
        slot = slot if firsts or count == 1 else _counted(slot, count)
        is_there, place = slot < self.slots, lax.rem(slot, self.together)
        group = lax.div(slot, self.together)
        if self.axis == -1:
            block, group = lax.rem(group, self.count), lax.div(group, self.count)
        else:
            within, group = lax.rem(group, self.run), lax.div(group, self.run)
            block, group = lax.div(group, self.groups) * self.run + within, lax.rem(group, self.groups)
        across = group * self.together + place
        mask = is_there & (across < self.across) if self.has_idle_slots else None
        return pl.program_id(0), block, across, mask

    def index(self, matrix, along, across, length):
        """Return the flat index of an element of [L, ...] whose length along the blocked axis is `length`."""
        if self.axis == -1:
            return (matrix * self.across + across) * length + along
        return (matrix * length + along) * self.across + across

    def elements(self, matrix, block, across, mask):
        """Return the flat indices of the values of blocks, [B, *slots], and the mask of those that exist."""
        along = _counted(block * self.block, self.block)
        if not self.has_full_blocks:
            mask = along < self.along if mask is None else (along < self.along) & mask[None]
        return self.index(matrix, along, across[None], self.along), mask


def _fill_table(maxima, amax, factor, table, *, size, codec, machine):
    """Write a tensor's amax, the largest of `size` maxima, its factor, and its table for `encode`."""
    matrix, lane = pl.program_id(0), lax.iota(jnp.int32, LANES)
    width = min(1024, pl.next_power_of_2(size))
    largest = jnp.zeros(width, jnp.float32)
    for start in range(0, size, width):
        place = start + lax.iota(jnp.int32, width)
        mask = None if start + width <= size else place < size
        largest = jnp.maximum(largest, _load(maxima, matrix * size + place, mask))
    peak = jnp.max(largest)
    amax[matrix] = jnp.max(codec.stored_amax(jnp.full(LANES, peak), machine))
    peaks = jnp.full(LANES, peak)
    plgpu.store(factor.at[matrix + lane], codec.factor(peaks, machine), mask=lane == 0)
    numbers, rows = codec.rows_of_table(peaks, machine)
    last = jnp.zeros(LANES, jnp.float32)
    for i, number in enumerate(numbers):
        last = jnp.where(lane == i, number, last)
    height, first = table.shape[0] // amax.shape[0] // LANES, matrix * (table.shape[0] // amax.shape[0])
    rows += [jnp.zeros((1, LANES), jnp.float32)] * (height - 1 - sum(map(len, rows)))
    for some in [*rows, last[None]]:
        row = lax.broadcasted_iota(jnp.int32, some.shape, 0)
        plgpu.store(table.at[first + row * LANES + lane[None]], some)
        first += some.size


def _encode_blocks(x, tables, *refs, at, codec, dtype, own, rotation, wants_codes, wants_values, machine):
    refs = iter(refs)
    numbers = [next(refs) for _ in range(3)] if codec.noises else None
    signs = next(refs) if _takes_signs(rotation, at) else None
    codes, headers = (next(refs), next(refs)) if wants_codes else (None, None)
    values = next(refs) if wants_values else None
    matrix, block, across, mask = where = at.here()
    xs = _load_blocks(x, at, where, dtype, machine)
    if rotation is not None:
        xs = _rotated(xs, rotation, signs, at, matrix, block)
        xs = xs if codec.corrects_runs else codec.rounded(xs, machine)
    end = tables.shape[0] // at.matrices * (matrix + 1) if own else tables.shape[0]
    known = [tables[end - LANES + i] for i in range(codec.scalars)]
    noise = None
    if numbers is not None:
        base, strides, seeds = numbers
        row, column = strides[0], strides[1]
        along, other = (column, row) if at.axis == -1 else (row, column)
        first, key = base[matrix] + across * other, (seeds[2 * matrix], seeds[2 * matrix + 1])
        if codec.corrects_runs:
            noise = codec.noise((first + block * along)[None], *key)[0]
        elif at.axis == -1 and at.has_full_blocks:  # a block's indices differ in their lowest bits
            low = _counted(jnp.zeros_like(block), codec.block)
            noise = [[each] for each in codec.noise((first + block * codec.block)[None], *key, low)]
        else:
            index = first[None] + _counted(block * codec.block, codec.block) * along
            noise = [[each] for each in codec.noise(index, *key)]
    meet = functools.partial(_across, size=codec.block) if codec.is_square else None
    if codec.corrects_runs and at.run > 1:
        meet = functools.partial(_over_run, count=at.run)
    words, header, some = codec.encode(
        [xs], noise, known, _lookup(tables, at, matrix, own), wants_codes=wants_codes, wants_values=wants_values,
        across=meet, machine=machine,
    )  # fmt: skip
    words, header = [word.reshape(block.shape) for word in words], header.reshape(block.shape)
    if codes is not None and headers is not None:
        nbytes = codec.block * codec.bits // 8
        if codes.dtype == jnp.int32:
            first, size = at.index(matrix, block * len(words), across, at.count * len(words)), _at_once(len(words))
            _store_words(codes, first, [_stacked(words[i : i + size]) for i in range(0, len(words), size)], mask)
        else:
            parts = [lax.shift_right_logical(words[i // 4], 8 * (i % 4)).astype(jnp.uint8) for i in range(nbytes)]
            size = nbytes & -nbytes  # shapes are powers of two
            for start in range(0, nbytes, size):
                rows = _stacked(parts[start : start + size])
                _store_rows(codes, rows, block * nbytes + start, at.count * nbytes, at, where)
        _store(headers, at.index(matrix, block, across, at.count), header.astype(jnp.uint8), mask)
    if values is not None:
        _store_values(values, at, where, some[0], dtype)


def _decode_blocks(codes, headers, *refs, at, codec, dtype, machine):
    *maxima, out = refs
    matrix, block, across, mask = where = at.here()
    nbytes = codec.block * codec.bits // 8
    if codes.dtype == jnp.int32:
        count = nbytes // 4
        some = _load_words(codes, at.index(matrix, block * count, across, at.count * count), count, mask)
        words = [word for each in some for word in _parted(each)]
    else:
        size, words, some = nbytes & -nbytes, [0] * -(-nbytes // 4), []
        for start in range(0, nbytes, size):
            along = _counted(block * nbytes + start, size)
            some.append(_load(codes, at.index(matrix, along, across[None], at.count * nbytes), mask))
        for i, byte in enumerate(byte for each in some for byte in _parted(each.astype(jnp.int32))):
            words[i // 4] = words[i // 4] | byte << 8 * (i % 4)
    header = _load(headers, at.index(matrix, block, across, at.count), mask).astype(jnp.int32)
    amax = maxima[0][matrix if maxima[0].shape[0] > 1 else 0] if maxima else None
    found = codec.decode_by_arithmetic(words, header, amax, machine)
    _store_values(out, at, where, _stacked(found), dtype)


def _peaks_of_blocks(x, *refs, at, codec, dtype, rotation, machine):
    *signs, out = refs
    matrix, block, _, mask = where = at.here()
    xs = _load_blocks(x, at, where, dtype, machine)
    xs = _rotated(xs, rotation, signs[0] if signs else None, at, matrix, block)
    bits = jnp.max(lax.bitcast_convert_type(jnp.abs(xs), jnp.int32), axis=0)
    peak = jnp.where(bits < 0x7F800000, bits, 0)
    peak = peak if mask is None else jnp.where(mask, peak, 0)
    plgpu.store(out.at[matrix * (out.shape[0] // at.matrices) + pl.program_id(1)], jnp.max(peak))


def _counted(first, count):
    """Return first, first + 1, ... as int32 [count, *first.shape]."""
    return first[None] + lax.broadcasted_iota(jnp.int32, (count, *first.shape), 0)


def _stacked(arrays):
    """Return a power of two of arrays as the rows of one array; each thread keeps its numbers."""
    if len(arrays) == 1:
        return arrays[0][None]
    half = len(arrays) // 2
    pair = [_stacked(some) if half > 1 else some[0] for some in (arrays[:half], arrays[half:])]
    return jnp.moveaxis(jnp.stack(pair, -1), -1, 0).reshape(len(arrays), *arrays[0].shape)


def _parted(array):
    """Return the rows of an array, a power of two; each thread keeps its numbers."""
    if len(array) == 1:
        return [array.reshape(array.shape[1:])]
    halves = array.reshape(2, -1, *array.shape[1:])
    return [row for half in jnp.unstack(jnp.moveaxis(halves, 0, -1), axis=-1) for row in _parted(half)]


def _load(ref, index, mask):
    """Load from flat indices, 0 where the mask is not set."""
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=jnp.broadcast_to(mask, index.shape), other=0)


def _store(ref, index, value, mask):
    """Store to flat indices where the mask is set."""
    plgpu.store(ref.at[index], value, mask=None if mask is None else jnp.broadcast_to(mask, index.shape))


def _store_rows(ref, rows, first, length, at, where):
    """Store rows [n, *slots] from the index `first` on along the blocked axis of an array, which has this length."""
    matrix, _, across, mask = where
    if mask is None and at.has_full_blocks:
        _store(ref, at.index(matrix, _counted(first, len(rows)), across[None], length), rows, None)
        return
    # What is not there has the index of something else. The interpreter writes to it what was there before, which one
    # store of all rows might do after the new value: so each row has a store of its own.
    for i, row in enumerate(_parted(rows)):
        is_there = first + i < length if mask is None else (first + i < length) & mask
        _store(ref, at.index(matrix, first + i, across, length), row, is_there)


def _load_blocks(x, at, where, dtype, machine):
    """Return the float32 values of blocks, [B, *slots], from an array of this type or from its words."""
    if x.dtype != jnp.int32:
        index, mask = at.elements(*where)
        return _load(x, index, mask).astype(jnp.float32)
    if at.axis == -2:
        index, mask = at.elements(*at.here(firsts=True))
        words = _load(x, lax.shift_right_logical(index, 1), mask)
        return jnp.moveaxis(jnp.stack(_halves(words, dtype, machine), -1), -1, 1)
    matrix, block, across, mask = where
    count = at.block * dtype.itemsize // 4
    words = _stacked(_load_words(x, at.index(matrix, block * count, across, at.count * count), count, mask))
    words = words.reshape(count, *block.shape)
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(words, jnp.float32)
    halves = jnp.stack(_halves(words, dtype, machine), -1)
    return jnp.moveaxis(halves, -1, 1).reshape(at.block, *block.shape)


def _load_words(ref, first, count, mask):
    """Return `count` adjacent words for each thread, from the index `first` on, as arrays [up to 4, *slots].

    One instruction loads each array.
    """
    size, arrays = _at_once(count), []
    for start in range(0, count, size):
        words = _load(ref, _adjacent(first, start, size), None if mask is None else mask[..., None])
        arrays.append(jnp.moveaxis(words, -1, 0))
    return arrays


def _adjacent(first, start, size):
    """Return first + start, first + start + 1, ... as int32 [*slots, size], which Triton sees to be adjacent."""
    return first[..., None] + (start + lax.broadcasted_iota(jnp.int32, (*first.shape, size), first.ndim))


def _at_once(count):
    """Return how many of `count` words one instruction moves: shapes are powers of two."""
    return min(count & -count, 4)


def _store_words(ref, first, arrays, mask):
    """Store adjacent words of each thread, from the index `first` on, given as by `_load_words`."""
    for i, words in enumerate(arrays):
        index = _adjacent(first, i * len(words), len(words))
        _store(ref, index, jnp.moveaxis(words, 0, -1), None if mask is None else mask[..., None])


def _halves(words, dtype, machine):
    """Return the float32 values of the lower and of the upper halves of words, numbers of a type of 16 bits."""
    if dtype == jnp.float16:
        halves = [half.astype(jnp.int16) for half in (words, lax.shift_right_logical(words, 16))]
        return [lax.bitcast_convert_type(half, dtype).astype(jnp.float32) for half in halves]
    if machine is None:
        halves = words << 16, words & -(2**16)
    else:
        # LLVM would mask the halves once more for their magnitudes, which cost nothing as modifiers of operands.
        halves = [machine.permute(words, jnp.zeros_like(words), half) for half in (0x1044, 0x3244)]
    return [lax.bitcast_convert_type(half, jnp.float32) for half in halves]


def _store_values(ref, at, where, values, dtype):
    """Store the values of blocks [B, *slots], float32 numbers that `dtype` represents."""
    matrix, block, across, mask = where
    if ref.dtype != jnp.int32:
        _store_rows(ref, values.astype(dtype), block * at.block, at.along, at, where)
        return
    if dtype == jnp.float16:
        words = lax.bitcast_convert_type(values.astype(dtype), jnp.uint16).astype(jnp.int32)
    else:
        words = lax.bitcast_convert_type(values, jnp.int32)
    if dtype != jnp.float32:
        low, high = jnp.unstack(jnp.moveaxis(words.reshape(-1, 2, *block.shape), 1, -1), axis=-1)
        words = low | high << 16 if dtype == jnp.float16 else lax.shift_right_logical(low, 16) | high
    count = len(words)
    some = _parted(words.reshape(-1, _at_once(count), *block.shape))
    _store_words(ref, at.index(matrix, block * count, across, at.count * count), some, mask)


def _rotated(xs, rotation, signs, at, matrix, block):
    """Return the rotated values of blocks, [B, *slots]; a run lies in one thread, or in adjacent ones."""
    shape, within = xs.shape, min(rotation.size, at.block)
    if signs is None:
        minus = sum((-1 if i == 31 else 1) << i for i, sign in enumerate(rotation.signs) if sign < 0)
        place = lax.broadcasted_iota(jnp.int32, (within, *block.shape), 0)
        factors = (1 - 2 * (jnp.int32(minus) >> place & 1)).astype(jnp.float32)
    else:
        first = matrix * rotation.size + block % at.run * within
        factors = _stacked(_load_words(signs, first, within, None)).reshape(within, *block.shape)
    xs = xs.reshape(-1, *factors.shape) * factors[None]
    distance = 1
    while distance < within:
        xs = _butterflies(xs.reshape(-1, 2, distance, *block.shape), 1)
        distance *= 2
    distance = 1
    while distance < at.run:
        xs = _butterflies(xs.reshape(at.block, -1, 2, distance), 2)
        distance *= 2
    return xs.reshape(shape) * jnp.float32(rotation.size**-0.5)


def _butterflies(a, axis):
    """Return the sum and the difference of the two halves along an axis of two."""
    sign = jnp.where(lax.broadcasted_iota(jnp.int32, a.shape, axis) == 0, 1.0, -1.0)
    return _partner(a, axis) + sign * a


def _partner(a, axis):
    """Swap the two halves along an axis of two: bits of both, added up, less one's own."""
    bits = lax.bitcast_convert_type(a, jnp.int32)
    both = jnp.sum(bits, axis=axis, dtype=jnp.int32, keepdims=True)
    return lax.bitcast_convert_type(both - bits, jnp.float32)


def _over_run(op, a, count):
    """Reduce every `count` adjacent threads by a commutative op, the farthest threads first."""
    shape = a.shape
    while count > 1:
        count //= 2
        a = a.reshape(-1, 2, count)
        a = op(a, _partner(a, 1))
    return a.reshape(shape)


def _across(op, a, size):
    """Reduce every `size` adjacent threads by op, as a balanced tree that combines the farthest threads first."""
    shape, a = a.shape, a.reshape(-1, size)
    while a.shape[1] > 1:
        a = op(*lax.split(a, [a.shape[1] // 2] * 2, axis=1))
    return jnp.broadcast_to(a, (a.shape[0], size)).reshape(shape)


def _lookup(tables, at, matrix, own):
    first = matrix * (tables.shape[0] // at.matrices) if own else 0
    return lambda row, index: plgpu.load(tables.at[first + row * LANES + index])
