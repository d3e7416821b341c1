"""Block-scaled encoding and decoding on TPUs, in one pass over a matrix.

    codes, headers = encode(x)        values = decode(codes, headers)        values = decode(encode(x)), in one pass

A vector register [8, 128] is called a place here: it holds the i-th value of 1024 blocks, one block at each position. A
block of n values spans n places. So a block's scale is computed once, and its values are combined by operations between
registers, without moving data across lanes. The number format's arithmetic is passed as a `Codec`, functions of places.
With blocks along rows (axis=-2) a place is a strided load of rows. With blocks along lanes (axis=-1) a tile is first
transposed in VMEM, and its results are transposed back.

x [L, R, C] holds L matrices, each with its own scalars and table. A short last block along the blocked axis is padded
with zeros. Only requested outputs are written to memory.

This module has not run on a TPU. It is compiled for v5e, v6e and v7x and run in the interpreter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.varying import results_of

LANES, SUBLANES = 128, 8
PARTS = 1  # maxima of parts of a tensor that `tables` takes
_HIGH = -(2**16)  # a mask of a word's upper half
# The float32 bits of the least magnitude that a dtype rounds to infinity.
_INFINITE = {jnp.dtype("float32"): 0x7F800000, jnp.dtype("bfloat16"): 0x7F7F8000, jnp.dtype("float16"): 0x477FF000}

Lookup = Callable[[int, jax.Array], jax.Array]  # (row of the table, int32 indices in the row) -> float32


class Codec(Protocol):
    """The arithmetic of a format on places, arrays [8, 128].

    Attributes:
        block: number of values per block.
        bits: number of bits per code.
        noises: number of random numbers per element.
        scalars: number of scalars that `encode` takes, with which the last row of the encoder's table begins.
        levels: number of values in a block's table, among which `encode` selects.
        is_square: whether blocks are square: `block` adjacent blocks share their scale and choice.
        corrects_runs: whether each block draws one random number, and the blocks of a run of the rotation depend on
            each other. Rotated numbers then stay float32, and are not rounded to the dtype of x.
    """

    block: int
    bits: int
    noises: int
    scalars: int
    levels: int
    is_square: bool
    corrects_runs: bool

    def encoder_tables(self, amax: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Return the scalars and tables of `encode` for tensors with these maxima [count], computed by XLA."""
        ...

    def factor(self, amax: jax.Array, machine: Any = None) -> jax.Array:
        """Return the factor by which a tensor with this amax multiplies the values of its blocks."""
        ...

    def rows_of_table(
        self, amax: jax.Array, machine: Any = None
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return the scalars [128] and the first rows, arrays [n, 128], of a table, computed in a kernel from amax."""
        ...

    def stored_amax(self, amax: jax.Array, machine: Any = None) -> jax.Array:
        """Return the number that decoders take, for a tensor with this largest magnitude."""
        ...

    def noise(self, index: jax.Array, k0: Any, k1: Any, low: Any = 0) -> list[jax.Array]:
        """Return the noise of the elements with these indices, for the key words k0 and k1.

        `low` is added to indices that end in zeros for its bits.
        """
        ...

    def encode(
        self, xs: Sequence[jax.Array], noise: Any, scalars: Sequence[Any], lookup: Lookup, *, wants_codes: bool,
        wants_values: bool, across: Callable[[Any, jax.Array], jax.Array] | None = None, machine: Any = None,
    ) -> tuple[Sequence[jax.Array], jax.Array, Sequence[jax.Array]]:  # fmt: skip
        """Encode float32 places to (int32 words of codes, int32 header, float32 values rounded to the dtype of x).

        xs are an array for each place, or one array [places, ...]; noise and values are like them, and words and header
        then [1, ...].
        For square blocks, `across(op, place)` reduces a place over the blocks of each square by a commutative op; for
        `corrects_runs`, over those of each run.
        `machine` has instructions as those of `gpu_blocks.Instructions`; None if the device has none of them.
        """
        ...

    def rounded(self, value: jax.Array, machine: Any = None) -> jax.Array:
        """Return float32 numbers rounded to the dtype of x."""
        ...

    def decode(
        self, words: Sequence[jax.Array], header: jax.Array, lookup: Lookup, *, machine: Any = None
    ) -> Sequence[jax.Array]:  # fmt: skip
        """Return the float32 values of a block, rounded to the dtype of the result."""
        ...

    def decode_by_arithmetic(
        self, words: Sequence[jax.Array], header: jax.Array, amax: jax.Array | None, machine: Any = None
    ) -> Sequence[jax.Array]:
        """Return the same from a scalar amax, without a table; None leaves the tensor's factor out."""
        ...

    def decoder_table(self, amax: jax.Array | None, count: int) -> jax.Array:
        """Return the table of `decode` for tensors with these maxima [count], computed by XLA; [1] without amax."""
        ...


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A Hadamard transform of runs of 16, 32, 64 or 128 along the blocked axis, applied before encoding.

    Attributes:
        size: the length of a run.
        signs: factors +-1 by which a run is multiplied first; None if they are an argument of `encode`.
    """

    size: int
    signs: tuple[int, ...] | None = None


class Noise(NamedTuple):
    """The element indices and seeds from which noise is drawn.

    Attributes:
        base: int32 [L], the index of each matrix's first element.
        strides: int32 [2], the difference of element indices between adjacent rows and between adjacent columns.
        seeds: int32 [L, 2], two key words for each matrix.
    """

    base: jax.Array
    strides: jax.Array
    seeds: jax.Array


def supports(codec: Codec, x: Any, axis: int, rotation: Rotation | None = None) -> str | None:
    """Return the reason why `encode` cannot take an array or shape x [L, R, C]; None if it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"values must be float32, bfloat16 or float16, got {x.dtype}"
    if axis not in (-1, -2):
        return f"blocks must lie along one of the last two axes, got {axis}"
    run = 0 if rotation is None else rotation.size
    if codec.corrects_runs and (not run or _Tile.of(x.shape, axis, codec).unit != codec.block):
        return "it corrects runs of a rotation, of blocks that fill whole words"
    if codec.corrects_runs and SUBLANES * codec.block % run:
        return f"it corrects runs of up to {SUBLANES} blocks, got {run} values"
    if codec.block * codec.bits > 32 * 32:
        return f"a block has too many bits for registers: {codec.block} x {codec.bits}"
    if x.shape[0] > 2048:
        return f"scalar memory has room for what 2048 matrices have of their own, got {x.shape[0]}"
    if rotation is not None and x.shape[axis] % rotation.size:
        return f"it rotates whole runs of {rotation.size}, got {x.shape[axis]} values"
    if rotation is not None and _Tile.of(x.shape, axis, codec).length % (SUBLANES * rotation.size):
        return f"its tiles hold no {SUBLANES} runs of {rotation.size}"
    return None


def tables(
    codec: Codec, maxima: jax.Array, *, interpret: Any = False
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Return each tensor's stored amax and factor [L], and the scalars and tables of `encode`.

    `maxima` [L, at most PARTS] are those of parts of each tensor. `interpret` is for the GPU's, which is a kernel.
    """
    del interpret
    amax = maxima.max(1)
    return (codec.stored_amax(amax), codec.factor(amax)), codec.encoder_tables(amax, len(amax))


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
    """Return codes and headers, or their decoded values, or both: [codes, headers, values], each if requested.

    Args:
        x: float32, bfloat16 or float16 [L, R, C].
        scalars: float32 [L, s], or [1, s] shared by all matrices: arguments of the codec's `encode`.
        tables: float32 [L, rows, 128], or [1, rows, 128] shared by all; rows a multiple of 8: its look-up table, whose
            last row begins with the scalars, which the GPU's kernel reads there.
        noise: required if the codec draws noise.
        signs: float32 [size] or [L, size], required if the rotation's signs are None.
        axis: the blocked axis, -1 or -2.
        rotation: applied to runs along the axis before encoding; None for none.

    Returns:
        uint8 codes, packed along the axis from the lowest bits of a byte, [L, R, C / 8 * bits] or [L, R / 8 * bits, C],
        with a short last block padded to a full one; uint8 headers, one per block; values with x's shape and dtype.

    Raises:
        ValueError: `supports` returns a reason; noise or signs are missing.
    """
    if reason := supports(codec, x, axis, rotation):
        raise ValueError(reason)
    tile = _Tile.of(x.shape, axis, codec)
    count, wide = x.shape[0], 1 if x.dtype == jnp.float32 else 2
    args, specs = [scalars, tables, x], [_SCALARS, _table_spec(tables), tile.spec(1, 1)]
    if codec.noises:
        if noise is None:
            raise ValueError("this codec draws noise, got noise=None: pass a Noise")
        numbers = jnp.concatenate(
            [noise.base[:, None], jnp.broadcast_to(noise.strides, (count, 2)), noise.seeds], axis=1
        )
        args.append(numbers)
        specs.append(_SCALARS)
    if rotation is not None and rotation.signs is None:
        if signs is None:
            raise ValueError("this rotation has no signs of its own, got signs=None: pass float32 [size]")
        args.append(signs.reshape(-1, rotation.size))
        specs.append(_SCALARS)
    out_shape, out_specs, scratch = [], [], []
    if wants_codes:
        out_shape += [tile.shape(count, codec.bits, 8, jnp.uint8), tile.shape(count, 1, codec.block, jnp.uint8)]
        out_specs += [tile.spec(codec.bits, 8), tile.spec(1, codec.block)]
        scratch += [pltpu.VMEM((tile.length * codec.bits // 32, LANES), jnp.int32)]
        scratch += [pltpu.VMEM((tile.length // codec.block, LANES), jnp.int32)]
    if wants_values:
        out_shape.append(jax.ShapeDtypeStruct(x.shape, x.dtype))
        out_specs.append(tile.spec(1, 1))
    wide = 1 if codec.corrects_runs else wide
    scratch.append(pltpu.VMEM((tile.length // wide, LANES), jnp.float32 if wide == 1 else jnp.int32))
    body = functools.partial(
        _encode_tile, tile=tile, codec=codec, rotation=rotation, wants_codes=wants_codes, wants_values=wants_values,
        dtype=x.dtype,
    )  # fmt: skip
    return _run(body, "encode_blocks", args, specs, out_shape, out_specs, scratch, tile, count, interpret)


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
    """Return the values [L, R, C] of codes and headers that `encode` returned.

    Args:
        amax: float32 [L], or [1] shared by all matrices; None leaves the tensor's factor out.
        length: the length of the blocked axis.
        dtype: the dtype of the values.
    """
    count, *shape = codes.shape
    shape[axis] = length
    tile = _Tile.of((count, *shape), axis, codec)
    tables = codec.decoder_table(amax, 1 if amax is None else len(amax))
    wide = 1 if dtype == jnp.float32 else 2
    scratch = [
        pltpu.VMEM((tile.length * codec.bits // 32, LANES), jnp.int32),
        pltpu.VMEM((tile.length // codec.block, LANES), jnp.int32),
        pltpu.VMEM((tile.length // wide, LANES), jnp.float32 if wide == 1 else jnp.int32),
    ]
    (out,) = _run(
        functools.partial(_decode_tile, tile=tile, codec=codec, dtype=dtype), "decode_blocks", [tables, codes, headers],
        [_table_spec(tables), tile.spec(codec.bits, 8), tile.spec(1, codec.block)],
        [jax.ShapeDtypeStruct((count, *shape), dtype)], [tile.spec(1, 1)], scratch, tile, count, interpret,
    )  # fmt: skip
    return out


@functools.partial(jax.jit, static_argnames=("codec", "axis", "rotation", "interpret"))
def peaks(
    x: jax.Array, signs: jax.Array, *, codec: Codec, axis: int, rotation: Rotation, interpret: Any = False
) -> jax.Array:
    """Return float32 [L, n] whose maxima are the largest finite magnitudes of x [L, R, C], rotated in float32.

    Blocks with a NaN or an infinity are left out. Arguments are those of `encode`, which takes x.
    """
    body = functools.partial(_peaks_of_tile, block=codec.block, end=0x7F800000)
    return _peaks(body, "peaks_of_blocks", x, [signs.reshape(-1, rotation.size)], codec, axis, rotation, interpret)


@functools.partial(jax.jit, static_argnames=("codec", "axis", "rotation", "keeps_infinity", "interpret"))
def rotated_peaks(
    x: jax.Array, *, codec: Codec, axis: int, rotation: Rotation, keeps_infinity: bool, interpret: Any = False
) -> jax.Array:  # fmt: skip
    """Return float32 [L, n] whose maxima are the largest finite magnitudes of x [L, R, C], rotated and rounded.

    `supports` allows x, axis and rotation; the rotation has signs of its own. NaN is left out, and infinity unless
    `keeps_infinity`.
    """
    # Rounding keeps the order, so it is left until the end; magnitudes from `end` on do not count.
    end = 0x7F800001 if keeps_infinity else _INFINITE[x.dtype]
    body = functools.partial(_peaks_of_tile, block=1, end=end, rounded=codec.rounded)
    return _peaks(body, "rotated_peaks", x, [], codec, axis, rotation, interpret)


def _peaks(body, name, x, signs, codec, axis, rotation, interpret):
    tile, count = _Tile.of(x.shape, axis, codec), len(x)
    words = (tile.length, jnp.float32) if x.dtype == jnp.float32 else (tile.length // 2, jnp.int32)
    (found,) = _run(
        functools.partial(body, tile=tile, rotation=rotation, dtype=x.dtype), name, [x, *signs],
        [tile.spec(1, 1)] + [_SCALARS] * len(signs), [jax.ShapeDtypeStruct((count, SUBLANES, LANES), jnp.float32)],
        [pl.BlockSpec((None, SUBLANES, LANES), lambda matrix, i, j: (matrix, 0, 0))],
        [pltpu.VMEM((words[0], LANES), words[1])], tile, count, interpret, gathers=True,
    )  # fmt: skip
    return found.reshape(count, -1)


def _run(body, name, args, specs, out_shape, out_specs, scratch, tile, count, interpret, gathers=False):
    """Call a kernel for each tile of each matrix. `gathers`: the tiles of a matrix add to one result, in order."""
    order: Any = "arbitrary" if gathers else "parallel"
    moved = sum(a.size * a.dtype.itemsize for a in [*args, *out_shape])
    # Mosaic does not load float16, so kernels see its bits.
    args = [lax.bitcast_convert_type(a, jnp.int16) if a.dtype == jnp.float16 else a for a in args]
    written = [jax.ShapeDtypeStruct(a.shape, jnp.int16) if a.dtype == jnp.float16 else a for a in out_shape]
    results = pl.pallas_call(
        body,
        out_shape=results_of(args, written),
        grid=(count, *tile.grid),
        in_specs=specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", order, order)),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),  # each array is moved once
        interpret=interpret,
        name=name,
    )(*args)
    return [
        lax.bitcast_convert_type(r, a.dtype) if a.dtype == jnp.float16 else r
        for r, a in zip(results, out_shape, strict=True)
    ]


_SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def _table_spec(tables):
    return pl.BlockSpec((None, *tables.shape[1:]), lambda matrix, i, j: (matrix if len(tables) > 1 else 0, 0, 0))


# --- tiles -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of `length` values along the blocked axis by 128 values across, which become lanes.

    Attributes:
        axis: the blocked axis, -1 or -2.
        sizes: lengths of the matrix along the blocked axis and across it.
        length: the tile's length along the blocked axis; for axis=-1 it has 128 blocks, so that headers fill 128 lanes.
        block: number of values per block.
        unit: number of values processed together: one block, or as many blocks as fill whole 32-bit words.
    """

    axis: int
    sizes: tuple[int, int]
    length: int
    block: int
    unit: int

    @classmethod
    def of(cls, shape, axis, codec):
        across, along = (shape[1], shape[2]) if axis == -1 else (shape[2], shape[1])
        unit = codec.block * (32 // math.gcd(32, codec.block * codec.bits))
        group = SUBLANES * unit
        length = LANES * codec.block
        if axis == -2:
            length = min(length, -(-along // group) * group)
        return cls(axis, (along, across), length, codec.block, unit)

    @property
    def grid(self):
        tiles = pl.cdiv(self.sizes[0], self.length), pl.cdiv(self.sizes[1], LANES)
        return tiles[::-1] if self.axis == -1 else tiles

    @property
    def group(self):
        """The number of values along the axis per step: one unit in each sublane."""
        return SUBLANES * self.unit

    def spec(self, parts, of):
        """Return the BlockSpec of an array that has `parts` elements for every `of` values along the axis."""
        along = self.length * parts // of
        block = (LANES, along) if self.axis == -1 else (along, LANES)
        return pl.BlockSpec((None, *block), lambda matrix, i, j: (matrix, i, j))

    def shape(self, count, parts, of, dtype):
        along, across = self.sizes
        along = -(-along // self.block) * self.block * parts // of
        pair = (across, along) if self.axis == -1 else (along, across)
        return jax.ShapeDtypeStruct((count, *pair), dtype)

    def starts(self):
        """Return the first index of this program's tile along the axis and across it."""
        i, j = pl.program_id(1), pl.program_id(2)
        return (j * self.length, i * LANES) if self.axis == -1 else (i * self.length, j * LANES)

    def walk(self, group):
        """Call group(g) for each group of the tile; the last tile may be partial.

        If possible, two groups share an iteration: the scale of a block is a chain of dependent operations, which
        overlaps with operations on the other group.
        """
        at_a_time = 2 if self.length // self.group % 2 == 0 else 1
        values = at_a_time * self.group
        left = self.sizes[0] - self.starts()[0]

        def step(i, _):
            for j in range(at_a_time):
                group(i * at_a_time + j)
            return 0

        lax.fori_loop(0, jnp.minimum(self.length // values, (left + values - 1) // values), step, 0)

    def turned(self, a):
        """Transpose a tile between its layout in memory and [along, 128]; the function is its own inverse."""
        return a.T if self.axis == -1 else a


def _load(ref, first, unit, dtype):
    """Return a unit's places, float32 [8, 128]; units start every `unit` rows from row `first`."""
    if dtype == jnp.float32:
        return [ref[pl.ds(first + i, SUBLANES, stride=unit), :] for i in range(unit)]
    words = [ref[pl.ds(first // 2 + i, SUBLANES, stride=unit // 2), :] for i in range(unit // 2)]
    return [_widened(half, dtype) for word in words for half in (word << 16, word & _HIGH)]


def _store(ref, first, unit, values, dtype):
    if dtype == jnp.float32:
        for i, value in enumerate(values):
            ref[pl.ds(first + i, SUBLANES, stride=unit), :] = value
        return
    bits = [_upper_half(value, dtype) for value in values]
    for i in range(unit // 2):
        word = lax.shift_right_logical(bits[2 * i], 16) | bits[2 * i + 1]
        ref[pl.ds(first // 2 + i, SUBLANES, stride=unit // 2), :] = word


def _widened(bits, dtype):
    """Return the float32 of the number of a 16-bit `dtype` that the upper halves of words hold; lower halves are 0."""
    if dtype == jnp.bfloat16:
        return _float(bits)
    magnitude = lax.shift_right_logical(bits, 3) & 0x0FFFE000
    # Below 2^-14 the sum with the mantissa of 2^-14 is exact, and no step is subnormal.
    small = _bits(_float(magnitude + _SMALLEST) - jnp.float32(2.0**-14))
    large = magnitude + jnp.where(magnitude < 0x0F800000, _REBIASED, 2 * _REBIASED)
    return _float(jnp.where(magnitude < 0x00800000, small, large) | bits & -(2**31))


def _upper_half(value, dtype):
    """Return words whose upper halves hold numbers that a 16-bit `dtype` represents; the inverse of `_widened`."""
    bits = _bits(value)
    if dtype == jnp.bfloat16:
        return bits
    magnitude = bits & 0x7FFFFFFF
    small = _bits(_float(magnitude) + jnp.float32(2.0**-14)) - _SMALLEST
    large = magnitude - jnp.where(magnitude < 0x7F800000, _REBIASED, 2 * _REBIASED)
    return jnp.where(magnitude < _SMALLEST, small, large) << 3 | bits & -(2**31)


_REBIASED = 112 << 23  # the difference of the biases of float32's and float16's exponents
_SMALLEST = 113 << 23  # the bits of 2^-14, float16's smallest normal number


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _bits(value):
    return lax.bitcast_convert_type(value, jnp.int32)


def _encode_tile(scalars, table, x, *refs, tile, codec, rotation, wants_codes, wants_values, dtype):
    refs, index = iter(refs), pl.program_id(0)

    def taken(is_there: bool) -> Any:
        return next(refs) if is_there else None

    numbers = taken(codec.noises > 0)
    signs = taken(rotation is not None and rotation.signs is None)
    codes, headers, values = taken(wants_codes), taken(wants_codes), taken(wants_values)
    words, bytes_, source = taken(wants_codes), taken(wants_codes), taken(True)

    turned = tile.turned(x[...])
    if codec.corrects_runs:
        is_half = dtype == jnp.float16
        turned = _widened(turned.astype(jnp.int32) << 16, dtype) if is_half else turned.astype(jnp.float32)
        dtype = jnp.float32
    source[...] = turned if dtype == jnp.float32 else pltpu.bitcast(turned, jnp.int32)
    if rotation is not None:
        _rotate_all(source, tile, rotation, signs, dtype, (lambda v: v) if codec.corrects_runs else codec.rounded)
    known = [scalars[index if scalars.shape[0] > 1 else 0, i] for i in range(scalars.shape[1])]
    lookup = _lookup(table)
    draw = _noise(numbers, index, tile, codec) if codec.noises else None
    of_block = _noise_of_blocks(numbers, index, tile, codec) if codec.corrects_runs else None
    blocks, per_unit = tile.unit // codec.block, tile.unit * codec.bits // 32
    index_of = _index(tile) if tile.sizes[0] % codec.block else None  # to pad the last block
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    is_there = lane < tile.sizes[1] - tile.starts()[1]
    across = functools.partial(_across, size=codec.block) if codec.is_square else None
    if codec.corrects_runs and rotation is not None and rotation.size > codec.block:
        across = functools.partial(_over_run, count=rotation.size // codec.block)

    def group(g):
        first = g * tile.group
        xs = _load(source, first, tile.unit, dtype)
        if index_of is not None:
            xs = [jnp.where(index_of(g, i) < tile.sizes[0], x, 0) for i, x in enumerate(xs)]
        if codec.is_square and tile.sizes[1] % codec.block:
            xs = [jnp.where(is_there, x, 0) for x in xs]
        unit_words, unit_values = [], []
        for b in range(blocks):
            places = range(b * codec.block, (b + 1) * codec.block)
            if of_block is not None:
                noise = of_block(g)
            else:
                noise = draw and list(zip(*[draw(g, i) for i in places], strict=True))
            some, header, some_values = codec.encode(
                [xs[i] for i in places], noise, known, lookup, wants_codes=wants_codes, wants_values=wants_values,
                across=across,
            )  # fmt: skip
            unit_words.append(some)
            unit_values += some_values
            if wants_codes:
                bytes_[pl.ds(g * (SUBLANES * blocks) + b, SUBLANES, stride=blocks), :] = header
        if wants_codes:
            for i, word in enumerate(_joined(unit_words, codec.block * codec.bits)):
                words[pl.ds(g * (SUBLANES * per_unit) + i, SUBLANES, stride=per_unit), :] = word
        if wants_values:
            _store(source, first, tile.unit, unit_values, dtype)

    tile.walk(group)
    if wants_codes:
        # A bitcast splits each word into four byte rows, the lowest byte first, which is the order of packed codes.
        codes[...] = tile.turned(pltpu.bitcast(words[...], jnp.uint8))
        headers[...] = tile.turned(bytes_[...]).astype(jnp.uint8)
    if wants_values:
        found = source[...].astype(values.dtype) if dtype == jnp.float32 else pltpu.bitcast(source[...], values.dtype)
        values[...] = tile.turned(found)


def _decode_tile(table, codes, headers, out, words, bytes_, target, *, tile, codec, dtype):
    words[...] = pltpu.bitcast(tile.turned(codes[...]), jnp.int32)
    bytes_[...] = tile.turned(headers[...].astype(jnp.int32))
    lookup = _lookup(table)
    blocks, per_unit = tile.unit // codec.block, tile.unit * codec.bits // 32

    def group(g):
        rows = [pl.ds(g * (SUBLANES * per_unit) + i, SUBLANES, stride=per_unit) for i in range(per_unit)]
        unit_words = [words[row, :] for row in rows]
        values = []
        for b in range(blocks):
            header = bytes_[pl.ds(g * (SUBLANES * blocks) + b, SUBLANES, stride=blocks), :]
            values += codec.decode(_parted(unit_words, b, codec.block * codec.bits), header, lookup)
        _store(target, g * tile.group, tile.unit, values, dtype)

    tile.walk(group)
    out[...] = tile.turned(target[...] if dtype == jnp.float32 else pltpu.bitcast(target[...], out.dtype))


def _lookup(table):
    def lookup(row, index):
        entries = jnp.broadcast_to(table[row : row + 1, :], index.shape)
        return jnp.take_along_axis(entries, index, axis=1, mode="promise_in_bounds")

    return lookup


def _across(op, a, size):
    """Reduce every `size` adjacent lanes by op, as a balanced tree that combines the farthest lanes first."""
    lane = lax.broadcasted_iota(jnp.int32, a.shape, 1)
    while size > 1:
        size //= 2
        a = op(a, jnp.take_along_axis(a, lane ^ size, axis=1, mode="promise_in_bounds"))
    return a


def _over_run(op, a, count):
    """Reduce every `count` adjacent sublanes by op, as a balanced tree that combines the farthest sublanes first."""
    sublane = lax.broadcasted_iota(jnp.int32, a.shape, 0)
    while count > 1:
        count //= 2
        a = op(a, jnp.take_along_axis(a, sublane ^ count, axis=0, mode="promise_in_bounds"))
    return a


def _joined(parts, bits):
    """Join the words of a unit's blocks, of `bits` bits each, to the unit's words."""
    if len(parts) == 1:
        return parts[0]
    words = [[] for _ in range(len(parts) * bits // 32)]
    for b, part in enumerate(parts):
        for i, word in enumerate(part):
            at, shift = divmod(b * bits + 32 * i, 32)
            words[at].append(word << shift if shift else word)
            if shift and at + 1 < len(words) and 32 * i + 32 - shift < bits:
                words[at + 1].append(lax.shift_right_logical(word, 32 - shift))
    return [functools.reduce(jnp.bitwise_or, each) for each in words]


def _parted(words, b, bits):
    """Return the words of block b of a unit, the inverse of `_joined`; surplus high bits belong to the next block."""
    found = []
    for i in range(-(-bits // 32)):
        at, shift = divmod(b * bits + 32 * i, 32)
        word = lax.shift_right_logical(words[at], shift) if shift else words[at]
        if shift and at + 1 < len(words):
            word = word | words[at + 1] << (32 - shift)
        found.append(word)
    return found


# --- noise and rotation ----------------------------------------------------------------------------------------------


def _noise(numbers, matrix, tile, codec):
    """Return a function of (group, place) that draws the noise of the elements there."""
    base, row, column, k0, k1 = (numbers[matrix, i] for i in range(5))
    along, across = (column, row) if tile.axis == -1 else (row, column)
    starts = tile.starts()
    sublane, lane = (lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) for axis in (0, 1))
    first = base + starts[0] * along + starts[1] * across + lane * across + sublane * (tile.unit * along)
    columns = tile.sizes[0 if tile.axis == -1 else 1]
    are_adjacent = tile.axis == -1 and columns % tile.unit == 0  # so that a unit's indices differ in their lowest bits

    def draw(group, place):
        if are_adjacent:
            return codec.noise(first + group * tile.group, k0, k1, place)
        return codec.noise(first + (group * tile.group + place) * along, k0, k1)

    return draw


def _noise_of_blocks(numbers, matrix, tile, codec):
    """Return a function that draws one number for each block of a group; units are blocks."""
    base, row, column, k0, k1 = (numbers[matrix, i] for i in range(5))
    along, across = (column, row) if tile.axis == -1 else (row, column)
    starts = tile.starts()
    sublane, lane = (lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) for axis in (0, 1))
    first = base + starts[0] // tile.block * along + starts[1] * across + lane * across + sublane * along
    return lambda group: codec.noise(first + group * SUBLANES * along, k0, k1)[0]


def _index(tile):
    """Return a function of (group, place) that returns the indices of the elements there along the axis."""
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    first = tile.starts()[0] + sublane * tile.unit
    return lambda group, place: first + (group * tile.group + place)


def _rotate_all(source, tile, rotation, signs, dtype, rounded):
    """Rotate the runs of a tile in place, and round them."""
    size = rotation.size
    known = _signs(rotation, signs)

    def run(g, _):
        first = g * (SUBLANES * size)
        places = [p * s for p, s in zip(_load(source, first, size, dtype), known, strict=True)]
        _store(source, first, size, [rounded(p) for p in rotated(places)], dtype)
        return 0

    _over_runs(tile, size, run, 0)


def _over_runs(tile, size, run, start):
    """Return run(g, carry) of each group of runs of a tile; two groups share an iteration where registers suffice."""
    count = tile.length // (SUBLANES * size)
    at_a_time = 2 if size <= 16 and count % 2 == 0 else 1

    def step(i, carry):
        for j in range(at_a_time):
            carry = run(i * at_a_time + j, carry)
        return carry

    return lax.fori_loop(0, count // at_a_time, step, start)


def _signs(rotation, signs):
    if signs is None:
        return list(rotation.signs)
    matrix = pl.program_id(0) if signs.shape[0] > 1 else 0
    return [signs[matrix, i] for i in range(rotation.size)]


def _peaks_of_tile(x, *refs, tile, rotation, block, end, dtype, rounded=lambda v: v):
    """Keep the largest magnitude of rotated runs whose bits are below `end`, all of a block or none, and round it."""
    *signs, out, source = refs

    @pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))
    def _():
        out[...] = jnp.zeros(out.shape, jnp.float32)

    turned, size, known = tile.turned(x[...]), rotation.size, _signs(rotation, signs[0] if signs else None)
    source[...] = turned if dtype == jnp.float32 else pltpu.bitcast(turned, jnp.int32)
    sublane, lane = (lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) for axis in (0, 1))
    runs, across = (whole - start for whole, start in zip(tile.sizes, tile.starts(), strict=True))
    runs = jnp.where(lane < across, runs // size, 0)  # the runs of each lane, of which the tile has the first

    def run(g, peak):
        places = _load(source, g * (SUBLANES * size), size, dtype)
        sums = [v * size**-0.5 for v in _sums([p * s for p, s in zip(places, known, strict=True)])]
        bits = [_bits(p) & 0x7FFFFFFF for p in sums]
        bits = [_largest(bits[i : i + block]) for i in range(0, size, block)]
        found = _largest([jnp.where(b < end, b, 0) for b in bits])
        return jnp.maximum(peak, jnp.where(g * SUBLANES + sublane < runs, found, 0))

    peak = _over_runs(tile, size, run, jnp.zeros((SUBLANES, LANES), jnp.int32))
    out[...] = jnp.maximum(out[...], rounded(_float(peak)))


def _largest(bits):
    while len(bits) > 1:
        bits = [jnp.maximum(a, b) for a, b in zip(bits[::2], bits[1::2], strict=True)]
    return bits[0]


def rotated(places: Sequence[jax.Array]) -> list[jax.Array]:
    """Return the normalized Hadamard transform of places. Zeros in the result are positive."""
    factor = jnp.float32(len(places) ** -0.5)
    return [jnp.where(v == 0, 0, v * factor) for v in _sums(places)]


def _sums(places):
    """Return the Hadamard transform of places times the root of their number; neighbours meet first."""
    values, stride = list(places), 1
    while stride < len(values):
        for i in range(len(values)):
            if not i & stride:
                a, b = values[i], values[i + stride]
                values[i], values[i + stride] = a + b, a - b
        stride *= 2
    return values
