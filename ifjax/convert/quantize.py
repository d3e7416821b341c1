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
from ifjax.convert.folders import is_file, output, without_quantization
from ifjax.convert.tensors import Tick, cast_of, no_tick, plain_item
from ifjax.exchange import read as exchange
from ifjax.exchange.containers import parts_of_quantized, specs_of
from ifjax.exchange.layouts import Floats, Spec, layouts_of
from ifjax.exchange.recognize import Found
from ifjax.files import safetensors
from ifjax.files.checkpoint import SHARD_BYTES, Checkpoint, Item, Packed, open_file, packed_slots, write_items
from ifjax.files.pieces import amax_of, chosen, encode
from ifjax.files.safetensors import FileError, StoredTensor
from ifjax.models.decisions import Decision, decide
from ifjax.models.names import site_of_tensor
from ifjax.models.ptq import Rules
from ifjax.models.report import Entry, Report, decibels
from ifjax.models.rule_checks import check_used
from ifjax.models.rules import Rule, as_rules
from ifjax.models.sites import Site


class Task(NamedTuple):
    """What is to become of one tensor of a file.

    Attributes:
        stored: the tensor in the file.
        decision: of the rules.
        found: of what it is decoded, where it is stored in other numbers; `stored` has what these make up.
        part: whether it belongs to a tensor that is quantized already, so that its bytes have to stay.
    """

    stored: StoredTensor
    decision: Decision
    found: Found | None = None
    part: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `plan` found: a task for each tensor. `report` says what will be, `write` does it.

    Attributes:
        source: the open checkpoint.
        tasks: in the file's order.
        dtype: of what stays in floats, and what packed tensors decode to; None for each tensor's own.
        measured: whether errors are measured.
        beside: the source's folder, whose other files go along into a folder.
    """

    source: Checkpoint
    tasks: tuple[Task, ...]
    dtype: np.dtype | None
    measured: bool = True
    beside: Path | None = None

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
        """Write the packed checkpoint, as `ifjax.save_file` does; return its path and the report.

        A target that does not end as files of weights do is a folder, new or empty, and gets all that the source's
        folder has besides weights.

        Raises:
            FileError: the source changed or is damaged.
            OSError: it cannot be read or written. What was there is as it was.
        """
        results: dict[str, dict[str, Any]] = {}
        items = [self._item(task, results, tick or no_tick) for task in self.tasks]
        metadata = self.source.metadata
        target = Path(target)
        if max_shard_bytes is None and not is_file(target):
            max_shard_bytes = SHARD_BYTES
        with output(target, ".safetensors", self.beside, without_quantization) as weights:
            path = write_items(weights, items, metadata=metadata, max_shard_bytes=max_shard_bytes)
        path = path if is_file(target) else target
        entries = [_entry(t, i, results.get(i.name, {})) for t, i in zip(self.tasks, items, strict=True)]
        return path, Report(tuple(entries))

    def _item(self, task, results=None, tick=lambda name, count: None) -> Item:
        stored = task.stored
        dtype = safetensors.numpy_dtype(stored.dtype) if self.dtype is None else self.dtype
        how, axis = task.decision.weights, task.decision.axis
        if how is None or axis is None:
            dtype = None if task.part else cast_of(stored, self.dtype)
            return plain_item(self.source, stored, dtype, results, tick)
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
    tool: str | None = None,
) -> Plan:
    """Return what the rules make of a safetensors checkpoint; reads headers only.

    A tensor's path is its name with '.' written as '/', and without "weight" or "kernel" at its end, as in
    "encoder/layer/0/attention/self/query". Biases, norms and other vectors stay as they are whatever the rules say.
    Rules apply as in `ifjax.quantize_params`; what they say of activations and training is for others to read.

    What is quantized already stays byte for byte with all its scales, whatever the rules say
    (`ifjax.exchange.companions`). `tool` has weights in FP8 decoded, weight times scale in float32, and packed.

    Args:
        source: a path, as for `ifjax.load_file`, or what `ifjax.open_file` gave.
        rules: as for `ifjax.quantize_params`; a format's name or None ("if4") leaves embeddings and heads as they are.
        axis: that of contraction, for rules without their own: -1 for [out, in], as PyTorch stores weights; -2 for
            [in, out].
        dtype: of what stays in floats, and what packed tensors decode to; each tensor's own unless given.
        measured: whether errors are measured, which takes time.
        tool: whose FP8 weights the source has, such as "fp8" for DeepSeek's blocks with `weight_scale_inv`. Packed
            tensors of them decode to bfloat16 unless `dtype` is given.

    Raises:
        FileError: the source is broken, packed already, or holds nothing; its configuration says that it is quantized,
            and nothing in it is known to be so.
        ValueError: rules that are of no use on it, or need more than a file; no such FP8 weights.
    """
    beside = None if isinstance(source, Checkpoint) or not Path(source).is_dir() else Path(source)
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
    parts, decoded = parts_of_quantized(source), {} if tool is None else _floats(specs_of(source), tool)
    sites, tasks = [], []
    for name in source:
        found = decoded.get(name)
        if found is not None and name != found.arrays[0]:
            continue
        stored = source.entries[name] if found is None else _stored(source, found)
        part = None if found is not None else parts.get(name)
        site = _site_of(stored, axis, part)
        decision = decide(rules, site)
        sites.append(site)
        if part is not None:
            tasks.append(Task(stored, decision._replace(reason=part), part=True))
        elif found is None:
            tasks.append(Task(stored, decision))
        elif decision.weights is not None:
            tasks.append(Task(stored, decision, found))
        else:
            tasks += [Task(source.entries[n], decision, part=True) for n in found.arrays if n is not None]
    check_used(rules, sites)
    return Plan(source, tuple(tasks), dtype, measured, beside)


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
    tool: str | None = None,
) -> Report:
    """Write a packed copy of a safetensors checkpoint, piece by piece: `plan`, then `Plan.write`.

    Example:
        >>> import tempfile
        >>> import jax
        >>> import ifjax
        >>> from ifjax.convert import quantize_file
        >>> weights = {"mlp.weight": jax.random.normal(jax.random.key(0), (64, 256)), "mlp.bias": jax.numpy.zeros(64)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = ifjax.save_file(weights, f"{folder}/model.safetensors")
        ...     report = quantize_file(path, f"{folder}/packed.safetensors", "if4")
        ...     ifjax.load_file(f"{folder}/packed.safetensors")["mlp.weight"]
        QTensor(if4, 64x256 float32, axis=-1, 4.502 bits a value)
        >>> report.check(min_sqnr_db=20).totals.quantized
        1
    """
    work = plan(source, rules, axis=axis, dtype=dtype, measured=measured, tool=tool)
    return work.write(target, max_shard_bytes=max_shard_bytes, tick=tick)[1]


def _check_rules(rules: Iterable[Rule], axis: int) -> None:
    for rule in rules:
        if rule.gptq:
            raise ValueError(f"Rule({rule.path!r}): gptq needs calibration, which a file has not: leave it out, or use "
                             "ifjax.quantize_params")  # fmt: skip
        if rule.smooth is not None or rule.rotate is not None:
            raise ValueError(f"Rule({rule.path!r}): smooth and rotate change what a program multiplies by, which a "
                             "file does not hold: leave them out, or use ifjax.quantize_params")  # fmt: skip
        if rule.weights is not None and rule.weights.search is not None and rule.weights.search.rounds:
            raise ValueError(f"Rule({rule.path!r}): search {rule.weights.search.name!r} fits a tensor's amax to all of "
                             "it, and files are quantized in pieces: use another one, such as 'least_squares', or "
                             "ifjax.quantize_params")  # fmt: skip
        if rule.weight_amax == "row":
            raise ValueError(f"Rule({rule.path!r}): files are quantized in pieces with one amax a matrix: leave "
                             "weight_amax out, or use ifjax.quantize_params")  # fmt: skip
        axis_of_rule = axis if rule.axis is None else rule.axis
        if axis_of_rule not in (-1, -2):
            raise ValueError(f"Rule({rule.path!r}): files are quantized along axis -1 or -2, got {axis_of_rule}")


def _floats(specs: Mapping[str, Spec], tool: str) -> dict[str, Found]:
    """Tensors that a tool stores in other numbers, by the names of all their arrays."""
    layouts = [lay for lay in layouts_of(tool) if lay.container == "safetensors"]
    found = [f for f in exchange.survey(specs, layouts).found if f.layout.floats] if layouts else []
    if not found:
        raise ValueError(f"no weights in FP8 with scales beside them, as {tool} stores them: leave out the tool")
    return {name: f for f in found for name in f.arrays if name is not None}


def _stored(source: Checkpoint, found: Found) -> StoredTensor:
    """What a tensor decodes to, as if it were in the file."""
    entries = [source.entries[name] for name in found.arrays if name is not None]
    return StoredTensor(found.name, "BF16", entries[0].shape, 0, sum(entry.nbytes for entry in entries))


def _site_of(stored: StoredTensor, axis: int, part: str | None = None) -> Site:
    dtype = safetensors.numpy_dtype(stored.dtype)
    is_float = dtype is not None and dtype.name in DTYPES
    reason = None if is_float else f"{stored.dtype} is not quantized: {', '.join(DTYPES)} are"
    site = site_of_tensor(stored.name, stored.shape, axis, reason)
    return site if part is None else site._replace(reason=part)


def _entry(task: Task, item: Item, result: Mapping[str, Any]) -> Entry:
    stored, decision = task.stored, task.decision
    values, after = math.prod(stored.shape), sum(slot.nbytes for slot in item.slots)
    dtype = safetensors.NAMES.get(stored.dtype, stored.dtype)
    bits = 8 * after / values if values else math.nan
    fmt = None if decision.weights is None else decision.weights.fmt.name
    rule = None if decision.rule is None else decision.rule.path
    if task.found is not None:
        result = {"note": f"decoded from {task.found.layout.name}"} | dict(result)
    return Entry(
        stored.name, None, stored.shape, dtype, fmt, None, bits, stored.nbytes, after, rule=rule,
        reason=decision.reason, **result,
    )  # fmt: skip


def _pack(source: Checkpoint, task: Task, measured: bool, slots, results, tick: Tick, write) -> None:
    stored, how, axis = task.stored, task.decision.weights, task.decision.axis
    assert how is not None and axis is not None
    fmt = how.fmt
    codes, scales, *amax = (slot.name for slot in slots)
    *lead, r, c = stored.shape
    size, itemsize = r * c, stored.nbytes // math.prod(stored.shape)
    peaks, counts = [], np.zeros(len(fmt.decodings), np.int64)
    signal, noise, nonzero, flushed = 0.0, 0.0, 0, 0
    with _values(source, task) as values:
        for i in range(math.prod(lead)):

            def read(start, count, first=i * size):
                return values(first + start, count)

            peaks.append(amax_of(read, size) if amax or measured else np.float32(0))
            for piece in encode(read, (r, c), peaks[-1], how, axis, measured=measured):
                write(codes, piece.codes)
                write(scales, piece.scales)
                signal, noise = signal + piece.signal, noise + piece.noise
                nonzero, flushed = nonzero + piece.nonzero, flushed + piece.flushed
                found = chosen(piece.scales, fmt, axis)
                counts += found
                tick(stored.name, int(found.sum()) * fmt.block * itemsize)  # with those that fill up blocks
    if amax:
        write(amax[0], np.array(peaks, np.float32))
    results[stored.name] = {
        "sqnr_db": decibels(signal, noise) if measured else None,
        "choice_share": 1 - counts[0] / counts.sum() if fmt.has_selector else None,
        "flushed_share": flushed / max(nonzero, 1) if measured else None,
    }


@contextlib.contextmanager
def _values(source: Checkpoint, task: Task) -> Iterator[Callable[[int, int], np.ndarray]]:
    """What reads so many values of a tensor from a first one on."""
    if task.found is None:
        source.check(task.stored.name)
        with source.reader(task.stored.name) as reader:
            yield reader.values
        return
    how = exchange.Reading(None, None, -1, np.dtype(np.float32), 1.0, True)
    floats = exchange.read(task.found, source.array, how)
    assert isinstance(floats, Floats)
    columns = floats.shape[-1]

    def values(start: int, count: int) -> np.ndarray:
        first = start // columns
        rows = floats.rows(first, -(-(start + count) // columns))
        return rows.reshape(-1)[start - first * columns :][:count]

    yield values
