"""Checkpoints into packed ones and back, file to file: what does not fit in memory need not.

A tensor is read, encoded and written in pieces of some hundred thousand values, so memory does not grow with tensors.
Bytes are those of `ifjax.quantize` on whole tensors; of a stack of matrices each keeps its own amax, as in
`ifjax.quantize_params`.

    header -> rules -> plan -> (dry run: its report) -> tensor by tensor, piece by piece -> file and report
"""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ifjax.arrays import DTYPES, Blocking, packed_shapes
from ifjax.files import safetensors
from ifjax.files.checkpoint import Checkpoint, Item, Packed, open_file, packed_slots, write_items
from ifjax.files.pieces import amax_of, chosen, decode, encode
from ifjax.files.safetensors import FileError, Foreign, Slot, StoredTensor
from ifjax.models.decisions import Decision, decide
from ifjax.models.names import site_of_tensor
from ifjax.models.ptq import Rules
from ifjax.models.report import Entry, Report, decibels
from ifjax.models.rule_checks import check_used
from ifjax.models.rules import Rule, as_rules
from ifjax.models.sites import Site

# Called with a tensor's name and with bytes of it that have been dealt with.
Tick = Callable[[str, int], None]


class Task(NamedTuple):
    """A tensor of a file, and what the rules decide for it."""

    stored: StoredTensor
    decision: Decision


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found: a task for each tensor. `report` says what will be, `write` does it.

    Attributes:
        source: the open checkpoint.
        tasks: in the file's order.
        dtype: of what stays in floats, and what packed tensors decode to; None for each tensor's own.
        measured: whether errors are measured.
    """

    source: Checkpoint
    tasks: tuple[Task, ...]
    dtype: np.dtype | None
    measured: bool = True

    @property
    def nbytes(self) -> int:
        """That will be read."""
        return sum(task.stored.nbytes for task in self.tasks)

    @property
    def report(self) -> Report:
        """Sizes are those that the file will have; errors are not known yet."""
        return Report(tuple(_entry(task, self._item(task), {}) for task in self.tasks))

    def write(
        self, target: str | os.PathLike, *, max_shard_bytes: int | None = None, tick: Tick | None = None
    ) -> tuple[Path, Report]:
        """Write the packed checkpoint, as `ifjax.save_file` does; gives its path and the report.

        Raises:
            FileError: the source changed or is damaged.
            OSError: it cannot be read or written. What was there is as it was.
        """
        results: dict[str, dict[str, Any]] = {}
        items = [self._item(task, results, tick or no_tick) for task in self.tasks]
        metadata = self.source.metadata
        path = write_items(target, items, metadata=metadata, max_shard_bytes=max_shard_bytes)
        entries = [_entry(t, i, results.get(i.name, {})) for t, i in zip(self.tasks, items, strict=True)]
        return path, Report(tuple(entries))

    def _item(self, task, results=None, tick=lambda name, count: None) -> Item:
        stored = task.stored
        dtype = safetensors.numpy_dtype(stored.dtype) if self.dtype is None else self.dtype
        how, axis = task.decision.weights, task.decision.axis
        if how is None or axis is None:
            return _plain(self.source, stored, _cast(stored, self.dtype), results, tick)
        assert dtype is not None
        packed = Packed(Blocking(how.fmt, axis, stored.shape[axis], dtype, block_2d=how.block_2d), stored.shape)
        shapes = packed_shapes(stored.shape, how.fmt, axis)
        slots = packed_slots(stored.name, packed.fmt, *shapes, stored.shape[:-2])
        fill = functools.partial(_pack, self.source, task, self.measured, slots, results, tick)
        return Item(stored.name, slots, packed, fill)


def plan(
    source: str | os.PathLike | Checkpoint,
    rules: Rules = None,
    *,
    axis: int = -1,
    dtype: DTypeLike | None = None,
    measured: bool = True,
) -> Plan:
    """What the rules make of a safetensors checkpoint; reads headers only.

    A tensor's path is its name with '.' written as '/', and without "weight" or "kernel" at its end, as in
    "encoder/layer/0/attention/self/query". Biases, norms and other vectors stay as they are whatever the rules say.
    Rules apply as in `ifjax.quantize_params`; what they say of activations and training is for others to read.

    Args:
        source: a path, as for `ifjax.load_file`, or what `ifjax.open_file` gave.
        rules: as for `ifjax.quantize_params`; a format's name or None ("if4") leaves embeddings and heads as they are.
        axis: that of contraction, for rules without their own: -1 for [out, in], as PyTorch stores weights; -2 for
            [in, out].
        dtype: of what stays in floats, and what packed tensors decode to; each tensor's own unless given.
        measured: whether errors are measured, which takes time.

    Raises:
        FileError: the source is broken, packed already, or holds nothing.
        ValueError: rules that are of no use on it, or need more than a file.
    """
    source = source if isinstance(source, Checkpoint) else open_file(source)
    rules = as_rules(rules)
    if source.packed:
        raise FileError(f"{source.path} is packed already ({next(iter(source.packed))!r}): dequantize it first")
    if not len(source):
        raise FileError(f"{source.path} holds no tensors")
    _check_rules(rules, axis)
    if dtype is not None:
        dtype = jnp.dtype(dtype)
        if dtype.name not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype.name}")
    stored = [source.entries[name] for name in source]
    sites = [_site_of(tensor, axis) for tensor in stored]
    check_used(rules, sites)
    tasks = tuple(Task(tensor, decide(rules, site)) for tensor, site in zip(stored, sites, strict=True))
    return Plan(source, tasks, dtype, measured)


def quantize_file(
    source: str | os.PathLike,
    target: str | os.PathLike,
    rules: Rules = None,
    *,
    axis: int = -1,
    dtype: DTypeLike | None = None,
    measured: bool = True,
    max_shard_bytes: int | None = None,
    tick: Tick | None = None,
) -> Report:
    """Write a packed copy of a safetensors checkpoint, piece by piece: `plan`, then `Plan.write`.

    Example:
        >>> import tempfile
        >>> import jax
        >>> import ifjax
        >>> from ifjax.files.convert import quantize_file
        >>> weights = {"mlp.weight": jax.random.normal(jax.random.key(0), (64, 256)), "mlp.bias": jax.numpy.zeros(64)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = ifjax.save_file(weights, f"{folder}/model.safetensors")
        ...     report = quantize_file(path, f"{folder}/packed.safetensors", "if4")
        ...     ifjax.load_file(f"{folder}/packed.safetensors")["mlp.weight"]
        QTensor(if4, 64x256 float32, axis=-1, 4.502 bits a value)
        >>> report.check(min_sqnr_db=20).totals.quantized
        1
    """
    work = plan(source, rules, axis=axis, dtype=dtype, measured=measured)
    return work.write(target, max_shard_bytes=max_shard_bytes, tick=tick)[1]


def dequantize_file(
    source: str | os.PathLike | Checkpoint,
    target: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int | None = None,
    tick: Tick | None = None,
) -> Path:
    """Write a copy of a packed checkpoint in floats, piece by piece; gives its path.

    Args:
        dtype: of what was packed; the original dtypes unless given.

    Raises:
        FileError: the source is broken or holds nothing packed.
        OSError: it cannot be read or written. What was there is as it was.
    """
    source = source if isinstance(source, Checkpoint) else open_file(source)
    if not source.packed:
        raise FileError(f"{source.path} holds nothing packed: there is nothing to dequantize")
    items, tick = [], tick or no_tick
    for name in source:
        if name not in source.packed:
            items.append(_plain(source, source.entries[name], None, None, tick))
            continue
        p = source.packed[name]
        to = p.blocking.dtype if dtype is None else jnp.dtype(dtype)
        slot = Slot(name, safetensors.CODES[to.name], p.shape)
        items.append(Item(name, (slot,), None, functools.partial(_unpack, source, name, to, tick)))
    return write_items(target, items, metadata=source.metadata, max_shard_bytes=max_shard_bytes)


def contents(source: Checkpoint) -> Report:
    """What a checkpoint holds, as a report, from its headers; sizes before are those in its tensors' dtypes."""
    return Report(tuple(_held(source, name) for name in source))


def _check_rules(rules: Iterable[Rule], axis: int) -> None:
    for rule in rules:
        if rule.gptq:
            raise ValueError(f"Rule({rule.path!r}): gptq needs calibration, which a file has not: leave it out, or use "
                             "ifjax.quantize_params")  # fmt: skip
        axis_of_rule = axis if rule.axis is None else rule.axis
        if axis_of_rule not in (-1, -2):
            raise ValueError(f"Rule({rule.path!r}): files are quantized along axis -1 or -2, got {axis_of_rule}")


def _site_of(stored: StoredTensor, axis: int) -> Site:
    dtype = safetensors.numpy_dtype(stored.dtype)
    is_float = dtype is not None and dtype.name in DTYPES
    reason = None if is_float else f"{stored.dtype} is not quantized: {', '.join(DTYPES)} are"
    return site_of_tensor(stored.name, stored.shape, axis, reason)


def _cast(stored: StoredTensor, dtype: np.dtype | None) -> np.dtype | None:
    """What a tensor that is not packed is to be cast to; None to copy its bytes."""
    own = safetensors.numpy_dtype(stored.dtype)
    return None if dtype is None or own is None or own.name not in DTYPES or own == dtype else dtype


def _entry(task: Task, item: Item, result: Mapping[str, Any]) -> Entry:
    stored, decision = task.stored, task.decision
    values, after = math.prod(stored.shape), sum(slot.nbytes for slot in item.slots)
    dtype = safetensors.NAMES.get(stored.dtype, stored.dtype)
    bits = 8 * after / values if values else math.nan
    fmt = None if decision.weights is None else decision.weights.fmt.name
    rule = None if decision.rule is None else decision.rule.path
    return Entry(
        stored.name, None, stored.shape, dtype, fmt, None, bits, stored.nbytes, after, rule=rule,
        reason=decision.reason, **result,
    )  # fmt: skip


def _held(source: Checkpoint, name: str) -> Entry:
    nbytes = sum(source.entries[part].nbytes for part in source.parts(name).values())
    if name not in source.packed:
        stored = source.entries[name]
        values = math.prod(stored.shape)
        bits = 8 * nbytes / values if values else math.nan
        dtype = safetensors.NAMES.get(stored.dtype, stored.dtype)
        return Entry(name, None, stored.shape, dtype, None, None, bits, nbytes, nbytes, reason="it is not packed")
    p = source.packed[name]
    values = math.prod(p.shape)
    bits, before = 8 * nbytes / values if values else math.nan, values * p.blocking.dtype.itemsize
    return Entry(name, None, p.shape, p.blocking.dtype.name, p.fmt.name, None, bits, before, nbytes)


def no_tick(name: str, count: int) -> None:
    del name, count


def _plain(source: Checkpoint, stored: StoredTensor, dtype: np.dtype | None, results, tick: Tick) -> Item:
    """A tensor that stays: its bytes, or its values in another dtype."""
    name = stored.name
    own = safetensors.numpy_dtype(stored.dtype)
    foreign = Foreign(name, stored.dtype, stored.shape, stored.nbytes)
    slot = foreign if own is None else Slot(name, stored.dtype, stored.shape)
    if dtype is not None:
        slot = Slot(name, safetensors.CODES[dtype.name], stored.shape)

    def fill(write):
        source.check(name)
        lost = 0
        with source.reader(name) as reader:
            for chunk in reader.chunks():
                if dtype is None or own is None:
                    write(name, chunk)
                else:
                    x = chunk.view(own)
                    with np.errstate(over="ignore"):
                        y = x.astype(dtype)
                    lost += int((np.isfinite(x) & ~np.isfinite(y)).sum())
                    write(name, y)
                tick(name, len(chunk))
        if lost and results is not None:
            results[name] = {"note": f"{lost} values are beyond {dtype}'s range", "expected": False}

    return Item(name, (slot,), None, fill)


def _pack(source: Checkpoint, task: Task, measured: bool, slots, results, tick: Tick, write) -> None:
    stored, how, axis = task.stored, task.decision.weights, task.decision.axis
    assert how is not None and axis is not None
    fmt = how.fmt
    codes, scales, *amax = (slot.name for slot in slots)
    *lead, r, c = stored.shape
    size, itemsize = r * c, stored.nbytes // math.prod(stored.shape)
    peaks, signal, noise, counts = [], 0.0, 0.0, np.zeros(len(fmt.decodings), np.int64)
    source.check(stored.name)
    with source.reader(stored.name) as reader:
        for i in range(math.prod(lead)):

            def read(start, count, first=i * size):
                return reader.values(first + start, count)

            peaks.append(amax_of(read, size) if amax or measured else np.float32(0))
            for piece in encode(read, (r, c), peaks[-1], how, axis, measured=measured):
                write(codes, piece.codes)
                write(scales, piece.scales)
                signal, noise = signal + piece.signal, noise + piece.noise
                found = chosen(piece.scales, fmt, axis)
                counts += found
                tick(stored.name, int(found.sum()) * fmt.block * itemsize)  # with those that fill up blocks
    if amax:
        write(amax[0], np.array(peaks, np.float32))
    results[stored.name] = {
        "sqnr_db": decibels(signal, noise) if measured else None,
        "choice_share": 1 - counts[0] / counts.sum() if fmt.has_selector else None,
    }


def _unpack(source: Checkpoint, name: str, dtype: np.dtype, tick: Tick, write) -> None:
    for values in values_of(source, name, dtype, tick):
        write(name, values)


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
