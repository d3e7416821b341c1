"""x @ W.T on a TPU, where W stays packed at 4 bits in memory and becomes numbers beside the matrix unit.

    out[m, n] = factor * sum_k x[m, k] * weight[n, k]
    weight[n, k] = +-magnitudes[mode][nibble & 7] * multipliers[mode] * scale(byte)          (see `Decoding`)

Decoding has neither branch nor table. Through any eight magnitudes goes a piecewise linear function of i = nibble & 7,
which is a maximum of lines less another one, with coefficients worked out from the record. Of two modes one is the
base, to which a block of the other adds the difference. IF4, in units of 1/2 for E2M1 and of 1 for integers:

    value = i + (max(0, i - 4, 3i - 16) if the block is E2M1 else 0)

Two nibbles share a 32-bit lane: one `and` and one `or` on the word put them into the last bits of two bfloat16 128.

Tables of any sixteen values (`TableDecoding`) are multiplied with each block's scale beforehand: a block has as many
values as its table has. Its bits at a nibble are a polynomial over the nibble's four bits, with `and` for the product
and `xor` for the sum, whose sixteen coefficients are worked out once a block; fifteen of both make two weights.

Numerics. The value (a magnitude over its unit) and scale * multiplier * unit are exact in bfloat16. Their product, the
weight, is exact in float32; for a bfloat16 x it is rounded once to bfloat16, an error of at most 2**-8 of the weight,
and none where both fit 8 bits (NVFP4, 4/6, MXFP4, 3-bit integers with multiplier 1). Products with x are exact, sums
are float32 (for a float32 x the products too, at the matrix unit's highest precision), `factor` multiplies them once at
the end, and one rounding makes `out_dtype`. A NaN byte makes NaN of the outputs of its row of W. TPUs flush subnormal
numbers: of E8M0 a multiple below 2**-126 (of MXFP4 the byte 1) may count as 0.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decoding import Decoding, TableDecoding

# From this many rows of x on, the caller had better dequantize once and use XLA's dot: to write and read back bfloat16
# weights costs 4.5 bytes a weight, on a v6e (1.6 TB/s, 918 Tflop/s) the time of 1300 rows, but once. What the kernel
# loses grows with the rows. By the count of bundles at 512 rows it is 28% of a product of bfloat16 weights, by which
# the two would meet at 4600 rows; were it 100%, at 1300. An estimate in between: nothing here was measured.
LARGE_M = 2048

# W is packed in units of UNIT_N rows by UNIT_K columns, and padded to them. UNIT_K: four pairs of nibbles a word times
# 128 columns of x, the width of a vector register. UNIT_N: the width of the matrix unit from v6e on.
UNIT_N = 256
UNIT_K = 512
_PAIRS = 4
_PAIR_K = UNIT_K // _PAIRS
_LANES = 128
_SUBLANES = 16  # of a bfloat16 register: rows of x are padded to a multiple of it

# On a word whose 16-bit halves hold one nibble each in their last bits:
_INDICES = 0x00070007
_LAST_BITS = 0x00010001
_SIGNS = -0x7FFF8000  # 0x80008000: where the signs of two bfloat16 are
_TWO_128 = 0x43004300  # two bfloat16 128, whose last bit is worth 1


AnyDecoding = Decoding | TableDecoding


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The work of one grid step: at most m rows of x, n rows of W (in units of 256), k of both (in units of 512)."""

    m: int
    n: int
    k: int

    def __post_init__(self):
        if self.m < 1 or self.m % _SUBLANES or self.n < 1 or self.n % UNIT_N or self.k < 1 or self.k % UNIT_K:
            raise ValueError(f"tiles need multiples of m={_SUBLANES}, n={UNIT_N}, k={UNIT_K}, got {self}")


# By the rows of x up to which they serve. A step should outlast its overhead of some 0.35 us, in which 1.6 TB/s bring a
# million weights; x is read again for every n, so n is large; and all of it should stay well below 16 MiB of VMEM.
TILES = {
    64: Tiles(m=64, n=1024, k=1024),  # unmeasured
    256: Tiles(m=256, n=1024, k=512),  # unmeasured
    LARGE_M: Tiles(m=512, n=1024, k=512),  # unmeasured; also for more rows than this
}


def supports(decoding: AnyDecoding, dtype: Any, m: int) -> str | None:
    """The reason why `matmul` should not be asked for m rows of x of this dtype, with what to do; None if it may be."""
    if m >= LARGE_M:
        return f"m={m} rows of x: from {LARGE_M} on, dequantize once and use jnp.dot"
    if reason := _wrong_dtype(dtype):
        return f"x {reason}"
    return _wrong_decoding(decoding)


def pack(nibbles: jax.Array, scales: jax.Array, decoding: AnyDecoding) -> tuple[jax.Array, jax.Array]:
    """The kernel's layout of W: half a byte a weight, K before N, every code and byte kept (negative zero too).

    N and K are padded to multiples of 256 and 512 with zeros, whose scales are zero. Word row 64 g + r holds in bits
    4 i + 16 j to 4 i + 16 j + 3 the nibble of k = 512 g + 128 i + 2 r + j, so that a shift by 4 i brings the pair for
    rows 2 r and 2 r + 1 of a bfloat16 register, in which a 32-bit lane holds two rows.

    Args:
        nibbles: uint8 [N, K], sign and magnitude, 0 to 15; higher bits are ignored.
        scales: uint8 [N, K / block].

    Returns:
        int32 words [K / 8, N] and uint8 scales [K / block, N], with N and K padded.

    Raises:
        TypeError: for another dtype.
        ValueError: for shapes that do not fit each other.
    """
    if nibbles.dtype != jnp.uint8 or scales.dtype != jnp.uint8:
        raise TypeError(f"nibbles and scales must be uint8, got {nibbles.dtype} and {scales.dtype}: bitcast them")
    shapes = f"nibbles {nibbles.shape}, scales {scales.shape}, block {decoding.block}"
    if nibbles.ndim != 2 or 0 in nibbles.shape or nibbles.shape[1] % decoding.block:
        raise ValueError(f"nibbles must be [N, K], K a multiple of the block, got {shapes}: pad K with zero codes")
    n, k = nibbles.shape
    if scales.shape != (n, k // decoding.block):
        raise ValueError(f"scales must be [N, K / block] = {(n, k // decoding.block)}, got {shapes}")
    padded_n, padded_k = _up(n, UNIT_N), _up(k, _unit_k(decoding))
    codes = jnp.pad(nibbles & 15, ((0, padded_n - n), (0, padded_k - k)))
    codes = codes.reshape(padded_n, padded_k // UNIT_K, _PAIRS, _PAIR_K // 2, 2).astype(jnp.uint32)
    parts = [codes[:, :, i, :, j] << (4 * i + 16 * j) for i in range(_PAIRS) for j in range(2)]
    words = functools.reduce(jnp.bitwise_or, parts)
    words = lax.bitcast_convert_type(words.reshape(padded_n, padded_k // 8).T, jnp.int32)
    return words, jnp.pad(scales, ((0, padded_n - n), (0, (padded_k - k) // decoding.block))).T


def unpack(words: jax.Array, scales: jax.Array, n: int, k: int, decoding: AnyDecoding) -> tuple[jax.Array, jax.Array]:
    """The nibbles uint8 [n, k] and scale bytes uint8 [n, k / block] that `pack` was given, all of them bit for bit.

    Raises:
        TypeError, ValueError: for arrays that `pack` does not make for n and k.
    """
    _check_packed(words, scales, n, k, decoding)
    padded_k, padded_n = words.shape[0] * 8, words.shape[1]
    bits = lax.bitcast_convert_type(words, jnp.uint32).T.reshape(padded_n, padded_k // UNIT_K, 1, _PAIR_K // 2, 1)
    shifts = jnp.arange(_PAIRS, dtype=jnp.uint32).reshape(1, 1, -1, 1, 1) * 4
    shifts = shifts + jnp.arange(2, dtype=jnp.uint32).reshape(1, 1, 1, 1, -1) * 16
    codes = ((bits >> shifts) & 15).astype(jnp.uint8).reshape(padded_n, padded_k)
    return codes[:n, :k], scales.T[:n, : k // decoding.block]


def matmul(
    x: jax.Array,
    words: jax.Array,
    scales: jax.Array,
    factor: jax.Array,
    *,
    n: int,
    k: int,
    decoding: AnyDecoding,
    out_dtype: Any,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> jax.Array:
    """x @ W.T * factor, [M, n], for W packed by `pack`; M, n and k may be any sizes, and vmap works.

    Args:
        x: bfloat16 or float32 [M, k].
        words, scales: what `pack` returned.
        factor: float32, a scalar array.
        n, k: rows and columns of W before padding.
        out_dtype: bfloat16 or float32.
        tiles: the work of a grid step; n and k are lowered to the next that divides the padded sizes. By default
            from `TILES`.
        interpret: True or a `pltpu.InterpretParams`, to run it where no TPU is.

    Raises:
        TypeError: for a dtype that the kernel does not take.
        ValueError: for a decoding that it does not take, and for shapes that do not fit each other.
    """
    for name, dtype in (("x", x.dtype), ("out_dtype", out_dtype)):
        if reason := _wrong_dtype(dtype):
            raise TypeError(f"{name} {reason}")
    if reason := _wrong_decoding(decoding):
        raise ValueError(reason)
    if factor.dtype != jnp.float32 or factor.shape != ():
        raise TypeError(f"factor must be a float32 scalar, got {factor.dtype}{factor.shape}")
    _check_packed(words, scales, n, k, decoding)
    if x.ndim != 2 or x.shape[1] != k:
        raise ValueError(f"x must be [M, k={k}], got {x.shape}: reshape the leading axes into one")
    m = x.shape[0]
    if m == 0:
        return jnp.zeros((0, n), out_dtype)
    padded_k, padded_n = words.shape[0] * 8, words.shape[1]
    if tiles is None:
        tiles = TILES[min((rows for rows in TILES if m <= rows), default=LARGE_M)]
    # As many tiles of rows as needed, all of a size: 520 rows are two of 272, not 512 and 8.
    tile_m = _up(pl.cdiv(m, pl.cdiv(m, tiles.m)), _SUBLANES)
    tile_n, tile_k = _divisor(padded_n, tiles.n, UNIT_N), _divisor(padded_k, tiles.k, _unit_k(decoding))
    # Padding is zero in x and W, so that no garbage of a partial tile meets a number: 0 * NaN would be NaN.
    x = jnp.pad(x, ((0, _up(m, tile_m) - m), (0, padded_k - k)))
    out = pl.pallas_call(
        functools.partial(_body, decoding=decoding, arithmetic=_arithmetic(x.dtype)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], padded_n), out_dtype),
        grid=(x.shape[0] // tile_m, padded_n // tile_n, padded_k // tile_k),
        in_specs=[
            pl.BlockSpec((tile_m, tile_k), lambda i, j, step: (i, step)),
            pl.BlockSpec((tile_k // 8, tile_n), lambda i, j, step: (step, j)),
            pl.BlockSpec((tile_k // decoding.block, tile_n), lambda i, j, step: (step, j)),
            pl.BlockSpec(memory_space=pltpu.SMEM),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda i, j, step: (i, j)),
        scratch_shapes=[
            pltpu.VMEM((tile_m, tile_n), jnp.float32),
            pltpu.VMEM((tile_n // _LANES, _tables(decoding), tile_k // decoding.block, _LANES), jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="matmul_4bit",
    )(x, words, scales, factor.reshape(1, 1))  # two axes: one that vmap adds is a third, as Mosaic wants it
    return out[:m, :n]


def _body(x, words, scales, factor, out, sums, tables, *, decoding: AnyDecoding, arithmetic: Any):
    """One tile: x [tm, tk], words [tk / 8, tn], scales [tk / block, tn], out and sums [tm, tn].

    tables [tn / 128, modes, tk / block, 128] holds what `_scale_words` makes of the scales: from memory that is 128
    lanes wide, one row is loaded into all sublanes of a register at no cost to the vector unit.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    strips = words.shape[1] // _LANES
    for s in range(strips):
        for t, table in enumerate(_words_of(scales[:, s * _LANES : (s + 1) * _LANES], decoding, arithmetic)):
            tables[s, t] = table

    count = decoding.block // (4 // jnp.dtype(arithmetic).itemsize)  # words that a block has in a column
    blocks = _PAIR_K // decoding.block
    total = jnp.zeros_like(sums)
    for g in range(x.shape[1] // UNIT_K):
        weights = []
        for s in range(strips):
            word = words[g * UNIT_K // 8 : (g + 1) * UNIT_K // 8, s * _LANES : (s + 1) * _LANES]
            for i in range(_PAIRS):
                first = (g * _PAIRS + i) * blocks
                spread = [_spread(tables.at[s, t], first, blocks, count) for t in range(tables.shape[1])]
                weights.append(_decoded(word, i, spread, decoding, arithmetic, x.dtype))
        # Strips lie side by side, the pairs of a strip below each other.
        weight = jnp.concatenate(
            [jnp.concatenate(weights[s * _PAIRS : (s + 1) * _PAIRS], axis=0) for s in range(strips)], axis=1
        )
        precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
        columns = x[:, g * UNIT_K : (g + 1) * UNIT_K]
        total += jnp.dot(columns, weight, precision=precision, preferred_element_type=jnp.float32)
    sums[...] += total

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out[...] = (sums[...] * factor[0, 0]).astype(out.dtype)


def _tables(decoding: AnyDecoding) -> int:
    """How many words a block has."""
    return 16 if isinstance(decoding, TableDecoding) else len(decoding.magnitudes)


def _words_of(scales: jax.Array, decoding: AnyDecoding, arithmetic: Any) -> list[jax.Array]:
    """From scale bytes [r, 128] all int32 words that their blocks are decoded by."""
    if isinstance(decoding, TableDecoding):
        return _table_words(scales, decoding, arithmetic)
    return _scale_words(scales, decoding, arithmetic)


def _decoded(
    words: jax.Array, pair: int, spread: Sequence[jax.Array], decoding: AnyDecoding, arithmetic: Any, dtype: Any
) -> jax.Array:
    """The weights [2 r, 128] of this dtype in one of the four pairs of nibbles of int32 words [r, 128].

    spread holds the words of `_words_of`, spread over their blocks: [r, 128] if arithmetic is bfloat16, else
    [2 r, 128].
    """
    if isinstance(decoding, TableDecoding):
        return _decode_by_table(words, pair, spread, arithmetic, dtype)
    return _decode(words, pair, spread, decoding, arithmetic, dtype)


def _table_words(scales: jax.Array, decoding: TableDecoding, arithmetic: Any) -> list[jax.Array]:
    """Sixteen values, times the scale: in bfloat16 the coefficients of the polynomial of their bits, each twice."""
    scale, mode = decoding.scales(scales.astype(jnp.int32))
    levels = []
    for column in zip(*decoding.values, strict=True):
        value = jnp.full(scale.shape, column[0], jnp.float32)
        for i, number in enumerate(column[1:], 1):
            value = value if number == column[i - 1] else jnp.where(mode >= i, number, value)
        levels.append(value * scale)
    if arithmetic != jnp.bfloat16:
        return [lax.bitcast_convert_type(level, jnp.int32) for level in levels]
    words = [lax.bitcast_convert_type(level.astype(jnp.bfloat16).astype(jnp.float32), jnp.int32) for level in levels]
    words = [word | lax.shift_right_logical(word, 16) for word in words]
    for bit in range(4):  # the values where it is set become what they differ by
        words = [word ^ words[i - 2**bit] if i >> bit & 1 else word for i, word in enumerate(words)]
    return words


def _decode_by_table(words, pair: int, spread, arithmetic, dtype) -> jax.Array:
    if arithmetic == jnp.bfloat16:
        values = list(spread)
        for bit in range(4):
            last = lax.shift_right_logical(words, 4 * pair + bit) & _LAST_BITS
            mask = (last << 16) - last  # all bits of the halves whose bit is set
            values = [low ^ (high & mask) for low, high in zip(values[::2], values[1::2], strict=True)]
        return pltpu.bitcast(values[0], jnp.bfloat16).astype(dtype)
    values = [pltpu.bitcast(word, arithmetic) for word in spread]
    for bit in range(4):
        last = lax.shift_right_logical(words, 4 * pair + bit) & _LAST_BITS
        is_set = pltpu.bitcast(last << 14, jnp.bfloat16).astype(arithmetic) > 1  # 2 or 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0].astype(dtype)


def _scale_words(scales: jax.Array, decoding: Decoding, arithmetic: Any) -> list[jax.Array]:
    """From scale bytes [r, 128] int32 words: scale * multiplier * unit, a float32 or a bfloat16 twice.

    With two modes also a mask, -1 for the blocks to which the difference is added and 0 for those of the base.
    """
    plan = _plan(decoding)
    byte = scales.astype(jnp.int32)
    if decoding.scale == "e8m0":
        scale, nan = lax.bitcast_convert_type(byte << 23, jnp.float32), byte == 0xFF
    else:
        low = byte & 0x7F
        normal = lax.bitcast_convert_type((low << 20) + (120 << 23), jnp.float32)
        # Without its exponent a subnormal byte seems to be 2**-7 * (1 + m / 8): it is m / 8 * 2**-6, twice that less
        # 2**-6, and only below 2**-6 is this the smaller. (As a subnormal float32 it would be flushed to zero.)
        scale, nan = jnp.minimum(normal, 2 * normal - 2**-6), low == 0x7F
    scale = jnp.where(nan, jnp.nan, scale)
    second = byte >= 0x80
    masks = []
    if len(decoding.magnitudes) == 2:
        multiple = scale * jnp.where(second, plan.multiples[1], plan.multiples[0])
        masks = [jnp.where(second, plan.base - 1, -plan.base)]
    elif decoding.scale == "e4m3":
        multiple = scale * jnp.where(second, -plan.multiples[0], plan.multiples[0])
    else:
        multiple = scale * plan.multiples[0]
    words = lax.bitcast_convert_type(multiple, jnp.int32)
    if arithmetic == jnp.bfloat16:
        words = words | lax.shift_right_logical(words, 16)
    return [words, *masks]


def _spread(table, first: int, rows: int, count: int) -> jax.Array:
    """Rows of a table [r, 128] from `first` on, each `count` times below itself."""
    copies = [jnp.broadcast_to(table[r : r + 1], (count, _LANES)) for r in range(first, first + rows)]
    return jnp.concatenate(copies, axis=0)


def _decode(
    words: jax.Array, pair: int, spread: Sequence[jax.Array], decoding: Decoding, arithmetic: Any, dtype: Any
) -> jax.Array:
    """The weights [2 r, 128] of this dtype in one of the four pairs of nibbles of int32 words [r, 128].

    spread holds the words of `_scale_words`, spread over their blocks: [r, 128] if arithmetic is bfloat16, else
    [2 r, 128].
    """
    plan = _plan(decoding)
    indices = ((words >> (4 * pair)) & _INDICES) | _TWO_128
    index = pltpu.bitcast(indices, jnp.bfloat16).astype(arithmetic) - 128
    value = plan.value(index)
    multiple, *masks = spread
    for mask in masks:
        value += _bitwise(lax.bitwise_and, plan.difference(index), mask)
    weight = (value * pltpu.bitcast(multiple, arithmetic)).astype(dtype)
    signs = pltpu.bitcast((words << (12 - 4 * pair)) & _SIGNS, jnp.bfloat16).astype(dtype)
    return _bitwise(lax.bitwise_xor, weight, pltpu.bitcast(signs, jnp.int32))


def _bitwise(operation: Callable, numbers: jax.Array, words: jax.Array) -> jax.Array:
    return pltpu.bitcast(operation(pltpu.bitcast(numbers, jnp.int32), words), numbers.dtype)


@dataclasses.dataclass(frozen=True)
class _Curve:
    """max(slope * i - offset over `upper`) - max(the same over `lower`), for i from 0 to 7."""

    upper: tuple[tuple[float, float], ...]
    lower: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, values: Sequence[float]) -> "_Curve":
        """The piecewise linear function through 0 = values[0], values[1], ...

        Where it bends upwards, a line is added to `upper`: a convex function is the maximum of its pieces. Where it
        bends downwards, `lower` bends upwards instead.
        """
        slopes = [after - before for before, after in itertools.pairwise(values)]
        upper, lower = [(slopes[0], 0.0)], [(0.0, 0.0)]
        for i in range(1, len(slopes)):
            bend = slopes[i] - slopes[i - 1]
            if bend:
                lines = upper if bend > 0 else lower
                slope, offset = lines[-1]
                lines.append((slope + abs(bend), offset + abs(bend) * i))
        return cls(tuple(upper), tuple(lower))

    def __call__(self, index: jax.Array) -> jax.Array:
        def line(slope: float, offset: float) -> jax.Array:
            # No operation is spent on a factor of 1 or an offset of 0: the compiler keeps what it is given.
            scaled = index if slope == 1 else index * slope if slope else jnp.zeros_like(index)
            return scaled - offset if offset else scaled

        upper, lower = (
            functools.reduce(jnp.maximum, itertools.starmap(line, lines)) for lines in (self.upper, self.lower)
        )
        return upper - lower if len(self.lower) > 1 else upper

    def numbers(self) -> list[float]:
        """Every number that occurs on the way to the curve's values, with these."""
        found = []
        for i in range(8):
            upper, lower = ([slope * i - offset for slope, offset in lines] for lines in (self.upper, self.lower))
            found += [*upper, *lower, max(upper) - max(lower)]
        for slope, offset in self.upper + self.lower:
            found += [slope, offset, *(slope * i for i in range(8))]
        return found


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How one decoding is computed: value(i) of the base mode, plus difference(i) for blocks of the other."""

    multiples: tuple[float, ...]  # for each mode, multiplier * unit: what the scale is multiplied by
    base: int
    value: _Curve
    difference: _Curve

    def exact(self) -> bool:
        """Whether bfloat16 holds every number on the way."""
        return all(_significant_bits(number) <= 8 for number in self.value.numbers() + self.difference.numbers())


@functools.cache
def _plan(decoding: Decoding) -> _Plan:
    # A unit is a power of two, so dividing by it is exact; it makes the curves of most modes start with slope 1.
    units = [2.0 ** math.floor(math.log2(row[1])) for row in decoding.magnitudes]
    values = [[magnitude / unit for magnitude in row] for row, unit in zip(decoding.magnitudes, units, strict=True)]

    def choice(base: int) -> _Plan:
        difference = [other - own for own, other in zip(values[base], values[len(values) - 1 - base], strict=True)]
        multiples = tuple(m * unit for m, unit in zip(decoding.multipliers, units, strict=True))
        return _Plan(multiples, base, _Curve.through(values[base]), _Curve.through(difference))

    def lines(plan: _Plan) -> int:
        return sum(len(curve.upper) + len(curve.lower) for curve in (plan.value, plan.difference))

    return min(map(choice, range(len(values))), key=lines)


def _significant_bits(number: float) -> int:
    numerator, _ = abs(float(number)).as_integer_ratio()
    return numerator.bit_length() - ((numerator & -numerator).bit_length() - 1) if numerator else 0


def _wrong_dtype(dtype: Any) -> str | None:
    dtype = jnp.dtype(dtype)
    return None if dtype in (jnp.bfloat16, jnp.float32) else f"must be bfloat16 or float32, got {dtype}: convert it"


def _wrong_decoding(decoding: AnyDecoding) -> str | None:
    if decoding.block not in (8, 16, 32):
        return f"blocks must be of 8, 16 or 32, got {decoding.block}: dequantize and use jnp.dot"
    if isinstance(decoding, TableDecoding):
        return None
    plan = _plan(decoding)
    if any(_significant_bits(multiple) > 4 for multiple in plan.multiples):
        return f"multipliers need at most 4 significant bits, got {decoding.multipliers}: move the rest into factor"
    if decoding.scale == "e8m0" and max(map(abs, plan.multiples)) > 1:
        return f"E8M0 scales leave no room for multipliers, got {decoding.multipliers}: move them into factor"
    if not plan.exact():
        return f"bfloat16 cannot add up these magnitudes exactly: {decoding.magnitudes}: dequantize and use jnp.dot"
    return None


def _check_packed(words: jax.Array, scales: jax.Array, n: int, k: int, decoding: AnyDecoding) -> None:
    if words.dtype != jnp.int32 or scales.dtype != jnp.uint8:
        raise TypeError(f"words must be int32 and scales uint8, got {words.dtype} and {scales.dtype}: call pack")
    if n < 1 or k < 1 or k % decoding.block:
        raise ValueError(f"n and k must be positive, k a multiple of {decoding.block}, got n={n}, k={k}")
    padded_n, padded_k = _up(n, UNIT_N), _up(k, _unit_k(decoding))
    needed = (padded_k // 8, padded_n), (padded_k // decoding.block, padded_n)
    if (words.shape, scales.shape) != needed:
        raise ValueError(f"pack makes {needed} for n={n}, k={k}, got {words.shape}, {scales.shape}")


def _arithmetic(dtype: Any) -> Any:
    """The dtype to decode in: that of x, but float32 on a TPU whose vector unit lacks bfloat16 (before v6)."""
    try:
        generation = pltpu.get_tpu_info().generation
    except ValueError:  # no TPU: interpreted, or lowered for one that cannot be asked
        generation = 6
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 and generation >= 6 else jnp.float32)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _unit_k(decoding: AnyDecoding) -> int:
    """Tiles of bytes have 32 rows, hence blocks of 32 units of 1024 columns."""
    return max(UNIT_K, 32 * decoding.block)


def _divisor(size: int, limit: int, unit: int) -> int:
    """The largest multiple of unit that divides size, a multiple of it, and is at most limit, or else unit."""
    return max((tile for tile in range(unit, min(size, limit) + 1, unit) if size % tile == 0), default=unit)


def reference(
    x: jax.Array, nibbles: jax.Array, scales: jax.Array, factor: jax.Array, decoding: AnyDecoding
) -> jax.Array:
    """What `matmul` computes, in float32 and jnp: x [M, K], nibbles uint8 [N, K], scales uint8 [N, K / block]."""
    if isinstance(decoding, TableDecoding):
        low, mode = scales & (2**decoding.bits - 1), scales >> decoding.bits
        binade, units = low.astype(jnp.int32) >> decoding.mantissa, 2**decoding.mantissa
        significand = (low & (units - 1)).astype(jnp.float32) / units + (binade > 0).astype(jnp.float32)
        scale = jnp.ldexp(significand, jnp.maximum(binade, 1) - decoding.bias)
        scale = scale if decoding.nan is None else jnp.where(low == decoding.nan, jnp.nan, scale)
        scale, mode = (jnp.repeat(array, decoding.block, axis=1) for array in (scale, mode))
        weight = jnp.asarray(decoding.values, jnp.float32)[mode, nibbles] * scale
        return jnp.dot(x.astype(jnp.float32), weight.T, precision=lax.Precision.HIGHEST) * factor
    if decoding.scale == "e8m0":
        exponent = jnp.maximum(scales.astype(jnp.int32), 1) - 127
        scale = jnp.where(scales == 0, 0.0, jnp.ldexp(jnp.float32(1), exponent))
        scale = jnp.where(scales == 0xFF, jnp.nan, scale)
        mode = jnp.zeros_like(scales)
    else:
        two = len(decoding.magnitudes) == 2
        scale = lax.bitcast_convert_type(scales & (0x7F if two else 0xFF), jnp.float8_e4m3fn).astype(jnp.float32)
        mode = scales >> 7 if two else jnp.zeros_like(scales)
    scale = scale * jnp.asarray(decoding.multipliers, jnp.float32)[mode]
    scale, mode = (jnp.repeat(array, decoding.block, axis=1) for array in (scale, mode))
    magnitude = jnp.asarray(decoding.magnitudes, jnp.float32)[mode, nibbles & 7]
    weight = jnp.where(nibbles & 8 != 0, -magnitude, magnitude) * scale
    return jnp.dot(x.astype(jnp.float32), weight.T, precision=lax.Precision.HIGHEST) * factor
