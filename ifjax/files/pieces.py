"""Matrices of any size, encoded and decoded in pieces of one size by one compiled program for each format.

Blocks do not know one another but for amax, so rows of whole blocks can be laid end to end and cut anywhere between
blocks. A matrix with blocks down its columns is turned, some rows at a time; what comes out is turned back. The bytes
are those of `ifjax.quantize` on the whole matrix, and memory does not grow with it.

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

# Values that the device sees at a time: a piece and what is made of it stay in a CPU's cache.
PIECE = 2**18

# (start, count) -> these elements of a flat array, in its own dtype.
Read = Callable[[int, int], np.ndarray]


class Encoded(NamedTuple):
    """The next bytes of a matrix's codes and scales, in their order in memory.

    Attributes:
        codes, scales: uint8.
        signal, noise: sums of x^2 and of the error's squares; 0 unless measured.
    """

    codes: np.ndarray
    scales: np.ndarray
    signal: float
    noise: float


def amax_of(read: Read, size: int) -> np.float32:
    """The largest finite magnitude in float32, as `ifjax.quantize` takes it."""
    top = np.float32(0)
    for start in range(0, size, PIECE):
        x = read(start, min(PIECE, size - start))
        x = as_float32(x) if x.dtype == np.float64 else x
        # Bit patterns of magnitudes are ordered as the magnitudes are.
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
    """The bytes of the matrix's QTensor, some whole rows or runs of blocks at a time.

    Args:
        read: reads the matrix [r, c].
        amax: the matrix's own. In formats without a tensor scale it is only what sums are reckoned in units of.
        axis: of the blocks, -1 or -2.
        measured: whether the sums of `Encoded` are wanted.
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
        sums = [energies(x, d, unit) for x, d in zip(xs, decoded, strict=True)] if measured else [(0.0, 0.0)]
        signal, noise = map(sum, zip(*sums, strict=True))
        yield Encoded(np.ascontiguousarray(codes), np.ascontiguousarray(scales), signal, noise)


def decode(
    codes: Read, scales: Read, shape: tuple[int, int], amax: Any, blocking: Blocking, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """Values of a matrix in order, some whole rows or runs of blocks at a time, from its codes and scales.

    Of `blocking` the format, headroom and axis (-1 or -2) are used; `amax` is the matrix's own, or None.
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
    """Counts of the blocks with each of the format's selectors, from scales [..., m * W, ...]."""
    if not fmt.has_selector:
        return np.array([scales.size // fmt.scale.nbytes])
    width, last = fmt.scale.nbytes, np.moveaxis(scales, axis, -1)
    header: Any = last if width == 1 else sum(last[..., i::width].astype(np.int32) << 8 * i for i in range(width))
    return np.bincount((header >> fmt.scale.bits).reshape(-1), minlength=len(fmt.decodings))


def as_float32(x: np.ndarray) -> np.ndarray:
    """x rounded to float32; beyond its range infinite."""
    if x.dtype == ml_dtypes.bfloat16:  # its bits are a float32's upper half
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return x.astype(np.float32, copy=False)


# --- slabs -----------------------------------------------------------------------------------------------------------


def _whole(fmt: Format) -> int:
    """Values of the fewest blocks whose codes fill whole bytes."""
    return fmt.block * 8 // math.gcd(8, fmt.block * fmt.bits)


def _piece(fmt: Format) -> int:
    return max(PIECE // _whole(fmt), 1) * _whole(fmt)


def _sizes(values: int, fmt: Format) -> tuple[int, int]:
    """Bytes of codes and of scales of a row of values, its last block filled up."""
    blocks = -(-values // fmt.block)
    return packed_length(blocks * fmt.block, fmt.bits), blocks * fmt.scale.nbytes


def _filled(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """x [r, c] with zeros below and to the right."""
    if x.shape == (rows, columns):
        return x
    filled = np.zeros((rows, columns), x.dtype)
    filled[: x.shape[0], : x.shape[1]] = x
    return filled


def _rows(read: Read, shape: tuple[int, int], fmt: Format, axis: int) -> Iterator[tuple[np.ndarray, Any]]:
    """Slabs [rows, whole blocks] of float32, and what cuts from their codes and scales what was filled up."""
    del axis
    r, c = shape
    length = -(-c // _whole(fmt)) * _whole(fmt)
    if length == c:  # rows follow one another without a gap: they can be cut anywhere
        for start in range(0, r * c, _piece(fmt)):
            yield as_float32(read(start, min(_piece(fmt), r * c - start)))[None], lambda codes, scales: (codes, scales)
        return
    at_once, (packed, high) = max(_piece(fmt) // length, 1), _sizes(c, fmt)
    for start in range(0, r, at_once):
        rows = min(at_once, r - start)
        x = as_float32(read(start * c, rows * c)).reshape(rows, c)
        yield _filled(x, rows, length), lambda codes, scales: (codes[:, :packed], scales[:, :high])


def _columns(read: Read, shape: tuple[int, int], fmt: Format, axis: int) -> Iterator[tuple[np.ndarray, Any]]:
    """The same for blocks down the columns: some rows of the matrix, turned."""
    del axis
    _, c = shape
    for start, rows, at_once in _bands(shape, fmt):
        x, ends = as_float32(read(start * c, rows * c)).reshape(rows, c), _sizes(rows, fmt)

        def finish(codes, scales, ends=ends):
            return codes[:, : ends[0]].T, scales[:, : ends[1]].T

        yield np.ascontiguousarray(_filled(x, at_once, c).T), finish


def _squares(read: Read, shape: tuple[int, int], fmt: Format, axis: int) -> Iterator[tuple[np.ndarray, Any]]:
    """For blocks of two dimensions, which are not cut: some rows of the matrix."""
    _, c = shape
    for start, rows, at_once in _bands(shape, fmt):
        x = as_float32(read(start * c, rows * c)).reshape(rows, c)
        ends = (rows, rows) if axis == -1 else _sizes(rows, fmt)

        def finish(codes, scales, ends=ends):
            return codes[: ends[0]], scales[: ends[1]]

        yield _filled(x, at_once, c), finish


def _bands(shape: tuple[int, int], fmt: Format) -> Iterator[tuple[int, int, int]]:
    """(first row, how many rows, how many with those that fill up the last block)."""
    r, c = shape
    whole = _whole(fmt)
    at_once = min(max(_piece(fmt) // (whole * c), 1), -(-r // whole)) * whole
    for start in range(0, r, at_once):
        yield start, min(at_once, r - start), at_once


def _coded_rows(codes: Read, scales: Read, shape: tuple[int, int], fmt: Format):
    """Slabs [rows, bytes] of codes and of scales, and what cuts the filling from their values."""
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
    """Pieces of one size of x laid flat; the last one is filled up with zeros."""
    flat = x.reshape(-1)
    pieces = [flat[start : start + size] for start in range(0, flat.size, size)]
    if pieces and pieces[-1].size < size:
        pieces[-1] = np.concatenate([pieces[-1], np.zeros(size - pieces[-1].size, x.dtype)])
    return pieces


def _joined(pieces: Iterable[Any]) -> np.ndarray:
    arrays = [np.asarray(piece) for piece in pieces]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _one_ahead(started: Iterator[Any]) -> Iterator[Any]:
    """The next one is read and handed to the device before the one before it is waited for."""
    before = next(started, None)
    for now in started:
        yield before
        before = now
    if before is not None:
        yield before


def _start(x, amax, how: Encoding, axis: int, measured: bool):
    """x, its codes and scales, and the values they decode to, if these are wanted."""
    codes, scales = _encode(x, amax, how=how, axis=axis)
    decoded = None
    if measured:  # in a program of its own: within one, XLA:CPU would encode again for each value that it decodes
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
    """Sums of the squares of x and of the error, reckoned in units of `unit`."""

    def energy(v):  # in float32 over runs that are short enough, then in float64
        v = v.reshape(-1) * np.float32(1 / unit)
        runs = np.concatenate([v, np.zeros(-v.size % 256, v.dtype)]).reshape(-1, 256) if v.size % 256 else v
        return float(np.einsum("ij,ij->i", *[runs.reshape(-1, 256)] * 2).sum(dtype=np.float64)) * unit**2

    with np.errstate(invalid="ignore"):  # of infinities
        return energy(x), energy(np.asarray(decoded) - x)


def unit_of(amax: float) -> float:
    """A power of two near amax, in whose units squares neither overflow nor vanish."""
    if not 0 < amax < math.inf:
        return 1.0
    return 2.0 ** min(max(math.frexp(amax)[1], -100), 100)
