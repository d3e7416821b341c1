"""Compare a packed checkpoint with its checksums and its original."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ifjax.arrays import DTYPES
from ifjax.convert.tensors import Tick, no_tick, values_of
from ifjax.files import safetensors
from ifjax.files.checkpoint import Checkpoint
from ifjax.files.pieces import PIECE, as_float32
from ifjax.files.safetensors import FileError
from ifjax.models.report import decibels


class Verified(NamedTuple):
    """One tensor that was verified.

    Attributes:
        name, fmt: the format's name; None for a tensor that is not packed.
        values: how many.
        signal, noise: sums of x^2 of the original and of the error's squares; NaN unless there is an original.
        fault: what is wrong; None if nothing is.
    """

    name: str
    fmt: str | None
    values: int
    signal: float
    noise: float
    fault: str | None

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(signal / noise); None without an original."""
        return None if math.isnan(self.signal) and self.fault is None else decibels(self.signal, self.noise)


def verify(
    source: Checkpoint, against: Checkpoint | None = None, *, min_sqnr_db: float | None = None, tick: Tick | None = None
) -> Iterator[Verified]:
    """Compare every tensor's checksums, and its values with those of the original.

    A tensor that is not packed must equal the original's, rounded to its dtype. Names and shapes must agree.

    Args:
        source: whose headers `ifjax.open_file` has checked.
        against: the checkpoint that it was made of.
        min_sqnr_db: a packed tensor with less of it is at fault.
    """
    tick = tick or no_tick
    for name in source:
        yield _verified(source, against, name, min_sqnr_db, tick)
    for name in against if against is not None else ():
        if name not in source:
            yield Verified(name, None, 0, math.nan, math.nan, "is in the original only")


def _verified(source: Checkpoint, against: Checkpoint | None, name: str, least: float | None, tick: Tick) -> Verified:
    fmt = source.packed[name].fmt.name if name in source.packed else None
    result = Verified(name, fmt, 0, math.nan, math.nan, None)
    try:
        for stored in source.parts(name).values():
            source.check(stored)
    except FileError as error:
        return result._replace(fault=str(error))
    if against is None:
        tick(name, sum(source.entries[part].nbytes for part in source.parts(name).values()))
        return result
    try:
        return _compared(source, against, name, least, tick, result)
    except FileError as error:
        return result._replace(fault=str(error))


def _compared(source, against, name, least, tick, result: Verified) -> Verified:
    if name not in against:
        return result._replace(fault="is not in the original")
    if name in against.packed:
        return result._replace(fault="is packed in the original, too: compare with what it was made of")
    stored, found = against.entries[name], source.packed.get(name) or source.entries[name]
    if tuple(stored.shape) != tuple(found.shape):
        return result._replace(fault=f"is {tuple(found.shape)}, and in the original {tuple(stored.shape)}")
    if safetensors.numpy_dtype(stored.dtype) is None or name not in source.packed:
        return _compared_plain(source, against, name, tick, result)
    if safetensors.NAMES[stored.dtype] not in DTYPES:
        return result._replace(fault=f"is packed, and in the original {stored.dtype}")
    signal = noise = 0.0
    start = 0
    against.check(name)
    with against.reader(name) as reader:
        for values in values_of(source, name, np.dtype(np.float32), tick):
            x = as_float32(reader.values(start, values.size)).astype(np.float64)
            start += values.size
            signal += float(np.dot(x, x))
            x -= values.reshape(-1)
            noise += float(np.dot(x, x))
    result = result._replace(values=start, signal=signal, noise=noise)
    sqnr = decibels(signal, noise)
    if math.isnan(sqnr) or (least is not None and sqnr < least):
        return result._replace(fault=f"has an SQNR of {sqnr:.4g} dB" + ("" if least is None else f", below {least:g}"))
    return result


def _compared_plain(source, against, name, tick, result: Verified) -> Verified:
    """A tensor that was left alone: it must be the same, rounded to its dtype."""
    ours, theirs = source.entries[name], against.entries[name]
    dtype = safetensors.numpy_dtype(ours.dtype)
    cast = ours.dtype != theirs.dtype
    if cast and not {safetensors.NAMES.get(ours.dtype), safetensors.NAMES.get(theirs.dtype)} <= set(DTYPES):
        return result._replace(fault=f"is {ours.dtype}, and in the original {theirs.dtype}")
    against.check(name)
    with source.reader(name) as a, against.reader(name) as b:
        size = math.prod(ours.shape) if cast else ours.nbytes
        for start in range(0, size, 4 * PIECE):
            count = min(4 * PIECE, size - start)
            if cast:
                with np.errstate(over="ignore"):
                    same = np.array_equal(a.values(start, count), b.values(start, count).astype(dtype), equal_nan=True)
            else:
                same = np.array_equal(a.bytes(start, count), b.bytes(start, count))
            if not same:
                return result._replace(fault="is not packed, and differs from the original")
            tick(name, count)
    return result._replace(values=math.prod(ours.shape))
