"""Encoding and decoding of matrices of any size in pieces of one size, by one compiled program per format.

Blocks depend on one another only through amax. So rows of whole blocks can be concatenated and split anywhere between
blocks. A matrix with blocks along its columns is transposed, some rows at a time, and the results are transposed back.
The bytes equal those of `ifjax.quantize` on the whole matrix, and memory use does not grow with its size.

    read -> slab [rows, whole blocks] -> pieces -> device -> slab of bytes, or of values
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from ifjax.arrays import Blocking, QTensor, quantize
from ifjax.codec import Encoding
from ifjax.formats import Format
from ifjax.numerics.packing import packed_length

# The number of values that the device processes at a time. A piece and its results fit in a CPU's cache.
PIECE = 2**18

# (start, count) -> elements [start, start + count) of a flat array, in its own dtype.
Read = Callable[[int, int], np.ndarray]


class Encoded(NamedTuple):
    """The next bytes of a matrix's codes and scales, in memory order.

    Attributes:
        codes, scales: uint8 arrays.
        signal, noise: the sums of squares of x and of the error; 0 unless measured.
        nonzero, flushed: the numbers of blocks with nonzero values, and of those among them that decode to zeros only;
            0 unless measured.
    """

    codes: np.ndarray
    scales: np.ndarray
    signal: float
    noise: float
    nonzero: int
    flushed: int


def amax_of(read: Read, size: int) -> np.float32:
    """Return the largest finite magnitude in float32, equal to the amax of `ifjax.quantize`."""
    top = np.float32(0)
    for start in range(0, size, PIECE):
        x = read(start, min(PIECE, size - start))
        x = as_float32(x) if x.dtype == np.float64 else x
        # The bit patterns of nonnegative floats have the order of their values.
        word = np.dtype(f"u{x.dtype.itemsize}").type
        bits = x.view(word) & word(np.iinfo(word).max >> 1)
        infinity = np.asarray(np.inf, x.dtype).view(word)
        largest = bits.max(initial=0)
        if largest >= infinity:
            largest = bits.max(where=bits < infinity, initial=0)
        top = max(top, np.float32(largest.astype(word).view(x.dtype)))
    return top


def encode(
    read: Read, shape: tuple[int, int], amax: np.float32, how: Encoding, axis: int, *, measured: bool = False
) -> Iterator[Encoded]:
    """Yield the bytes of a matrix's QTensor, some whole rows or runs of blocks at a time.

    Args:
        read: reads elements of the matrix.
        shape: the shape [r, c] of the matrix.
        amax: the matrix's amax. For formats without a tensor scale it only determines the unit of the sums.
        how: the encoding.
        axis: the blocked axis, -1 or -2.
        measured: whether to compute the sums of `Encoded`.
    """
    slabs = _squares if how.block_2d else _rows if axis == -1 else _columns
    unit, fmt = unit_of(float(amax)), how.fmt
    scale = amax if fmt.has_tensor_scale else None

    def start(slab):
        x, finish = slab
        pieces = [x] if how.block_2d else _cut(x, _piece(fmt))
        settings = {"how": how, "axis": axis if how.block_2d else -1, "measured": measured}
        return x.shape, finish, [_start(piece, scale, **settings) for piece in pieces]

    for (rows, length), finish, pieces in _one_ahead(map(start, slabs(read, shape, fmt, axis))):
        xs, codes, scales, decoded = zip(*pieces, strict=True)
        codes, scales = _joined(codes), _joined(scales)
        if not how.block_2d:
            width, high = _sizes(length, fmt)
            codes, scales = codes[: rows * width].reshape(rows, -1), scales[: rows * high].reshape(rows, -1)
        codes, scales = finish(codes, scales)
        sums: Any = [(0.0, 0.0, 0, 0)]
        if measured:
            along = axis if how.block_2d else -1
            sums = [
                (*energies(x, d, unit), *_flushed(x, d, fmt.block, along)) for x, d in zip(xs, decoded, strict=True)
            ]
        totals = map(sum, zip(*sums, strict=True))
        yield Encoded(np.ascontiguousarray(codes), np.ascontiguousarray(scales), *totals)


def decode(
    codes: Read, scales: Read, shape: tuple[int, int], amax: Any, blocking: Blocking, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Yield a matrix's values from its codes and scales, in order, some whole rows or runs of blocks at a time.

    `blocking` provides the format, the headroom and the axis (-1 or -2). `amax` is the matrix's amax, or None.
    """
    fmt = blocking.fmt
    slabs = _coded_rows if blocking.axis == -1 else _coded_columns
    packed, high = _sizes(_piece(fmt), fmt)
    piece = Blocking(fmt, -1, _piece(fmt), np.dtype(np.float32), blocking.headroom)

    def start(slab):
        c, s, finish = slab
        pieces = zip(_cut(c, packed), _cut(s, high), strict=True)
        return s.shape, finish, [_decode(c, s, amax, blocking=piece, dtype=dtype) for c, s in pieces]

    for (rows, width), finish, pieces in _one_ahead(map(start, slabs(codes, scales, shape, fmt))):
        length = width // fmt.scale.nbytes * fmt.block
        yield np.ascontiguousarray(finish(_joined(pieces)[: rows * length].reshape(rows, length)))


def chosen(scales: np.ndarray, fmt: Format, axis: int = -1) -> np.ndarray:
    """Count the blocks with each of the format's selectors, from scales [..., m * W, ...]."""
    if not fmt.has_selector:
        return np.array([scales.size // fmt.scale.nbytes])
    width, last = fmt.scale.nbytes, np.moveaxis(scales, axis, -1)
    header: Any = last if width == 1 else sum(last[..., i::width].astype(np.int32) << 8 * i for i in range(width))
    return np.bincount((header >> fmt.scale.bits).reshape(-1), minlength=len(fmt.decodings))


def as_float32(x: np.ndarray) -> np.ndarray:
    """Return x rounded to float32; values beyond its range become infinite."""
    if x.dtype == ml_dtypes.bfloat16:  # its bits are the upper half of a float32
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return x.astype(np.float32, copy=False)


# --- slabs -----------------------------------------------------------------------------------------------------------


def _whole(fmt: Format) -> int:
    """Return the number of values in the fewest blocks whose codes fill whole bytes."""
    return fmt.block * 8 // math.gcd(8, fmt.block * fmt.bits)


def _piece(fmt: Format) -> int:
    return max(PIECE // _whole(fmt), 1) * _whole(fmt)


def _sizes(values: int, fmt: Format) -> tuple[int, int]:
    """Return the bytes of codes and of scales for a row of values, with the last block padded."""
    blocks = -(-values // fmt.block)
    return packed_length(blocks * fmt.block, fmt.bits), blocks * fmt.scale.nbytes


def _filled(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Return x [r, c], padded with zeros below and to the right."""
    if x.shape == (rows, columns):
        return x
    filled = np.zeros((rows, columns), x.dtype)
    filled[: x.shape[0], : x.shape[1]] = x
    return filled


def _rows(read: Read, shape: tuple[int, int], fmt: Format, axis: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield float32 slabs [rows, whole blocks], and functions that crop the padding from their codes and scales."""
    del axis
    r, c = shape
    length = -(-c // _whole(fmt)) * _whole(fmt)
    if length == c:  # rows need no padding, so that they can be split anywhere between blocks
        for start in range(0, r * c, _piece(fmt)):
            yield as_float32(read(start, min(_piece(fmt), r * c - start)))[None], lambda codes, scales: (codes, scales)
        return
    at_once, (packed, high) = max(_piece(fmt) // length, 1), _sizes(c, fmt)
    for start in range(0, r, at_once):
        rows = min(at_once, r - start)
        x = as_float32(read(start * c, rows * c)).reshape(rows, c)
        yield _filled(x, rows, length), lambda codes, scales: (codes[:, :packed], scales[:, :high])


def _columns(read: Read, shape: tuple[int, int], fmt: Format, axis: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield the slabs of `_rows` for blocks along columns: some rows of the matrix, transposed."""
    del axis
    _, c = shape
    for start, rows, at_once in _bands(shape, fmt):
        x, ends = as_float32(read(start * c, rows * c)).reshape(rows, c), _sizes(rows, fmt)

        def finish(codes, scales, ends=ends):
            return codes[:, : ends[0]].T, scales[:, : ends[1]].T

        yield np.ascontiguousarray(_filled(x, at_once, c).T), finish


def _squares(read: Read, shape: tuple[int, int], fmt: Format, axis: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Yield the slabs of `_rows` for square blocks, which are not split into pieces: some rows of the matrix."""
    _, c = shape
    for start, rows, at_once in _bands(shape, fmt):
        x = as_float32(read(start * c, rows * c)).reshape(rows, c)
        ends = (rows, rows) if axis == -1 else _sizes(rows, fmt)

        def finish(codes, scales, ends=ends):
            return codes[: ends[0]], scales[: ends[1]]

        yield _filled(x, at_once, c), finish


def _bands(shape: tuple[int, int], fmt: Format) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, number of rows, number of rows with the last block padded) of each slab."""
    r, c = shape
    whole = _whole(fmt)
    at_once = min(max(_piece(fmt) // (whole * c), 1), -(-r // whole)) * whole
    for start in range(0, r, at_once):
        yield start, min(at_once, r - start), at_once


def _coded_rows(codes: Read, scales: Read, shape: tuple[int, int], fmt: Format):
    """Yield slabs [rows, bytes] of codes and of scales, and functions that crop the padding from their values."""
    r, c = shape
    packed, high = _sizes(c, fmt)
    if c % _whole(fmt) == 0:
        nbytes, at_once = fmt.scale.nbytes, _piece(fmt) // fmt.block
        blocks = r * high // nbytes
        for start in range(0, blocks, at_once):
            count, width = min(at_once, blocks - start), fmt.block * fmt.bits
            c_ = codes(start * width // 8, count * width // 8)
            yield c_[None], scales(start * nbytes, count * nbytes)[None], lambda values: values
        return
    length = -(-c // _whole(fmt)) * _whole(fmt)
    at_once, wide = max(_piece(fmt) // length, 1), _sizes(length, fmt)
    for start in range(0, r, at_once):
        rows = min(at_once, r - start)
        c_ = codes(start * packed, rows * packed).reshape(rows, packed)
        s_ = scales(start * high, rows * high).reshape(rows, high)
        yield _filled(c_, rows, wide[0]), _filled(s_, rows, wide[1]), lambda values: values[:, :c]


def _coded_columns(codes: Read, scales: Read, shape: tuple[int, int], fmt: Format):
    _, c = shape
    for start, rows, at_once in _bands(shape, fmt):
        first, here, whole = _sizes(start, fmt), _sizes(rows, fmt), _sizes(at_once, fmt)
        c_ = codes(first[0] * c, here[0] * c).reshape(here[0], c)
        s_ = scales(first[1] * c, here[1] * c).reshape(here[1], c)
        c_, s_ = _filled(c_, whole[0], c), _filled(s_, whole[1], c)
        yield np.ascontiguousarray(c_.T), np.ascontiguousarray(s_.T), lambda values, rows=rows: values[:, :rows].T


# --- the device ------------------------------------------------------------------------------------------------------


def _cut(x: np.ndarray, size: int) -> list[np.ndarray]:
    """Split x, flattened, into pieces of one size; the last one is padded with zeros."""
    flat = x.reshape(-1)
    pieces = [flat[start : start + size] for start in range(0, flat.size, size)]
    if pieces and pieces[-1].size < size:
        pieces[-1] = np.concatenate([pieces[-1], np.zeros(size - pieces[-1].size, x.dtype)])
    return pieces


def _joined(pieces: Iterable[Any]) -> np.ndarray:
    arrays = [np.asarray(piece) for piece in pieces]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _one_ahead(started: Iterator[Any]) -> Iterator[Any]:
    """Yield the items one behind: the next one is read and sent to the device before the current one is awaited."""
    before = next(started, None)
    for now in started:
        yield before
        before = now
    if before is not None:
        yield before


def _start(x, amax, how: Encoding, axis: int, measured: bool):
    """Return x, its codes and scales, and their decoded values if `measured`, else None."""
    codes, scales = _encode(x, amax, how=how, axis=axis)
    decoded = None
    if measured:  # a separate program: in one program XLA:CPU would repeat the encoding for each decoded value
        blocking = Blocking(how.fmt, axis, x.shape[axis], np.dtype(np.float32))
        decoded = _decode(codes, scales, amax, blocking=blocking, dtype=np.dtype(np.float32))
    return x, codes, scales, decoded


@jax.jit(static_argnames=("how", "axis"))
def _encode(x, amax, *, how, axis):
    q = quantize(x, how, axis=axis, amax=amax)
    return q.codes, q.scales


@jax.jit(static_argnames=("blocking", "dtype"))
def _decode(codes, scales, amax, *, blocking, dtype):
    return QTensor(codes, scales, amax, blocking).dequantize(dtype)


def energies(x: np.ndarray, decoded: Any, unit: float) -> tuple[float, float]:
    """Return the sums of squares of x and of the error, computed in units of `unit` to avoid overflow."""

    def energy(v):  # sums short runs in float32, then the runs' sums in float64
        v = v.reshape(-1) * np.float32(1 / unit)
        runs = np.concatenate([v, np.zeros(-v.size % 256, v.dtype)]).reshape(-1, 256) if v.size % 256 else v
        return float(np.einsum("ij,ij->i", *[runs.reshape(-1, 256)] * 2).sum(dtype=np.float64)) * unit**2

    with np.errstate(invalid="ignore"):  # differences of infinities are NaN
        return energy(x), energy(np.asarray(decoded) - x)


def _flushed(x: np.ndarray, decoded: Any, block: int, axis: int) -> tuple[int, int]:
    """Return the numbers of blocks with nonzero values, and of those among them that decode to zeros only."""
    there, kept = (
        (np.moveaxis(np.asarray(a), axis, -1) != 0).reshape(-1, block).any(-1) for a in (x, decoded)
    )  # fmt: skip
    return int(there.sum()), int((there & ~kept).sum())


def unit_of(amax: float) -> float:
    """Return a power of two near amax, in units of which squares neither overflow nor underflow."""
    if not 0 < amax < math.inf:
        return 1.0
    return 2.0 ** min(max(math.frexp(amax)[1], -100), 100)
