"""The specification in plain numpy: slow, eager, and independent of the library it judges.

Every operation is one float32 rounding of numpy, elements are rounded by their distance to every grid value,
and nothing is imported from ifjax. `quantize` and `dequantize` cover every named format, 1-D and 2-D blocks
and stochastic rounding; `decode_table` lists what every pair of bytes means; `rotate` rotates by Hadamard.
"""

import dataclasses
from typing import NamedTuple

import ml_dtypes
import numpy as np

F32 = np.float32
FLT_MAX = float(np.finfo(F32).max)


@dataclasses.dataclass(frozen=True)
class Grid:
    """`magnitudes` ascend from 0 in code order; the sign bit sits above them, unless in two's complement."""

    magnitudes: tuple[float, ...]
    ties: str = "even"  # or "down"
    zero: str = "copied"  # sign of a zero: the sign bit of y, "below" (only for y < 0) or "never"
    twos_complement: bool = False

    @property
    def sign_bit(self):
        return 1 << (len(self.magnitudes) - 1).bit_length()

    @property
    def values(self):
        """f64, indexed by code."""
        if self.twos_complement:
            return np.array([*range(self.sign_bit), *range(-self.sign_bit, 0)], np.float64)
        positive = np.array(self.magnitudes)
        return np.concatenate([positive, -positive])


def _float_magnitudes(exponent_bits, mantissa_bits, bias):
    normal = 2**mantissa_bits
    exponents = range(2**exponent_bits)
    return tuple((m / normal + (e > 0)) * 2.0 ** (max(e, 1) - bias) for e in exponents for m in range(normal))


def _integers(largest, **how):
    return Grid(tuple(float(i) for i in range(largest + 1)), zero="never", **how)


E2M1 = Grid(_float_magnitudes(2, 1, 1))
E2M0 = Grid((0.0, 1.0, 2.0, 4.0), ties="down", zero="below")
E2M3 = Grid(_float_magnitudes(2, 3, 1))
E3M2 = Grid(_float_magnitudes(3, 2, 3))
INT3, INT4, INT6 = _integers(3), _integers(7, twos_complement=True), _integers(31)
E4M3 = Grid(_float_magnitudes(4, 3, 7)[:-1])  # the last magnitude is NaN


class Candidate(NamedTuple):
    """One way to fill a block; `step` and `inverse` are the constants E and R of an IF format's integers."""

    grid: Grid
    step: np.float32 = F32(1)
    inverse: np.float32 = F32(1)
    stretch: np.float32 = F32(1)


class Format(NamedTuple):
    """`peak` is max_q; `scale_max` is max_s, None for E8M0 scales, which go without a tensor scale."""

    candidates: tuple[Candidate, ...]
    block: int
    peak: float
    scale_max: int | None = 448

    @property
    def flagged(self):
        """Bit 7 of the scale byte names the second grid."""
        return self.candidates[0].grid != self.candidates[-1].grid

    @property
    def losses(self):
        return ("mse", "mae", "abs_max") if len(self.candidates) > 1 else ("static",)


def _bits(word):
    return np.uint32(word).view(F32)


def _plain(grid, block=16, **stated):
    return Format((Candidate(grid),), block, **{"peak": grid.magnitudes[-1], **stated})


def _mx(grid, block=32, **stated):
    return _plain(grid, block, scale_max=None, **stated)


def _if(first, second, step, inverse, block=16):
    integers = Candidate(second, _bits(step), _bits(inverse))
    return Format((Candidate(first), integers), block, first.magnitudes[-1])


def _four_over_six(block=16):
    return Format((Candidate(E2M1), Candidate(E2M1, stretch=F32(1.5))), block, 6.0, scale_max=256)


FORMATS = {
    "nvfp4": _plain(E2M1),
    "nvfp4_bs8": _plain(E2M1, 8),
    "nvfp4_static4": _plain(E2M1, peak=4.0),
    "fouroversix": _four_over_six(),
    "fouroversix_bs8": _four_over_six(8),
    "nvint4": _plain(INT4),
    "nvint4_bs8": _plain(INT4, 8),
    "if4": _if(E2M1, INT4, 0x3F5B6DB7, 0x3F955555),
    "if4_bs8": _if(E2M1, INT4, 0x3F5B6DB7, 0x3F955555, 8),
    "nvfp3": _plain(E2M0),
    "nvfp3_bs8": _plain(E2M0, 8),
    "nvint3": _plain(INT3),
    "nvint3_bs8": _plain(INT3, 8),
    "if3": _if(E2M0, INT3, 0x3FAAAAAB, 0x3F400000),
    "if3_bs8": _if(E2M0, INT3, 0x3FAAAAAB, 0x3F400000, 8),
    "nvfp6_e2m3": _plain(E2M3),
    "nvfp6_e3m2": _plain(E3M2),
    "nvint6": _plain(INT6),
    "if6_e2m3": _if(E2M3, INT6, 0x3E77BDF1, 0x40844444),
    "if6_e3m2": _if(E3M2, INT6, 0x3F6739CE, 0x3F8DB6DB),
    "mxfp4": _mx(E2M1),
    "mxfp4_bs8": _mx(E2M1, 8),
    "mxfp4_static4": _mx(E2M1, peak=4.0),
    "mxfp3": _mx(E2M0),
    "mxfp3_bs8": _mx(E2M0, 8),
    "mxfp6_e2m3": _mx(E2M3),
    "mxfp6_e3m2": _mx(E3M2),
}


class Result(NamedTuple):
    """`ambiguous`: summation order, FMA or the flush of subnormals may choose the other candidate here.
    `lost`: in x's own units the float32 losses under- or overflow, so that the published code cannot choose here."""

    codes: np.ndarray  # u8 [r, n], one code a byte
    scales: np.ndarray  # u8 [r, n/B]
    amax: np.float32
    deq: np.ndarray  # f32 [r, n]
    select: np.ndarray  # bool [r, n/B], the second candidate
    ambiguous: np.ndarray  # bool [r, n/B]
    lost: np.ndarray  # bool [r, n/B]


@np.errstate(all="ignore")
def quantize(x, fmt, *, loss="mse", block=None, block_2d=False, amax=None, headroom=1.0, noise=None):
    """Quantizes finite x f32[r, n] along its last axis; `fmt` is a name or a `Format`.

    `noise` holds one u in [0, 1) of x's shape for each candidate and makes E2M1 and INT4 stochastic, the only
    grids with such a path; `headroom` is 16/17 for `stochastic_unbiased`. `loss` is unused where there is one
    candidate; it is taken in units of a power of two near amax. Scaled values that are NaN, possible only for amax
    below 8e-36, get code 0.
    """
    fmt = _format(fmt, block)
    if np.ndim(x) != 2 or not np.isfinite(x).all():
        raise ValueError("quantize needs a finite matrix")
    x = np.asarray(x, F32)
    if fmt.scale_max is None:
        amax = 1
    elif amax is None:
        amax = np.abs(x).max()
    amax = F32(amax)
    height = fmt.block if block_2d else 1
    blocks = _cut(x, height, fmt.block)
    noises = [None] * 2 if noise is None else [_cut(np.asarray(u, F32), height, fmt.block) for u in noise]
    tries = [_encode(blocks, amax, fmt, i, headroom, noises[i]) for i in range(len(fmt.candidates))]
    errors = [deq - blocks for *_, deq in tries]
    # A power of two changes no bit of what is in range.
    power = F32(2.0 ** -np.floor(np.log2(amax))) if 2.0**-120 < amax < 2.0**120 else F32(1)
    select, ambiguous = _select([e * power for e in errors], loss)
    lost = _lost(errors, loss)
    pairs = zip(tries[0], tries[-1], strict=True)
    codes, byte, deq = (np.where(select[..., None], second, first) for first, second in pairs)
    codes, deq = (_paste(elements, height, fmt.block) for elements in (codes, deq))
    scales, *flags = (np.repeat(a, height, axis=0) for a in (byte[..., 0], select, ambiguous, lost))
    return Result(codes, scales, amax, deq, *flags)


@np.errstate(all="ignore")
def dequantize(codes, scales, amax, fmt, headroom=1.0, block=None):
    """f32[r, n]; the choice of grid is read from bit 7 of the scale byte."""
    fmt = _format(fmt, block)
    blocks = _cut(np.asarray(codes, np.uint8), 1, fmt.block)
    return _paste(_decode(blocks, np.asarray(scales, np.uint8), F32(amax), fmt, headroom), 1, fmt.block)


def decode_table(fmt):
    """f64[256, codes]: exactly value * scale (* step, a float32) at [scale byte, code], before amax / K.

    Formats without a flag read bit 7 of an E4M3 byte as the sign it is, though no quantizer writes it.
    """
    fmt = _format(fmt, None)
    byte = np.arange(256, dtype=np.uint8)
    scale = _scale_value(byte, fmt)[:, None].astype(np.float64)
    tables = [scale * c.grid.values * np.float64(c.step) for c in fmt.candidates]
    return np.where((byte >= 0x80)[:, None] & fmt.flagged, tables[-1], tables[0])


SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1], F32)


def rotation():
    """diag(SIGNS) times the 16 x 16 Hadamard matrix over 4; orthogonal."""
    hadamard = np.array([[1]], F32)
    for _ in range(4):
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return SIGNS[:, None] * hadamard / F32(4)


def rotate(x):
    """Each run of 16 along the last axis times `rotation()`, rounded to bfloat16; x holds bfloat16 values."""
    # exact in float64 for bfloat16 values of like magnitude, so that only the last rounding counts
    product = x.reshape(*x.shape[:-1], -1, 16).astype(np.float64) @ rotation().astype(np.float64)
    return product.reshape(x.shape).astype(F32).astype(ml_dtypes.bfloat16).astype(F32)


def _format(fmt, block):
    fmt = FORMATS[fmt] if isinstance(fmt, str) else fmt
    return fmt if block is None else fmt._replace(block=block)


def _cut(x, height, width):
    """[r, n] into blocks [r/height, n/width, height*width]."""
    r, n = x.shape
    tiles = x.reshape(r // height, height, n // width, width).swapaxes(1, 2)
    return tiles.reshape(r // height, n // width, height * width)


def _paste(blocks, height, width):
    p, q, _ = blocks.shape
    return blocks.reshape(p, q, height, width).swapaxes(1, 2).reshape(p * height, q * width)


def _constants(fmt, headroom):
    """Q and K: products in double, left to right, rounded once."""
    return F32(fmt.peak * headroom), F32(fmt.peak * fmt.scale_max * headroom)


def _encode(blocks, amax, fmt, i, headroom, u):
    """Candidate i everywhere: codes, scale bytes with their flag [p, q, 1], and decoded values."""
    candidate = fmt.candidates[i]
    byte, scaled = _scale(blocks, amax, fmt, candidate, headroom)
    codes = _round(scaled * candidate.inverse, candidate.grid, u)
    # 0x80 is never chosen: a zero scale decodes both grids to the same zeros, and a tie goes to the first
    byte = byte | (0x80 if fmt.flagged and i else 0)
    return codes, byte[..., None], _decode(codes, byte, amax, fmt, headroom)


def _scale(blocks, amax, fmt, candidate, headroom):
    """The scale byte of each block, without a flag, and the elements in units of that scale."""
    largest = np.abs(blocks).max(-1)
    if fmt.scale_max is None:
        byte = _ceil_to_e8m0(largest / F32(fmt.peak))
        scaled = blocks / _scale_value(byte, fmt)[..., None]
    else:
        q, k = _constants(fmt, headroom)
        encode = k / amax
        h = (largest / q) * encode
        h = np.where(np.isnan(h) | (amax == 0), F32(0), h) * candidate.stretch
        byte = _nearest(h, E4M3)
        inverse = F32(1) / ((F32(1) / encode) * _scale_value(byte, fmt))
        scaled = blocks * inverse[..., None]
    return byte, np.where((byte != 0)[..., None], scaled, F32(0))


def _ceil_to_e8m0(h):
    bits = h.view(np.uint32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).astype(np.uint8)


def _scale_value(byte, fmt):
    """f32, the flag of an IF byte cleared. An E8M0 byte of 0 means 0."""
    if fmt.scale_max is None:
        table = np.ldexp(1.0, np.arange(256) - 127)
        table[0], table[255] = 0.0, np.nan
    else:
        half = np.append(E4M3.magnitudes, np.nan)
        table = np.concatenate([half, half if fmt.flagged else -half])
    return table.astype(F32)[byte]


def _round(y, grid, u):
    """Codes; stochastic with noise u where the grid has a stochastic path, else to the nearest."""
    if u is None or grid not in (E2M1, INT4):
        magnitude = _nearest(y, grid)
    else:
        magnitude = _stochastic(np.abs(y), grid, u - F32(0.5))
    if grid.zero == "copied":
        negative = np.signbit(y)
    elif grid.zero == "below":
        negative = y < 0
    else:
        negative = (y < 0) & (magnitude != 0)
    if grid.twos_complement:
        return np.where(negative, 2 * grid.sign_bit - magnitude, magnitude).astype(np.uint8)
    return np.where(negative, grid.sign_bit + magnitude, magnitude).astype(np.uint8)


def _nearest(y, grid):
    """Index of the nearest magnitude; NaN gives 0.

    Cut to the grid's range, the distance in float64 is exact wherever two of them are close.
    """
    magnitudes = np.array(grid.magnitudes)
    a = np.minimum(np.abs(np.nan_to_num(y, nan=0.0)).astype(np.float64), magnitudes[-1])
    distance = np.abs(a[..., None] - magnitudes)
    nearest = distance == distance.min(-1, keepdims=True)
    if grid.ties == "even":  # of two neighbours at one distance, one code is even
        nearest &= (nearest.sum(-1, keepdims=True) == 1) | (np.arange(magnitudes.size) % 2 == 0)
    return nearest.argmax(-1).astype(np.uint8)


def _stochastic(a, grid, r):
    if grid == INT4:
        value = np.rint(np.clip(a + r, F32(-7), F32(7)))
    else:
        coarse = np.minimum(F32(2) * np.rint(a / F32(2) + r), F32(6))
        value = np.where(a < 2, np.rint(F32(2) * a + r) / F32(2), np.where(a < 4, np.rint(a + r), coarse))
    return np.searchsorted(grid.magnitudes, value).astype(np.uint8)


def _decode(codes, byte, amax, fmt, headroom):
    """f32 [p, q, e] of codes [p, q, e] under scale bytes [p, q]."""
    scale = _scale_value(byte, fmt)[..., None]
    out = []
    for candidate in (fmt.candidates[0], fmt.candidates[-1]):
        value = candidate.grid.values.astype(F32)[codes] * scale
        if fmt.scale_max is not None:
            value = value * amax * candidate.step / _constants(fmt, headroom)[1]
        else:
            value = np.clip(value, F32(-FLT_MAX), F32(FLT_MAX))  # saturates; NaN stays
        out.append(value)
    return np.where((byte >= 0x80)[..., None] & fmt.flagged, out[1], out[0])


def _select(errors, loss):
    """Where the second candidate has strictly less loss, and where that is ambiguous."""
    nowhere = np.zeros(errors[0].shape[:-1], bool)
    if len(errors) == 1:
        return nowhere, nowhere
    if loss == "abs_max":
        first, second = (np.abs(e).max(-1) for e in errors)
        return second < first, nowhere
    term = {"mse": np.square, "mae": np.abs}[loss]
    terms = [term(e) for e in errors]
    first, second = (_sum(t) for t in terms)
    exact = [term(e.astype(np.float64)).sum(-1) for e in errors]
    return second < first, ~(terms[0] == terms[1]).all(-1) & _near(*exact, errors[0].shape[-1])


def _lost(errors, loss):
    """Where a square of an error, or their sum, leaves the range of normal float32."""
    if len(errors) == 1 or loss != "mse":
        return np.zeros(errors[0].shape[:-1], bool)
    squares = [np.square(e.astype(np.float64)) for e in errors]
    return sum((((s > 0) & (s < 2.0**-126)).any(-1) | (s.sum(-1) > FLT_MAX / 2)) for s in squares) > 0


def _near(a, b, n):
    """Whether two exact sums of n terms are too near to each other, or to overflow, for float32 to decide."""
    slack = 2 * n * 2.0**-24
    both_overflow = (a > FLT_MAX * (1 + slack)) & (b > FLT_MAX * (1 + slack))
    at_overflow = (np.abs(a / FLT_MAX - 1) <= slack) | (np.abs(b / FLT_MAX - 1) <= slack)
    # a flushed term loses at most the least normal number
    close = np.abs(a - b) <= slack * (a + b) + n * 2.0**-126
    return (close | at_overflow) & ~both_overflow


def _sum(terms):
    """float32 sum of [..., 8k] in the order of PyTorch's CPU kernel, the maker of the vectors without a mask.

    Vectors of 8 go round four accumulators, the leftovers to the first; then the 8 lanes from left to right.
    """
    vectors = terms.reshape(*terms.shape[:-1], -1, 8)
    whole = vectors.shape[-2] // 4 * 4
    accumulators = [np.zeros_like(vectors[..., 0, :]) for _ in range(4)]
    for i in range(vectors.shape[-2]):
        accumulators[i % 4 if i < whole else 0] += vectors[..., i, :]
    lanes = accumulators[0] + accumulators[1] + accumulators[2] + accumulators[3]
    total = np.zeros_like(lanes[..., 0])
    for i in range(8):
        total += lanes[..., i]
    return total
