"""x @ W.T on TPUs, with W packed at 4 bits in memory and decoded next to the matrix unit.

    out[m, n] = factor * sum_k x[m, k] * weight[n, k]
    weight[n, k] = +-magnitudes[mode][nibble & 7] * multipliers[mode] * scale(byte)          (see `Decoding`)

Decoding a `Decoding` needs neither branches nor tables. Any eight magnitudes lie on a piecewise linear function of
i = nibble & 7, which is a maximum of lines minus another maximum of lines; the coefficients are computed from the
record. With two modes one is the base, and blocks of the other mode add the difference. For IF4, in units of 1/2 for
E2M1 and of 1 for integers:

    value = i + (max(0, i - 4, 3i - 16) if the block is E2M1 else 0)

Two nibbles share a 32-bit lane: one `and` and one `or` on the word put them into the last bits of two bfloat16 128.

The sixteen values of a `TableDecoding` are first multiplied by each block's scale, once per block. Each bit of the
value at a nibble is a polynomial of the nibble's four bits, with `and` as product and `xor` as sum. Its sixteen
coefficients are computed once per block. Fifteen `and` and fifteen `xor` then decode two weights.

Numerics. The value (a magnitude divided by its unit) and scale * multiplier * unit are exact in bfloat16. Their
product, the weight, is exact in float32. For a bfloat16 x it is rounded once to bfloat16, with a relative error of at
most 2**-8, and without error if the product fits 8 bits (NVFP4, 4/6, MXFP4, 3-bit integers with multiplier 1). Products
with x are exact, and sums are float32; for a float32 x the products are float32 too, at the matrix unit's highest
precision. `factor` multiplies the sums once at the end, followed by one rounding to `out_dtype`. A NaN byte turns the
outputs of its row of W into NaN. TPUs flush subnormals: with E8M0 scales, a multiple below 2**-126 (MXFP4's byte 1) may
be read as 0.
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
from pallas_kernels.varying import results_of

# From this many rows of x on, dequantizing once and XLA's dot are expected to be faster. Writing and reading back
# bfloat16 weights moves 4.5 bytes per weight, which on a v6e (1.6 TB/s, 918 Tflop/s) takes the time of 1300 rows, once.
# The kernel's overhead grows with the rows. By the count of instruction bundles at 512 rows it is 28% of a product with
# bfloat16 weights, which puts the break-even point at 4600 rows; with 100% it would be 1300. This is an estimate in
# between, not a measurement.
LARGE_M = 2048

# W is packed in units of UNIT_N rows by UNIT_K columns and padded to whole units. UNIT_K is four pairs of nibbles per
# word times 128 columns of x, the width of a vector register. UNIT_N is the width of the matrix unit from v6e on.
UNIT_N = 256
UNIT_K = 512
_PAIRS = 4
_PAIR_K = UNIT_K // _PAIRS
_LANES = 128
_SUBLANES = 16  # rows of a bfloat16 register; rows of x are padded to a multiple of it

# Masks for a word whose 16-bit halves hold one nibble each in their last bits.
_INDICES = 0x00070007
_LAST_BITS = 0x00010001
_SIGNS = -0x7FFF8000  # 0x80008000: the signs of two bfloat16
_TWO_128 = 0x43004300  # two bfloat16 128, whose last bit is worth 1


AnyDecoding = Decoding | TableDecoding


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The size of one grid step: at most m rows of x, n rows of W (multiples of 256), k of both (multiples of 512)."""

    m: int
    n: int
    k: int

    def __post_init__(self):
        if self.m < 1 or self.m % _SUBLANES or self.n < 1 or self.n % UNIT_N or self.k < 1 or self.k % UNIT_K:
            raise ValueError(f"tiles need multiples of m={_SUBLANES}, n={UNIT_N}, k={UNIT_K}, got {self}")


# Tiles by the largest number of rows of x that they serve. A step should take longer than its overhead of about
# 0.35 us, in which 1.6 TB/s load a million weights. x is read again for each tile along N, so n is large. A step's data
# should stay well below 16 MiB of VMEM.
TILES = {
    64: Tiles(m=64, n=1024, k=1024),  # unmeasured
    256: Tiles(m=256, n=1024, k=512),  # unmeasured
    LARGE_M: Tiles(m=512, n=1024, k=512),  # unmeasured; also for more rows than this
}


def supports(decoding: AnyDecoding, dtype: Any, m: int) -> str | None:
    """Return why `matmul` should not be used for m rows of x of this dtype, with an alternative; None if it may be."""
    if m >= LARGE_M:
        return f"m={m} rows of x: from {LARGE_M} on, dequantize once and use jnp.dot"
    if reason := _wrong_dtype(dtype):
        return f"x {reason}"
    return _wrong_decoding(decoding)


def pack(nibbles: jax.Array, scales: jax.Array, decoding: AnyDecoding) -> tuple[jax.Array, jax.Array]:
    """Pack W in the kernel's layout: half a byte per weight, K before N, every code and byte kept (also negative zero).

    N and K are padded with zero codes and zero scales, N to a multiple of 256 and K to a multiple of 512 (1024 for
    blocks of 32). Word row 64 g + r holds in bits 4 i + 16 j to 4 i + 16 j + 3 the nibble of k = 512 g + 128 i + 2 r +
    j. So a shift by 4 i yields the pair for rows 2 r and 2 r + 1 of a bfloat16 register, whose 32-bit lanes hold two
    rows.

    Args:
        nibbles: uint8 [N, K], sign and magnitude, 0 to 15; higher bits are ignored.
        scales: uint8 [N, K / block].
        decoding: the decoding of the weights; only its block matters here.

    Returns:
        int32 words [K / 8, N] and uint8 scales [K / block, N], with N and K padded.

    Raises:
        TypeError: a dtype is not uint8.
        ValueError: the shapes do not fit each other.
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
    """Invert `pack`, bit for bit: return nibbles uint8 [n, k] and scale bytes uint8 [n, k / block].

    Raises:
        TypeError: the arrays do not have the dtypes of `pack`'s result.
        ValueError: the arrays do not have the shapes of `pack`'s result for n and k.
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
    """Return x @ W.T * factor, [M, n] of `out_dtype`, for W packed by `pack`; vmap works.

    Args:
        x: bfloat16 or float32 [M, k], of any M.
        words, scales: the arrays that `pack` returned.
        factor: a float32 scalar array.
        n, k: rows and columns of W before padding.
        decoding: the decoding of codes and scales.
        out_dtype: bfloat16 or float32.
        tiles: the size of a grid step, by default from `TILES`; its n and k are lowered to the largest multiples of a
            unit that divide the padded sizes.
        interpret: True or a `pltpu.InterpretParams`, to run without a TPU.

    Raises:
        TypeError: the kernel does not support a dtype.
        ValueError: the kernel does not support the decoding, or the shapes do not fit each other.
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
    # All row tiles have the same size: 520 rows are two tiles of 272, not 512 and 8.
    tile_m = _up(pl.cdiv(m, pl.cdiv(m, tiles.m)), _SUBLANES)
    tile_n, tile_k = _divisor(padded_n, tiles.n, UNIT_N), _divisor(padded_k, tiles.k, _unit_k(decoding))
    # x and W are padded with zeros to whole tiles. Partial tiles would contain garbage, and 0 * NaN would be NaN.
    x = jnp.pad(x, ((0, _up(m, tile_m) - m), (0, padded_k - k)))
    args = x, words, scales, factor.reshape(1, 1)  # with vmap's axis these are three axes, as Mosaic requires
    (written,) = results_of(args, [jax.ShapeDtypeStruct((x.shape[0], padded_n), out_dtype)])
    out = pl.pallas_call(
        functools.partial(_body, decoding=decoding, arithmetic=_arithmetic(x.dtype)),
        out_shape=written,
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
    )(*args)
    return out[:m, :n]


def _body(x, words, scales, factor, out, sums, tables, *, decoding: AnyDecoding, arithmetic: Any):
    """Compute one tile: x [tm, tk], words [tk / 8, tn], scales [tk / block, tn], out and sums [tm, tn].

    tables [tn / 128, words per block, tk / block, 128] holds the result of `_words_of`. From memory 128 lanes wide, a
    row is loaded into all sublanes of a register without using the vector unit.
    """

    @pl.when(pl.program_id(2) == 0)
    def _():
        sums[...] = jnp.zeros_like(sums)

    strips = words.shape[1] // _LANES
    for s in range(strips):
        for t, table in enumerate(_words_of(scales[:, s * _LANES : (s + 1) * _LANES], decoding, arithmetic)):
            tables[s, t] = table

    count = decoding.block // (4 // jnp.dtype(arithmetic).itemsize)  # words of a block in a column
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
        # Strips are concatenated along lanes, the pairs of a strip along rows.
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
    """Return the number of words that `_words_of` computes for a block."""
    return 16 if isinstance(decoding, TableDecoding) else len(decoding.magnitudes)


def _words_of(scales: jax.Array, decoding: AnyDecoding, arithmetic: Any) -> list[jax.Array]:
    """Return the int32 words by which blocks are decoded, from their scale bytes [r, 128]."""
    if isinstance(decoding, TableDecoding):
        return _table_words(scales, decoding, arithmetic)
    return _scale_words(scales, decoding, arithmetic)


def _decoded(
    words: jax.Array, pair: int, spread: Sequence[jax.Array], decoding: AnyDecoding, arithmetic: Any, dtype: Any
) -> jax.Array:
    """Return the weights [2 r, 128] of one of the four pairs of nibbles of int32 words [r, 128], as `dtype`.

    spread holds the words of `_words_of`, repeated over their blocks: [r, 128] if arithmetic is bfloat16, else
    [2 r, 128].
    """
    if isinstance(decoding, TableDecoding):
        return _decode_by_table(words, pair, spread, arithmetic, dtype)
    return _decode(words, pair, spread, decoding, arithmetic, dtype)


def _table_words(scales: jax.Array, decoding: TableDecoding, arithmetic: Any) -> list[jax.Array]:
    """Return the sixteen values times the scale; in bfloat16 the coefficients of their bit polynomial, each twice."""
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
    for bit in range(4):  # values at indices with this bit set become differences to those without it
        words = [word ^ words[i - 2**bit] if i >> bit & 1 else word for i, word in enumerate(words)]
    return words


def _decode_by_table(words, pair: int, spread, arithmetic, dtype) -> jax.Array:
    if arithmetic == jnp.bfloat16:
        values = list(spread)
        for bit in range(4):
            last = lax.shift_right_logical(words, 4 * pair + bit) & _LAST_BITS
            mask = (last << 16) - last  # all ones in the halves whose bit is set
            values = [low ^ (high & mask) for low, high in zip(values[::2], values[1::2], strict=True)]
        return pltpu.bitcast(values[0], jnp.bfloat16).astype(dtype)
    values = [pltpu.bitcast(word, arithmetic) for word in spread]
    for bit in range(4):
        last = lax.shift_right_logical(words, 4 * pair + bit) & _LAST_BITS
        is_set = pltpu.bitcast(last << 14, jnp.bfloat16).astype(arithmetic) > 1  # 2 or 0
        values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    return values[0].astype(dtype)


def _scale_words(scales: jax.Array, decoding: Decoding, arithmetic: Any) -> list[jax.Array]:
    """Return int32 words of scale * multiplier * unit from scale bytes [r, 128]: a float32, or a bfloat16 twice.

    With two modes a mask follows: -1 for blocks to which the difference is added, and 0 for blocks of the base mode.
    """
    plan = _plan(decoding)
    byte = scales.astype(jnp.int32)
    if decoding.scale == "e8m0":
        scale, nan = lax.bitcast_convert_type(byte << 23, jnp.float32), byte == 0xFF
    else:
        low = byte & 0x7F
        normal = lax.bitcast_convert_type((low << 20) + (120 << 23), jnp.float32)
        # `normal` reads a subnormal byte as 2**-7 * (1 + m / 8). Its value is m / 8 * 2**-6 = 2 * normal - 2**-6, which
        # is smaller than `normal` only below 2**-6. (As a subnormal float32 it would be flushed to zero.)
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
    """Return `rows` rows of a table [r, 128] from `first` on, each repeated `count` times."""
    copies = [jnp.broadcast_to(table[r : r + 1], (count, _LANES)) for r in range(first, first + rows)]
    return jnp.concatenate(copies, axis=0)


def _decode(
    words: jax.Array, pair: int, spread: Sequence[jax.Array], decoding: Decoding, arithmetic: Any, dtype: Any
) -> jax.Array:
    """Return the weights [2 r, 128] of one of the four pairs of nibbles of int32 words [r, 128], as `dtype`.

    spread holds the words of `_scale_words`, repeated over their blocks: [r, 128] if arithmetic is bfloat16, else
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
    """The function max(slope * i - offset over `upper`) - max(slope * i - offset over `lower`), for i from 0 to 7."""

    upper: tuple[tuple[float, float], ...]
    lower: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, values: Sequence[float]) -> "_Curve":
        """Return the piecewise linear function through 0 = values[0], values[1], ...

        Where the slope increases, a line is added to `upper`, because a convex function is the maximum of its pieces.
        Where the slope decreases, a line is added to `lower` instead.
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
            # Factors of 1 and offsets of 0 are left out here, because the compiler does not remove them.
            scaled = index if slope == 1 else index * slope if slope else jnp.zeros_like(index)
            return scaled - offset if offset else scaled

        upper, lower = (
            functools.reduce(jnp.maximum, itertools.starmap(line, lines)) for lines in (self.upper, self.lower)
        )
        return upper - lower if len(self.lower) > 1 else upper

    def numbers(self) -> list[float]:
        """Return all intermediate and final numbers of the curve's computation for i from 0 to 7."""
        found = []
        for i in range(8):
            upper, lower = ([slope * i - offset for slope, offset in lines] for lines in (self.upper, self.lower))
            found += [*upper, *lower, max(upper) - max(lower)]
        for slope, offset in self.upper + self.lower:
            found += [slope, offset, *(slope * i for i in range(8))]
        return found


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The computation of a decoding: value(i) of the base mode, plus difference(i) for blocks of the other mode."""

    multiples: tuple[float, ...]  # for each mode the scale's factor, multiplier * unit
    base: int
    value: _Curve
    difference: _Curve

    def exact(self) -> bool:
        """Return whether every intermediate number is exact in bfloat16."""
        return all(_significant_bits(number) <= 8 for number in self.value.numbers() + self.difference.numbers())


@functools.cache
def _plan(decoding: Decoding) -> _Plan:
    # A unit is a power of two, so that division by it is exact. With it the curves of most modes start with slope 1.
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
    """Return the dtype of the decoding: that of x, but float32 on TPUs before v6, whose vector unit lacks bfloat16."""
    try:
        generation = pltpu.get_tpu_info().generation
    except ValueError:  # no TPU here: the kernel is interpreted or compiled for another machine
        generation = 6
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.bfloat16 and generation >= 6 else jnp.float32)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _unit_k(decoding: AnyDecoding) -> int:
    """Return the unit along K: tiles of scale bytes need 32 rows, so that blocks of 32 need units of 1024 columns."""
    return max(UNIT_K, 32 * decoding.block)


def _divisor(size: int, limit: int, unit: int) -> int:
    """Return the largest multiple of unit that divides size and is at most limit; unit if there is none."""
    return max((tile for tile in range(unit, min(size, limit) + 1, unit) if size % tile == 0), default=unit)


def reference(
    x: jax.Array, nibbles: jax.Array, scales: jax.Array, factor: jax.Array, decoding: AnyDecoding
) -> jax.Array:
    """Compute `matmul` in float32 by jnp from x [M, K], nibbles uint8 [N, K] and scales uint8 [N, K / block]."""
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
