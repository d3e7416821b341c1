"""Packed checkpoints out in other tools' layouts, matrix by matrix."""

import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ifjax.arrays import QTensor, packed_shapes
from ifjax.convert.folders import without_quantization
from ifjax.convert.tensors import Tick, float_item, plain_entry, plain_item
from ifjax.convert.transfer import Transfer
from ifjax.exchange import blocks, write
from ifjax.exchange.fused import fused_amax, warn_of_fused, with_amax
from ifjax.exchange.layouts import Layout, Size, Spec
from ifjax.exchange.recast import can_recast
from ifjax.exchange.recast import recast as recast_tensor
from ifjax.files import safetensors
from ifjax.files.checkpoint import Checkpoint, Item, open_file
from ifjax.files.names import renamed
from ifjax.files.safetensors import FileError, Foreign, Slot
from ifjax.formats import Format, get_format
from ifjax.models.report import Entry, Report


def plan_export(
    source: str | os.PathLike | Checkpoint,
    tool: str,
    *,
    recast: str | Format | None = None,
    refused: Literal["error", "floats"] = "error",
    common_amax: bool = False,
    rename: Iterable[tuple[str, str]] = (),
) -> Transfer:
    """Return how a packed checkpoint goes out in another tool's layout; reads headers only.

    Args:
        source: a path, as for `ifjax.load_file`, or what `ifjax.open_file` gave.
        tool: as for `ifjax.exchange.export_tensors`.
        recast: a format that tensors are recast to, where that is possible code for code: nvfp4 for MXFP4.
        refused: what happens to tensors that the tool has no layout for: an "error" that names them all, or they go out
            decoded, as "floats".
        common_amax: whether what has several amax and gets one factor is quantized again with the largest, as by
            `ifjax.exchange.common_amax`: layers that servers multiply as one, else a warning tells of them; and stacks
            in layouts that have one factor for all of it, or none for a tensor, else they are refused.

        rename: pairs of a regular expression of whole names, joined with dots, and the name that the reader has, with
            "\\1" for the first group: the first that matches decides.

    Raises:
        FileError: (a ValueError) the source is broken, or holds nothing packed.
        ValueError: tensors that no reader of the layout would decode.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import ifjax
        >>> from ifjax import convert, exchange
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     q = ifjax.quantize(jnp.ones((8, 64)), "nvfp4")
        ...     path = ifjax.save_file({"up.weight": q}, f"{folder}/ours.safetensors")
        ...     path = convert.plan_export(path, "compressed-tensors").write(f"{folder}/theirs")
        ...     exchange.load(path)
        {'up.weight': QTensor(nvfp4, 8x64 float32, axis=-1, 4.562 bits a value)}
    """
    opened = source if isinstance(source, Checkpoint) else open_file(source)
    beside = None if isinstance(source, Checkpoint) or not Path(source).is_dir() else Path(source)
    if not opened.packed:
        raise FileError(f"{opened.path} holds nothing packed: `ifjax quantize` packs it first")
    target = None if recast is None else get_format(recast)
    entries, makers, quantized, faults, amaxes = [], [], [], [], {}
    plain: dict[str, Spec] = {}
    new_names = renamed((name.replace("/", ".") for name in opened), rename)
    for name in opened:
        new_name = new_names[name.replace("/", ".")]
        if name not in opened.packed:
            stored = opened.entries[name]
            plain[new_name] = Spec(stored.dtype, stored.shape)
            entries.append(plain_entry(stored))
            makers.append(functools.partial(plain_item, opened, stored, None, None, new_name=new_name))
            continue
        try:
            outgoing = _Outgoing.of(opened, name, new_name, tool, target)
            if not common_amax:
                blocks.check_factor(outgoing.amaxes, outgoing.fmt, outgoing.headroom, outgoing.layout)
        except ValueError as error:
            faults.append(f"{name}: {error}")
            plain[new_name] = Spec("F32", opened.packed[name].shape)
            entries.append(_refused_entry(opened, name, str(error)))
            dtype = opened.packed[name].blocking.dtype
            makers.append(functools.partial(float_item, opened, name, dtype, new_name=new_name))
            continue
        quantized.append((outgoing.layout, outgoing.layer, outgoing.specs))
        entries.append(outgoing.entry(opened))
        makers.append(outgoing)
        amaxes[new_name] = outgoing.amaxes
    if faults and (refused == "error" or not quantized):
        more = f"\n  and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ValueError(
            f"{tool} has no layout for {len(faults)} of {len(opened.packed)} packed tensors; refused='floats' "
            "(`ifjax export --refused floats`) lets them out decoded, if others remain:\n  " + "\n  ".join(faults[:10])
            + more
        )
    layout = quantized[0][0]
    inputs = {lay.input_factor.part.of(layer) for lay, layer, _ in quantized if lay.input_factor is not None}
    config = write.configuration(quantized, plain, tool, bool(inputs) and inputs <= plain.keys())
    if common_amax and target is not None:
        raise ValueError("recast= keeps codes, and common_amax= makes new ones: do one after the other")
    formats = {new_names[name.replace("/", ".")]: (p.fmt, p.blocking.headroom) for name, p in opened.packed.items()}
    several = {} if any(lay.factor == "none" for lay, _, _ in quantized) else amaxes
    largest = fused_amax(several, formats) if common_amax else {}
    if target is None and not common_amax:
        warn_of_fused(several)
    for i, maker in enumerate(makers):
        if isinstance(maker, _Outgoing):
            own = maker.with_amax(largest.get(new_names[maker.name.replace("/", ".")]), common_amax)
            makers[i] = own.item
            entries[i] = own.entry(opened)
    return Transfer(
        Report(tuple(entries)), sum(entry.nbytes for entry in opened.entries.values()),
        lambda tick: [maker(tick) for maker in makers],
        layout.container, dict(layout.metadata) | _stated(opened), beside,
        lambda old: write.config_of(without_quantization(old), layout, config),
    )  # fmt: skip


def _stated(opened: Checkpoint) -> dict[str, str]:
    return {key: value for key, value in opened.metadata.items() if key not in ("format", "quantization_config")}


@dataclasses.dataclass(frozen=True)
class _Outgoing:
    """A packed tensor on its way into a layout."""

    opened: Checkpoint
    name: str
    layout: Layout
    layer: str
    size: Size
    target: Format | None  # that it is recast to
    amax: float | None = None  # that it is quantized again with

    @classmethod
    def of(cls, opened: Checkpoint, name: str, new_name: str, tool: str, target: Format | None) -> "_Outgoing":
        """Raise ValueError if the tool has no layout for the tensor, by what the header says."""
        p = opened.packed[name]
        target = target if target is not None and target != p.fmt and can_recast(p.fmt, target) else None
        fmt = p.fmt if target is None else target
        layout = write.layout_for(fmt, tool, len(p.shape))
        blocks.check_shape(p.shape, p.blocking.axis, fmt, layout)
        axis = p.blocking.axis
        rows, columns = p.shape[-3 - axis], p.shape[axis]
        size = Size(p.shape[:-2], rows, columns, columns // fmt.block)
        return cls(opened, name, layout, write.layer_in(layout, new_name), size, target)

    @property
    def fmt(self) -> Format:
        return self.opened.packed[self.name].fmt if self.target is None else self.target

    @property
    def headroom(self) -> float:
        return self.opened.packed[self.name].blocking.headroom

    @property
    def amaxes(self) -> np.ndarray | None:
        """Those of the stored tensor; what is recast gets another."""
        parts = self.opened.parts(self.name)
        return self.opened.array(parts["amax"]) if "amax" in parts and self.target is None else None

    def with_amax(self, amax: float | None, common: bool) -> "_Outgoing":
        """The same, quantized again with this amax, or, if it may be, with the one that the layout needs."""
        needed = blocks.needed_amax(self.amaxes, self.fmt, self.headroom, self.layout) if common else None
        return dataclasses.replace(self, amax=needed if amax is None else amax)

    @property
    def slots(self) -> tuple[Slot | Foreign, ...]:
        slots = []
        for part in self.layout.parts:
            assert part.shape is not None
            name, dtype, shape = part.of(self.layer), part.dtypes[0], part.shape(self.size)
            known = dtype in safetensors.NAMES
            slots.append(Slot(name, dtype, shape) if known else Foreign(name, dtype, shape, math.prod(shape)))
        return tuple(slots)

    @property
    def specs(self) -> tuple[Spec, ...]:
        return tuple(Spec(slot.dtype, slot.shape) for slot in self.slots)

    def entry(self, opened: Checkpoint) -> Entry:
        p = opened.packed[self.name]
        before = sum(opened.entries[stored].nbytes for stored in opened.parts(self.name).values())
        after = sum(slot.nbytes for slot in self.slots)
        note = f"as {self.layout.name}" + (f", recast from {p.fmt.name}" if self.target is not None else "")
        note += f", quantized again with the common amax {self.amax:g}" if self.amax is not None else ""
        bits = 8 * after / math.prod(p.shape)
        dtype, fmt = p.blocking.dtype.name, self.fmt.name
        return Entry(self.name, None, p.shape, dtype, fmt, None, bits, before, after, note=note)

    def item(self, tick: Tick) -> Item:
        return Item(self.name, self.slots, None, functools.partial(self._fill, tick))

    def _fill(self, tick: Tick, write_bytes) -> None:
        batch = self.size.batch if self.target is None else ()
        single = [part.shape(self.size._replace(batch=())) if part.shape else () for part in self.layout.parts]
        shared: set[str] = set()
        for q in self._matrices():
            try:
                arrays = write.written(q, self.layout)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
            for part, slot, shape in zip(self.layout.parts, self.slots, single, strict=True):
                array = arrays[part]
                if not batch or math.prod(slot.shape) > math.prod(shape):
                    write_bytes(slot.name, array)
                elif slot.name not in shared:  # all matrices have it, as was checked
                    shared.add(slot.name)
                    write_bytes(slot.name, array)
            tick(self.name, q.codes.nbytes + q.scales.nbytes)

    def _matrices(self) -> Iterator[QTensor]:
        opened, p = self.opened, self.opened.packed[self.name]
        parts = opened.parts(self.name)
        for stored in parts.values():
            opened.check(stored)
        if self.target is not None:
            try:
                yield recast_tensor(_own(opened[self.name]), self.target)
            except ValueError as error:
                raise ValueError(f"{self.name}: {error}") from error
            return
        amax = opened.array(parts["amax"]) if "amax" in parts else None
        if amax is not None and amax.size > 1:
            lead = len(self.size.batch)
            if any(n > 1 for n in amax.shape[lead:]):
                raise ValueError(f"{self.name} has amax of shape {amax.shape}, and layouts have one for a matrix: "
                                 "quantize without amax_axes along its last two axes")  # fmt: skip
            amax = np.broadcast_to(amax.reshape(amax.shape[:lead] + (1,) * (lead - amax.ndim)), self.size.batch)
            amax = np.where(amax == 0, amax.max(), amax) if self.layout.factor == "stack" else amax
        shapes = packed_shapes(p.shape[-2:], p.fmt, p.blocking.axis)
        sizes = [math.prod(shape) for shape in shapes]
        with opened.reader(parts["codes"]) as codes, opened.reader(parts["scales"]) as scales:
            for i in range(math.prod(self.size.batch)):
                c, s = (r.bytes(i * n, n).reshape(shape)
                        for r, n, shape in zip((codes, scales), sizes, shapes, strict=True))  # fmt: skip
                a = None if amax is None else np.float32(amax.reshape(-1)[i if amax.size > 1 else 0])
                q = QTensor(c, s, a, dataclasses.replace(p.blocking, names=None))  # pyright: ignore
                yield q if self.amax is None or a == np.float32(self.amax) else with_amax(q, self.amax)


def _own(q: Any) -> QTensor:
    return q.replaced(**{name: None if (a := getattr(q, name)) is None else np.array(a) for name in
                         ("codes", "scales", "amax")})  # fmt: skip


def _refused_entry(opened: Checkpoint, name: str, reason: str) -> Entry:
    p = opened.packed[name]
    before = sum(opened.entries[stored].nbytes for stored in opened.parts(name).values())
    after = math.prod(p.shape) * p.blocking.dtype.itemsize
    return Entry(name, None, p.shape, p.blocking.dtype.name, None, None, 8.0 * p.blocking.dtype.itemsize, before, after,
                 reason=f"refused, decoded: {reason}", expected=False)  # fmt: skip
