"""Checkpoints in other tools' layouts into packed ones, matrix by matrix.

    headers -> recognize -> Transfer (its report says what will be) -> matrix by matrix -> file or folder
"""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ifjax.arrays import packed_shapes
from ifjax.convert.folders import without_quantization
from ifjax.convert.tensors import Tick
from ifjax.convert.transfer import Fill, Transfer
from ifjax.exchange import read
from ifjax.exchange.containers import Source, open_checkpoint
from ifjax.exchange.layouts import Spec
from ifjax.exchange.opened import batch_of, packed_of
from ifjax.exchange.recast import can_recast
from ifjax.exchange.recast import recast as recast_tensor
from ifjax.exchange.recognize import Found
from ifjax.files import safetensors
from ifjax.files.checkpoint import Item, Packed, packed_slots
from ifjax.files.names import renamed
from ifjax.files.safetensors import Slot
from ifjax.formats import Format, get_format
from ifjax.models.report import Entry, Report

# Values that are decoded at a time.
_VALUES = 2**20


def plan_import(
    source: str | os.PathLike,
    tool: str | Mapping[str, Any] | None = None,
    *,
    recast: str | Format | None = None,
    rename: Iterable[tuple[str, str]] = (),
    **settings: Any,
) -> Transfer:
    """Return how a checkpoint in another tool's layout becomes a packed one; reads headers and first rows.

    Args:
        source: a safetensors file, its index, a GGUF file, or a folder with one checkpoint.
        tool: as for `ifjax.exchange.import_tensors`; what the files declare, or their names tell, unless given.
        recast: a format that tensors are recast to, where that is possible code for code: nvfp4 for MXFP4.
        rename: pairs of a regular expression of whole names, as `import_tensors` has them, and a new name, with "\\1"
            for the first group: the first that matches decides.
        **settings: of `import_tensors`: fmt, nibbles, axis, dtype, headroom, decode.

    Raises:
        ValueError: as `import_tensors`.
        OSError: it cannot be read.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import convert, exchange
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exchange.save({"up.weight": ifjax.quantize(jnp.ones((8, 64)), "mxfp4")}, f"{folder}/theirs", "modelopt")
        ...     path = convert.plan_import(f"{folder}/theirs").write(f"{folder}/ours.safetensors")
        ...     ifjax.load_file(path)
        {'up.weight': QTensor(mxfp4, 8x64 float32, axis=-1, 4.250 bits a value)}
    """
    opened = open_checkpoint(source)
    layouts, how = read.choose(opened.specs, opened.declared if tool is None else tool, **settings)
    tensors = read.survey(opened.specs, layouts)
    target = None if recast is None else get_format(recast)
    kept = [n for found in tensors.found if found.layout.floats and not how.decode for n in found.arrays if n]
    packed = [found.name for found in tensors.found if not found.layout.floats or how.decode]
    new_names = renamed((*packed, *kept, *tensors.rest), rename)
    entries, makers = [], []
    for found in tensors.found:
        maker, own = _incoming(opened, found, how, target, new_names)
        entries += own
        makers.append(maker)
    entries += _kept_entries(opened, tensors.rest, "it is not quantized")
    makers += [functools.partial(_copied, opened, name, new_names[name]) for name in tensors.rest]
    return Transfer(
        Report(tuple(entries)), sum(opened.array(name).nbytes for name in opened.specs),
        lambda tick: [item for maker in makers for item in maker(tick)],
        "ifjax", {}, Path(source) if Path(source).is_dir() else None, without_quantization,
    )  # fmt: skip


def _incoming(
    opened: Source, found: Found, how: read.Reading, target: Format | None, new_names: Mapping[str, str]
) -> tuple[Fill, list[Entry]]:
    names = [name for name in found.arrays if name is not None]
    before = sum(opened.array(name).nbytes for name in names)
    batch = batch_of(opened, found)
    if found.layout.floats:
        if not how.decode:
            read.check_kept(found)
            reason = f"stays in {found.layout.name}: --decode makes floats of it"
            kept = [functools.partial(_copied, opened, name, new_names[name]) for name in names]
            return lambda tick: [i for copy in kept for i in copy(tick)], _kept_entries(opened, names, reason)
        with read.named(found):
            floats: Any = read.as_stored(found, opened.mapped, how)[0]
        shape = floats.shape if how.axis == -1 else (*floats.shape[:-2], *floats.shape[:-3:-1])
        after = math.prod(shape) * how.dtype.itemsize
        entry = Entry(found.name, None, shape, found.layout.algorithm, None, None, 8.0 * how.dtype.itemsize, before,
                      after, reason=f"decoded from {found.layout.name} to {how.dtype.name}")  # fmt: skip
        return functools.partial(_decoded, opened, found, how, batch, shape, new_names[found.name]), [entry]
    packed = packed_of(opened, found, how)
    fmt, shape = packed.fmt, packed.shape
    changed = target is not None and target != fmt and can_recast(fmt, target)
    new = target if changed and target is not None else fmt
    packed = packed._replace(blocking=dataclasses.replace(packed.blocking, fmt=new))
    several = any(opened.array(name).size == math.prod(batch) for name in names[1:]) or changed
    slots = packed_slots(new_names[found.name], new, *packed_shapes(shape, new, how.axis), batch if several else ())
    fill = _recast if changed else _packed
    after = sum(slot.nbytes for slot in slots)
    note = f"from {found.layout.name}" + (f", recast from {fmt.name} code for code" if changed else "")
    entry = Entry(found.name, None, shape, how.dtype.name, new.name, None, 8 * after / math.prod(shape), before, after,
                  note=note)  # fmt: skip

    def maker(tick: Tick) -> list[Item]:
        how_to_fill = functools.partial(fill, opened, found, how, batch, packed, slots, tick)
        return [Item(new_names[found.name], slots, packed, how_to_fill)]

    return maker, [entry]


def _packed(opened: Source, found: Found, how, batch, packed: Packed, slots, tick: Tick, write_bytes) -> None:
    codes, scales, *amax = (slot.name for slot in slots)
    amaxes = []
    for i in range(math.prod(batch)):
        q: Any = read.read(found, lambda name, i=i: opened.part(name, batch, i), how)
        write_bytes(codes, q.codes)
        write_bytes(scales, q.scales)
        amaxes.append(q.amax)
        tick(found.name, q.codes.nbytes + q.scales.nbytes)
    if amax:
        write_bytes(amax[0], np.array(amaxes if slots[2].shape else amaxes[0], np.float32))


def _recast(opened: Source, found: Found, how, batch, packed: Packed, slots, tick: Tick, write_bytes) -> None:
    q: Any = read.read(found, opened.copied, how)
    try:
        new = recast_tensor(q, packed.fmt)
    except ValueError as error:
        raise ValueError(f"{found.name}: {error}") from error
    codes, scales, amax = (slot.name for slot in slots)
    write_bytes(codes, new.codes)
    write_bytes(scales, new.scales)
    write_bytes(amax, np.broadcast_to(np.asarray(new.amax), batch))
    tick(found.name, q.codes.nbytes + q.scales.nbytes)


def _decoded(opened: Source, found: Found, how, batch, shape, new_name: str, tick: Tick) -> list[Item]:
    def fill(write_bytes):
        for i in range(math.prod(batch)):
            floats: Any = read.read(found, lambda name, i=i: opened.part(name, batch, i), how)
            if how.axis == -2:
                write_bytes(new_name, read.whole(floats, how))
            else:
                rows, columns = math.prod(floats.shape[:-1]), floats.shape[-1]
                step = max(_VALUES // columns, 1)
                for first in range(0, rows, step):
                    values = floats.rows(first, min(first + step, rows))
                    write_bytes(new_name, values.astype(how.dtype))
            tick(found.name, math.prod(floats.shape))

    return [Item(new_name, (Slot(new_name, safetensors.CODES[how.dtype.name], shape),), None, fill)]


def _copied(opened: Source, name: str, new_name: str, tick: Tick) -> list[Item]:
    mapped = opened.array(name)
    slot = Slot(new_name, Spec.of(mapped).dtype, mapped.shape)

    def fill(write_bytes):
        for chunk in opened.chunks(name):
            write_bytes(new_name, chunk)
            tick(name, len(chunk))

    return [Item(new_name, (slot,), None, fill)]


def held(opened: Source) -> Report:
    """Return what a checkpoint holds, array by array."""
    return Report(tuple(_kept_entries(opened, list(opened.specs), "it is not packed")))


def _kept_entries(opened: Source, names: Sequence[str], reason: str) -> list[Entry]:
    entries = []
    for name in names:
        array = opened.array(name)
        bits = 8.0 * array.itemsize if array.size else math.nan
        entries.append(Entry(name, None, array.shape, array.dtype.name, None, None, bits, array.nbytes, array.nbytes,
                             reason=reason))  # fmt: skip
    return entries
