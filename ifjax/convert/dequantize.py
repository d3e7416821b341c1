"""Packed checkpoints into floats, and what a checkpoint holds."""

import math
import os
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from ifjax.convert.folders import is_file, output, without_quantization
from ifjax.convert.tensors import Tick, float_item, no_tick, plain_entry, plain_item
from ifjax.files.checkpoint import SHARD_BYTES, Checkpoint, open_file, write_items
from ifjax.files.safetensors import FileError
from ifjax.models.report import Entry, Report


def dequantize_file(
    source: str | os.PathLike | Checkpoint,
    target: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int | None = None,
    tick: Tick | None = None,
) -> Path:
    """Write a copy of a packed checkpoint in floats, piece by piece; gives its path.

    A target that does not end as files of weights do is a folder, new or empty, and gets all that the source's folder
    has besides weights.

    Args:
        dtype: of what was packed; the original dtypes unless given.

    Raises:
        FileError: the source is broken or holds nothing packed.
        OSError: it cannot be read or written. What was there is as it was.
    """
    beside = None if isinstance(source, Checkpoint) or not Path(source).is_dir() else Path(source)
    source = source if isinstance(source, Checkpoint) else open_file(source)
    if not source.packed:
        raise FileError(f"{source.path} holds nothing packed: there is nothing to dequantize")
    items, tick = [], tick or no_tick
    for name in source:
        if name not in source.packed:
            items.append(plain_item(source, source.entries[name], None, None, tick))
            continue
        to = source.packed[name].blocking.dtype if dtype is None else jnp.dtype(dtype)
        items.append(float_item(source, name, to, tick))
    target = Path(target)
    if max_shard_bytes is None and not is_file(target):
        max_shard_bytes = SHARD_BYTES
    with output(target, ".safetensors", beside, without_quantization) as weights:
        path = write_items(weights, items, metadata=source.metadata, max_shard_bytes=max_shard_bytes)
    return path if is_file(target) else target


def contents(source: Checkpoint) -> Report:
    """What a checkpoint holds, as a report, from its headers; sizes before are those in its tensors' dtypes."""
    return Report(tuple(_held(source, name) for name in source))


def _held(source: Checkpoint, name: str) -> Entry:
    if name not in source.packed:
        return plain_entry(source.entries[name])
    nbytes = sum(source.entries[part].nbytes for part in source.parts(name).values())
    p = source.packed[name]
    values = math.prod(p.shape)
    bits, before = 8 * nbytes / values if values else math.nan, values * p.blocking.dtype.itemsize
    return Entry(name, None, p.shape, p.blocking.dtype.name, p.fmt.name, None, bits, before, nbytes)
