"""Tensors of a checkpoint as they go from file to file: copied, cast or decoded, in pieces."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ifjax.arrays import DTYPES, Blocking, packed_shapes
from ifjax.files import safetensors
from ifjax.files.checkpoint import Checkpoint, Item
from ifjax.files.pieces import decode
from ifjax.files.safetensors import Foreign, Slot, StoredTensor
from ifjax.models.report import Entry

# Called with a tensor's name and with bytes of it that have been dealt with.
Tick = Callable[[str, int], None]


def no_tick(name: str, count: int) -> None:
    del name, count


def plain_item(
    source: Checkpoint, stored: StoredTensor, dtype: np.dtype | None, results, tick: Tick, new_name: str | None = None
) -> Item:
    """Return a tensor that stays: its bytes, or its values in another dtype; under another name, if one is given."""
    name, new = stored.name, stored.name if new_name is None else new_name
    own = safetensors.numpy_dtype(stored.dtype)
    foreign = Foreign(new, stored.dtype, stored.shape, stored.nbytes)
    slot = foreign if own is None else Slot(new, stored.dtype, stored.shape)
    if dtype is not None:
        slot = Slot(new, safetensors.CODES[dtype.name], stored.shape)

    def fill(write):
        source.check(name)
        lost = 0
        with source.reader(name) as reader:
            for chunk in reader.chunks():
                if dtype is None or own is None:
                    write(new, chunk)
                else:
                    x = chunk.view(own)
                    with np.errstate(over="ignore"):
                        y = x.astype(dtype)
                    lost += int((np.isfinite(x) & ~np.isfinite(y)).sum())
                    write(new, y)
                tick(name, len(chunk))
        if lost and results is not None:
            results[name] = {"note": f"{lost} values are beyond {dtype}'s range", "expected": False}

    return Item(new, (slot,), None, fill)


def float_item(
    source: Checkpoint, name: str, dtype: np.dtype, tick: Tick, new_name: str | None = None
) -> Item:
    """Return a packed tensor that goes out in floats; under another name, if one is given."""
    new = name if new_name is None else new_name

    def fill(write):
        for values in values_of(source, name, dtype, tick):
            write(new, values)

    return Item(new, (Slot(new, safetensors.CODES[dtype.name], source.packed[name].shape),), None, fill)


def plain_entry(stored: StoredTensor) -> Entry:
    """Return what a report says of a tensor that is not packed."""
    values = math.prod(stored.shape)
    bits = 8 * stored.nbytes / values if values else math.nan
    dtype, sizes = safetensors.NAMES.get(stored.dtype, stored.dtype), (stored.nbytes, stored.nbytes)
    return Entry(stored.name, None, stored.shape, dtype, None, None, bits, *sizes, reason="it is not packed")


def cast_of(stored: StoredTensor, dtype: np.dtype | None) -> np.dtype | None:
    """What a tensor that is not packed is to be cast to; None to copy its bytes."""
    own = safetensors.numpy_dtype(stored.dtype)
    return None if dtype is None or own is None or own.name not in DTYPES or own == dtype else dtype


def values_of(source: Checkpoint, name: str, dtype: np.dtype, tick: Tick) -> Iterator[np.ndarray]:
    """The values of a packed tensor in order, some at a time; its bytes are checked before."""
    p, parts = source.packed[name], source.parts(name)
    for stored in parts.values():
        source.check(stored)
    if not math.prod(p.shape):
        yield np.zeros(p.shape, dtype)
        return
    amax = source.array(parts["amax"]) if "amax" in parts else None
    at = len(p.shape) + p.blocking.axis
    last = max((i + 1 for i, n in enumerate(() if amax is None else amax.shape) if n > 1), default=0)
    inner = math.prod(p.shape[at + 1 :])
    # float64 is decoded in float32, in which every value was computed.
    device = np.dtype(np.float32) if dtype == np.float64 else dtype
    if last > at:  # an amax for each of the axes after the blocked one: not by pieces
        q: Any = source[name]
        yield np.asarray(q.dequantize(device)).astype(dtype)
        return
    # Matrices with an amax each: rows [.., n] if nothing comes after the blocked axis, else [n, ..].
    lead = last if inner == 1 else at
    shape = (math.prod(p.shape[lead:at]), p.shape[at]) if inner == 1 else (p.shape[at], inner)
    axis, count = (-1 if inner == 1 else -2), math.prod(p.shape[:lead])
    if amax is not None:
        amax = amax.reshape(amax.shape[:lead] + (1,) * (lead - amax.ndim))
        amax = np.broadcast_to(amax, p.shape[:lead]).reshape(-1)
    with contextlib.ExitStack() as stack:
        codes, scales = (stack.enter_context(source.reader(parts[part])) for part in ("codes", "scales"))
        sizes = [math.prod(s) for s in packed_shapes(shape, p.fmt, axis)]
        for i in range(count):
            reads = [functools.partial(_shifted, r, i * size) for r, size in zip((codes, scales), sizes, strict=True)]
            own = None if amax is None else amax[i]
            blocking = Blocking(p.fmt, axis, shape[axis], p.blocking.dtype, p.blocking.headroom)
            for values in decode(reads[0], reads[1], shape, own, blocking, device):
                yield values.astype(dtype, copy=False)
                tick(name, values.size)


def _shifted(reader, first, start, count):
    return reader.values(first + start, count)
