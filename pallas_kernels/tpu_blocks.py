"""Block-scaled encoding and decoding on a TPU: one pass over a matrix, of whose number format this file knows nothing.

    codes, headers = encode(x)        values = decode(codes, headers)        values = decode(encode(x)), in one pass

A block's values lie in as many vector registers, "places" [8, 128], with one block at each of the 1024 positions. So
what belongs to a block is computed once a block, and its values meet in operations between registers, without any
movement across lanes. What is computed is handed in as a `Codec`, functions of places. With blocks along rows (axis=-2)
a place is a strided load of rows; with blocks along lanes (axis=-1) a tile is transposed in VMEM first, and what comes
out of it is transposed back.

Matrices are x [L, R, C]: L of them, each with scalars and a table of its own. Along the axis of blocks a last block may
be short: it is filled up with zeros. Nothing of x's size is written but what is asked for.

Nothing here has run on a TPU. It is compiled for v5e and v6e, and interpreted.
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

LANES, SUBLANES = 128, 8
_HIGH = -(2**16)  # the upper half of a word

Lookup = Callable[[int, jax.Array], jax.Array]  # (row of the table, int32 indices in it) to float32


class Codec(Protocol):
    """The arithmetic of a format on places, arrays [8, 128].

    Attributes:
        block: values of a block.
        bits: of a code.
        noises: how many numbers of noise an element draws.
        is_square: whether as many neighbouring blocks as a block has values share what belongs to a block.
    """

    block: int
    bits: int
    noises: int
    is_square: bool

    def noise(self, index: jax.Array, k0: Any, k1: Any) -> list[jax.Array]:
        """The noise of elements with these indices."""
        ...

    def encode(
        self, xs: Sequence[jax.Array], noise: Any, scalars: Sequence[Any], lookup: Lookup, *, wants_codes: bool,
        wants_values: bool, across: Callable[[Any, jax.Array], jax.Array] | None = None,
    ) -> tuple[Sequence[jax.Array], jax.Array, Sequence[jax.Array]]:  # fmt: skip
        """(int32 words of codes, int32 header, float32 values that the type of x holds) of float32 places.

        `across`, of squares, is (op, place) to op over the place's numbers of a square, for commutative op.
        """
        ...

    def decode(self, words: Sequence[jax.Array], header: jax.Array, lookup: Lookup) -> Sequence[jax.Array]:
        """The float32 values of a block, which the type of the result holds."""
        ...


@dataclasses.dataclass(frozen=True)
class Rotation:
    """A Hadamard transform of runs of 16, 32, 64 or 128 along the axis of blocks, in front of the encoder.

    Attributes:
        size: of a run.
        signs: numbers +-1 that a run is multiplied by first; None if they are an argument.
    """

    size: int
    signs: tuple[int, ...] | None = None


class Noise(NamedTuple):
    """Which noise is whose.

    Attributes:
        base: int32 [L], the index of each matrix's first element.
        strides: int32 [2], how much further an element's index is than that of the row before, of the column before.
        seeds: int32 [L, 2].
    """

    base: jax.Array
    strides: jax.Array
    seeds: jax.Array


def supports(codec: Codec, x: Any, axis: int) -> str | None:
    """Why `encode` cannot take an array or shape x [L, R, C]; None if it can."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"values must be float32 or bfloat16, got {x.dtype}"
    if axis not in (-1, -2):
        return f"blocks must lie along one of the last two axes, got {axis}"
    if codec.block * codec.bits > 32 * 32:
        return f"a block has too many bits for registers: {codec.block} x {codec.bits}"
    if x.shape[0] > 2048:
        return f"scalar memory has room for what 2048 matrices have of their own, got {x.shape[0]}"
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
    """Codes and headers, or what they decode to, or both: [codes, headers, values], each if wanted.

    Args:
        x: float32 or bfloat16 [L, R, C].
        scalars: float32 [L, s], of each matrix, or [1, s], of all: what the codec's `encode` wants to be told.
        tables: float32 [L, rows, 128], or [1, rows, 128], rows a multiple of 8: what it looks up.
        noise: if the codec draws some.
        signs: float32 [size], of a rotation that has none.
        axis: -1 or -2.

    Returns:
        uint8 codes, packed along the axis from the lowest bits of a byte, [L, R, C / 8 * bits] or [L, R / 8 * bits, C],
        where a last block that is not full counts as one; uint8 headers, one for each block; values like x.

    Raises:
        ValueError: `supports` has a reason; noise or signs are missing.
    """
    if reason := supports(codec, x, axis):
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
        args.append(signs.reshape(1, -1))
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
    scratch.append(pltpu.VMEM((tile.length // wide, LANES), jnp.float32 if wide == 1 else jnp.int32))
    body = functools.partial(
        _encode_tile, tile=tile, codec=codec, rotation=rotation, wants_codes=wants_codes, wants_values=wants_values
    )
    return _run(body, "encode_blocks", args, specs, out_shape, out_specs, scratch, tile, count, interpret)


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
    """The values [L, R, C] of codes and headers as `encode` writes them; `length` is that of the axis of blocks.

    `tables` are [L, rows, 128] or [1, rows, 128].
    """
    count, *shape = codes.shape
    shape[axis] = length
    tile = _Tile.of((count, *shape), axis, codec)
    wide = 1 if dtype == jnp.float32 else 2
    scratch = [
        pltpu.VMEM((tile.length * codec.bits // 32, LANES), jnp.int32),
        pltpu.VMEM((tile.length // codec.block, LANES), jnp.int32),
        pltpu.VMEM((tile.length // wide, LANES), jnp.float32 if wide == 1 else jnp.int32),
    ]
    (out,) = _run(
        functools.partial(_decode_tile, tile=tile, codec=codec), "decode_blocks", [tables, codes, headers],
        [_table_spec(tables), tile.spec(codec.bits, 8), tile.spec(1, codec.block)],
        [jax.ShapeDtypeStruct((count, *shape), dtype)], [tile.spec(1, 1)], scratch, tile, count, interpret,
    )  # fmt: skip
    return out


def _run(body, name, args, specs, out_shape, out_specs, scratch, tile, count, interpret):
    moved = sum(a.size * a.dtype.itemsize for a in [*args, *out_shape])
    return pl.pallas_call(
        body,
        out_shape=out_shape,
        grid=(count, *tile.grid),
        in_specs=specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved),  # each array once
        interpret=interpret,
        name=name,
    )(*args)


_SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def _table_spec(tables):
    return pl.BlockSpec((None, *tables.shape[1:]), lambda matrix, i, j: (matrix if len(tables) > 1 else 0, 0, 0))


# --- tiles -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Tile:
    """A tile of `length` values along the axis of blocks by 128, which become lanes.

    Attributes:
        axis: -1 or -2.
        sizes: of the matrix: along the axis, across.
        length: of the tile along the axis. Along lanes it has 128 blocks, so that its headers fill them.
        block: values of a block.
        unit: values that are taken at a time: a block, or as many as fill whole words.
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
        """Values along the axis that are taken in one step: one unit in each sublane."""
        return SUBLANES * self.unit

    def spec(self, parts, of):
        """Of an array that has `parts` for `of` values along the axis."""
        along = self.length * parts // of
        block = (LANES, along) if self.axis == -1 else (along, LANES)
        return pl.BlockSpec((None, *block), lambda matrix, i, j: (matrix, i, j))

    def shape(self, count, parts, of, dtype):
        along, across = self.sizes
        along = -(-along // self.block) * self.block * parts // of
        pair = (across, along) if self.axis == -1 else (along, across)
        return jax.ShapeDtypeStruct((count, *pair), dtype)

    def starts(self):
        """Where this tile starts: along the axis, across."""
        i, j = pl.program_id(1), pl.program_id(2)
        return (j * self.length, i * LANES) if self.axis == -1 else (i * self.length, j * LANES)

    def walk(self, group):
        """Call group(g) for the groups that the tile has; the last tile need not be full.

        Two at a time, where they fit: a block's scale is a chain of operations, during which another's values go on.
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
        """[along, 128] of a tile as it lies in memory, and the inverse."""
        return a.T if self.axis == -1 else a


def _load(ref, first, unit, dtype):
    """A unit's places, float32 [8, 128], of units that lie `unit` rows apart from row `first` on."""
    if dtype == jnp.float32:
        return [ref[pl.ds(first + i, SUBLANES, stride=unit), :] for i in range(unit)]
    words = [ref[pl.ds(first // 2 + i, SUBLANES, stride=unit // 2), :] for i in range(unit // 2)]
    return [_float(half) for word in words for half in (word << 16, word & _HIGH)]


def _store(ref, first, unit, values, dtype):
    if dtype == jnp.float32:
        for i, value in enumerate(values):
            ref[pl.ds(first + i, SUBLANES, stride=unit), :] = value
        return
    bits = [lax.bitcast_convert_type(value, jnp.int32) for value in values]
    for i in range(unit // 2):
        word = lax.shift_right_logical(bits[2 * i], 16) | bits[2 * i + 1]
        ref[pl.ds(first // 2 + i, SUBLANES, stride=unit // 2), :] = word


def _float(bits):
    return lax.bitcast_convert_type(bits, jnp.float32)


def _encode_tile(scalars, table, x, *refs, tile, codec, rotation, wants_codes, wants_values):
    refs, dtype, index = iter(refs), x.dtype, pl.program_id(0)

    def taken(is_there: bool) -> Any:
        return next(refs) if is_there else None

    numbers = taken(codec.noises > 0)
    signs = taken(rotation is not None and rotation.signs is None)
    codes, headers, values = taken(wants_codes), taken(wants_codes), taken(wants_values)
    words, bytes_, source = taken(wants_codes), taken(wants_codes), taken(True)

    turned = tile.turned(x[...])
    source[...] = turned if dtype == jnp.float32 else pltpu.bitcast(turned, jnp.int32)
    if rotation is not None:
        _rotate_all(source, tile, rotation, signs, dtype)
    known = [scalars[index if scalars.shape[0] > 1 else 0, i] for i in range(scalars.shape[1])]
    lookup = _lookup(table)
    draw = _noise(numbers, index, tile, codec) if codec.noises else None
    blocks, per_unit = tile.unit // codec.block, tile.unit * codec.bits // 32
    index_of = _index(tile) if tile.sizes[0] % codec.block else None  # to fill up the last block
    lane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1)
    is_there = lane < tile.sizes[1] - tile.starts()[1]
    across = functools.partial(_across, size=codec.block) if codec.is_square else None

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
        # The rows of bytes that lie under each other are the words' own, from the lowest.
        codes[...] = tile.turned(pltpu.bitcast(words[...], jnp.uint8))
        headers[...] = tile.turned(bytes_[...]).astype(jnp.uint8)
    if wants_values:
        values[...] = tile.turned(source[...] if dtype == jnp.float32 else pltpu.bitcast(source[...], dtype))


def _decode_tile(table, codes, headers, out, words, bytes_, target, *, tile, codec):
    dtype = out.dtype
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
    out[...] = tile.turned(target[...] if dtype == jnp.float32 else pltpu.bitcast(target[...], dtype))


def _lookup(table):
    def lookup(row, index):
        entries = jnp.broadcast_to(table[row : row + 1, :], index.shape)
        return jnp.take_along_axis(entries, index, axis=1, mode="promise_in_bounds")

    return lookup


def _across(op, a, size):
    """op over each `size` neighbouring lanes, in the order of a balanced tree: the farthest lanes first."""
    lane = lax.broadcasted_iota(jnp.int32, a.shape, 1)
    while size > 1:
        size //= 2
        a = op(a, jnp.take_along_axis(a, lane ^ size, axis=1, mode="promise_in_bounds"))
    return a


def _joined(parts, bits):
    """The words of a unit, of those of its blocks, each of so many bits."""
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
    """The words of block b of a unit, the inverse of `_joined`; bits above a block's own are its neighbours'."""
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
    """(group, place) to the noise of the elements there."""
    base, row, column, k0, k1 = (numbers[matrix, i] for i in range(5))
    along, across = (column, row) if tile.axis == -1 else (row, column)
    starts = tile.starts()
    sublane, lane = (lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), axis) for axis in (0, 1))
    first = base + starts[0] * along + starts[1] * across + lane * across + sublane * (tile.unit * along)

    def draw(group, place):
        return codec.noise(first + (group * tile.group + place) * along, k0, k1)

    return draw


def _index(tile):
    """(group, place) to the indices of the elements there along the axis."""
    sublane = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    first = tile.starts()[0] + sublane * tile.unit
    return lambda group, place: first + (group * tile.group + place)


def _rotate_all(source, tile, rotation, signs, dtype):
    """Rotate a tile in place."""
    size = rotation.size
    known = list(rotation.signs) if signs is None else [signs[0, i] for i in range(size)]

    def run(g, _):
        first = g * (SUBLANES * size)
        places = [p * s for p, s in zip(_load(source, first, size, dtype), known, strict=True)]
        _store(source, first, size, [_rounded(p, dtype) for p in rotated(places)], dtype)
        return 0

    lax.fori_loop(0, tile.length // (SUBLANES * size), run, 0)


def rotated(places: Sequence[jax.Array]) -> list[jax.Array]:
    """The normalized Hadamard transform of places, in the order of the fast one: neighbours first.

    Zeros are positive.
    """
    values, stride = list(places), 1
    while stride < len(values):
        for i in range(len(values)):
            if not i & stride:
                a, b = values[i], values[i + stride]
                values[i], values[i + stride] = a + b, a - b
        stride *= 2
    factor = jnp.float32(len(values) ** -0.5)
    return [jnp.where(v == 0, 0, v * factor) for v in values]


def _rounded(value, dtype):
    """A float32 that the type holds."""
    if dtype == jnp.float32:
        return value
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return _float(bits + 0x7FFF + (lax.shift_right_logical(bits, 16) & 1) & _HIGH)
