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
from jax import lax

from ifjax.arrays.qtensor import QTensor
from ifjax.arrays.quantize import Search, quantize
from ifjax.codec import Loss
from ifjax.formats import Format
from ifjax.measure.errors import _unit
from ifjax.numerics.packing import packed_length

# Values that the device sees at a time: a piece and what is made of it stay in a CPU's cache.
PIECE = 2**18

# (start, count) -> these elements of a flat array, in its own dtype.
Read = Callable[[int, int], np.ndarray]


class Encoding(NamedTuple):
    """How matrices [r, c] are encoded: arguments of `ifjax.quantize`, with an axis of -1 or -2.

    Attributes:
        measured: whether the sums of `Encoded` are wanted.
    """

    fmt: Format
    axis: int
    loss: Loss | None = None
    search: Search | None = None
    block_2d: bool = False
    measured: bool = False


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


def encode(read: Read, shape: tuple[int, int], amax: np.float32, how: Encoding) -> Iterator[Encoded]:
    """The bytes of the matrix's QTensor, some whole rows or runs of blocks at a time.

    In formats without an amax it is only what sums are reckoned in units of.
    """
    slabs = _squares if how.block_2d else _rows if how.axis == -1 else _columns
    unit = _unit(float(amax))
    scale = None if how.fmt.scale.largest is None else amax

    def start(slab):
        x, finish = slab
        pieces = [x] if how.block_2d else _cut(x, _piece(how.fmt))
        return x.shape, finish, [_start(piece, scale, how) for piece in pieces]

    for (rows, length), finish, pieces in _one_ahead(map(start, slabs(read, shape, how))):
        xs, codes, scales, decoded = zip(*pieces, strict=True)
        codes, scales = _joined(codes), _joined(scales)
        if not how.block_2d:
            codes = codes[: rows * packed_length(length, how.fmt.bits)].reshape(rows, -1)
            scales = scales[: rows * (length // how.fmt.block)].reshape(rows, -1)
        codes, scales = finish(codes, scales)
        sums = [_energies(x, d, unit) for x, d in zip(xs, decoded, strict=True)] if how.measured else [(0.0, 0.0)]
        signal, noise = map(sum, zip(*sums, strict=True))
        yield Encoded(np.ascontiguousarray(codes), np.ascontiguousarray(scales), signal, noise)


def decode(codes: Read, scales: Read, shape: tuple[int, int], q: QTensor, dtype: np.dtype) -> Iterator[np.ndarray]:
    """Values of a matrix in order, some whole rows or runs of blocks at a time, from its codes and scale bytes.

    Of q the format, headroom, axis and amax, which is the matrix's own, are used: not its codes and scales.
    """
    slabs = _coded_rows if q.axis == -1 else _coded_columns
    packed, blocks = packed_length(_piece(q.fmt), q.fmt.bits), _piece(q.fmt) // q.fmt.block

    def start(slab):
        c, s, finish = slab
        pieces = zip(_cut(c, packed), _cut(s, blocks), strict=True)
        settings = {"fmt": q.fmt, "headroom": q.headroom, "length": _piece(q.fmt), "dtype": dtype}
        return s.shape, finish, [_decode(c, s, q.amax, **settings) for c, s in pieces]

    for (rows, blocks_in_row), finish, pieces in _one_ahead(map(start, slabs(codes, scales, shape, q))):
        length = blocks_in_row * q.fmt.block
        yield np.ascontiguousarray(finish(_joined(pieces)[: rows * length].reshape(rows, length)))


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


def _filled(x: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """x [r, c] with zeros below and to the right."""
    if x.shape == (rows, columns):
        return x
    filled = np.zeros((rows, columns), x.dtype)
    filled[: x.shape[0], : x.shape[1]] = x
    return filled


def _rows(read: Read, shape: tuple[int, int], how: Encoding) -> Iterator[tuple[np.ndarray, Any]]:
    """Slabs [rows, whole blocks] of float32, and what cuts from their codes and scales what was filled up."""
    (r, c), fmt = shape, how.fmt
    length = -(-c // _whole(fmt)) * _whole(fmt)
    if length == c:  # rows follow one another without a gap: they can be cut anywhere
        for start in range(0, r * c, _piece(fmt)):
            yield as_float32(read(start, min(_piece(fmt), r * c - start)))[None], lambda codes, scales: (codes, scales)
        return
    blocks, at_once = -(-c // fmt.block), max(_piece(fmt) // length, 1)
    packed = packed_length(blocks * fmt.block, fmt.bits)
    for start in range(0, r, at_once):
        rows = min(at_once, r - start)
        x = as_float32(read(start * c, rows * c)).reshape(rows, c)
        yield _filled(x, rows, length), lambda codes, scales: (codes[:, :packed], scales[:, :blocks])


def _columns(read: Read, shape: tuple[int, int], how: Encoding) -> Iterator[tuple[np.ndarray, Any]]:
    """The same for blocks down the columns: some rows of the matrix, turned."""
    (_, c), fmt = shape, how.fmt
    for start, rows, at_once in _bands(shape, fmt):
        x = as_float32(read(start * c, rows * c)).reshape(rows, c)
        blocks = -(-rows // fmt.block)
        packed = packed_length(blocks * fmt.block, fmt.bits)

        def finish(codes, scales, packed=packed, blocks=blocks):
            return codes[:, :packed].T, scales[:, :blocks].T

        yield np.ascontiguousarray(_filled(x, at_once, c).T), finish


def _squares(read: Read, shape: tuple[int, int], how: Encoding) -> Iterator[tuple[np.ndarray, Any]]:
    """For blocks of two dimensions, which are not cut: some rows of the matrix."""
    (_, c), fmt = shape, how.fmt
    for start, rows, at_once in _bands(shape, fmt):
        x = as_float32(read(start * c, rows * c)).reshape(rows, c)
        blocks = -(-rows // fmt.block)
        ends = (rows, rows) if how.axis == -1 else (packed_length(blocks * fmt.block, fmt.bits), blocks)

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


def _coded_rows(codes: Read, scales: Read, shape: tuple[int, int], q: QTensor):
    """Slabs [rows, bytes] of codes and [rows, blocks] of scales, and what cuts the filling from their values."""
    (r, c), fmt = shape, q.fmt
    blocks = -(-c // fmt.block)
    packed = packed_length(blocks * fmt.block, fmt.bits)
    if c % _whole(fmt) == 0:
        at_once = _piece(fmt) // fmt.block
        for start in range(0, r * blocks, at_once):
            count = min(at_once, r * blocks - start)
            width = fmt.block * fmt.bits
            c_ = codes(start * width // 8, count * width // 8)
            yield c_[None], scales(start, count)[None], lambda values: values
        return
    length = -(-c // _whole(fmt)) * _whole(fmt)
    at_once = max(_piece(fmt) // length, 1)
    for start in range(0, r, at_once):
        rows = min(at_once, r - start)
        c_ = codes(start * packed, rows * packed).reshape(rows, packed)
        s_ = scales(start * blocks, rows * blocks).reshape(rows, blocks)
        wide = packed_length(length, fmt.bits), length // fmt.block
        yield _filled(c_, rows, wide[0]), _filled(s_, rows, wide[1]), lambda values: values[:, :c]


def _coded_columns(codes: Read, scales: Read, shape: tuple[int, int], q: QTensor):
    (_, c), fmt = shape, q.fmt
    for start, rows, at_once in _bands(shape, fmt):
        blocks = -(-rows // fmt.block)
        packed = packed_length(blocks * fmt.block, fmt.bits)
        first = packed_length(start, fmt.bits), start // fmt.block
        c_ = codes(first[0] * c, packed * c).reshape(packed, c)
        s_ = scales(first[1] * c, blocks * c).reshape(blocks, c)
        c_, s_ = _filled(c_, packed_length(at_once, fmt.bits), c), _filled(s_, at_once // fmt.block, c)
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


def _start(x, amax, how: Encoding):
    """x, its codes and scale bytes, and the values they decode to, if these are wanted."""
    axis = how.axis if how.block_2d else -1
    settings = {**how._asdict(), "axis": axis}
    del settings["measured"]
    codes, scales = _encode(x, amax, **settings)
    decoded = None
    if how.measured:  # in a program of its own: within one, XLA:CPU would encode again for each value that it decodes
        static = {"fmt": how.fmt, "headroom": 1.0, "axis": axis, "length": x.shape[axis], "dtype": np.dtype(np.float32)}
        decoded = _decode(codes, scales, amax, **static)
    return x, codes, scales, decoded


@jax.jit(static_argnames=("fmt", "axis", "loss", "search", "block_2d"))
def _encode(x, amax, **settings):
    q = quantize(x, amax=amax, **settings)
    return q.codes, q.scale_bytes()


@jax.jit(static_argnames=("fmt", "headroom", "axis", "length", "dtype"))
def _decode(codes, scale_bytes, amax, *, fmt, headroom, length, dtype, axis=-1):
    scales = lax.bitcast_convert_type(scale_bytes, fmt.scale.dtype)
    return QTensor(codes, scales, amax, fmt, headroom, axis, length, np.dtype(np.float32), False).dequantize(dtype)


def _energies(x: np.ndarray, decoded: Any, unit: float) -> tuple[float, float]:
    """Sums of the squares of x and of the error, reckoned in units of `unit`."""

    def energy(v):  # in float32 over runs that are short enough, then in float64
        v = v.reshape(-1) * np.float32(1 / unit)
        runs = np.concatenate([v, np.zeros(-v.size % 256, v.dtype)]).reshape(-1, 256) if v.size % 256 else v
        return float(np.einsum("ij,ij->i", *[runs.reshape(-1, 256)] * 2).sum(dtype=np.float64)) * unit**2

    with np.errstate(invalid="ignore"):  # of infinities
        return energy(x), energy(np.asarray(decoded) - x)
