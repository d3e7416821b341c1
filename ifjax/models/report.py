"""The report of a quantized model: an entry for every parameter, shown as table, JSON or figure, with a check."""

import collections
import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from ifjax.atomic import write_text
from ifjax.models.shown import as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_WIDTH = 110  # columns of the printed report without a terminal
_MOST_LINES = 40  # with more parameters, similar ones share a line


@dataclasses.dataclass(frozen=True)
class Entry:
    """What happened to one parameter.

    Attributes:
        path: '/'-joined path of the parameter.
        module: class name of the module that it belongs to; None without a module.
        shape, dtype: shape and dtype of the parameter before quantization.
        fmt: name of the format; None if the parameter was not quantized.
        act_fmt: name of the format of the module's input activations; None if they are not quantized.
        bits_per_value: bits per value after quantization, with all arrays and padded last blocks; NaN if it is empty.
        bytes_before, bytes_after: bytes of all its arrays.
        sqnr_db: 10 log10(signal / noise). Infinite if nothing was lost, as in a tensor of zeros; NaN if values are not
            finite; None if it was not measured.
        choice_share: share of blocks that took another decoding than the first (in IF formats, the integers); None if
            `fmt` has no selector.
        rule: pattern of the rule that matched; None if none did.
        reason: why the parameter was not quantized; None if it was.
        expected: False if a rule could not be followed, or if no rule decided about a matrix. `Report.check` fails on
            such entries.
        note: remarks, such as "weights are dequantized for the module's own dot_general".
        flushed_share: share of the blocks with nonzero values that decode to zeros only, because their scale is below
            the range of the format's scales; None if it was not measured. `Rule.weight_amax` "row" is a remedy.

    Raises:
        ValueError: neither `fmt` nor `reason` is given, or both are.
    """

    path: str
    module: str | None
    shape: tuple[int, ...]
    dtype: str
    fmt: str | None
    act_fmt: str | None
    bits_per_value: float
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None = None
    choice_share: float | None = None
    rule: str | None = None
    reason: str | None = None
    expected: bool = True
    note: str | None = None
    flushed_share: float | None = None

    def __post_init__(self):
        if (self.fmt is None) == (self.reason is None):
            raise ValueError(
                f"{self.path!r} needs either the format that it took or the reason why it was left alone, got "
                f"fmt={self.fmt!r} and reason={self.reason!r}"
            )
        object.__setattr__(self, "shape", tuple(map(int, self.shape)))

    @property
    def values(self) -> int:
        """Number of values of the parameter."""
        return math.prod(self.shape)


class Totals(NamedTuple):
    """Sums over a report. Bits per value are NaN if there are no values.

    Attributes:
        parameters, quantized: number of parameters, and of quantized ones.
        values, quantized_values: number of values in them.
        bytes_before, bytes_after: bytes of all parameters.
        bits_per_value: mean over all parameters after quantization.
        quantized_bits_per_value: mean over the quantized ones.
    """

    parameters: int
    quantized: int
    values: int
    quantized_values: int
    bytes_before: int
    bytes_after: int
    bits_per_value: float
    quantized_bits_per_value: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of quantization: one entry per parameter, in the model's order. `print` shows it as a table.

    Example:
        >>> from ifjax.models.report import Entry, Report
        >>> report = Report((
        ...     Entry("mlp/kernel", "Dense", (64, 64), "float32", "if4", None, 4.508, 16384, 2308, 20.8, 0.61, ".*"),
        ...     Entry("mlp/bias", "Dense", (64,), "float32", None, None, 32.0, 256, 256, reason="a bias is added"),
        ... ))
        >>> report.check(min_sqnr_db=20).totals.bytes_after
        2564
        >>> report.check(min_sqnr_db=30)
        Traceback (most recent call last):
        ValueError: 1 of 2 parameters is not as it should be:
          mlp/kernel (Dense 64x64, if4): its SQNR of 20.8 dB is below 30 dB...
    """

    entries: tuple[Entry, ...]

    def __post_init__(self):
        object.__setattr__(self, "entries", tuple(self.entries))

    @property
    def quantized(self) -> tuple[Entry, ...]:
        """Entries of quantized parameters."""
        return tuple(entry for entry in self.entries if entry.fmt is not None)

    @property
    def others(self) -> tuple[Entry, ...]:
        """Entries of parameters that were not quantized."""
        return tuple(entry for entry in self.entries if entry.fmt is None)

    @property
    def totals(self) -> Totals:
        """Sums over all entries."""

        def total(entries, field):
            return sum(getattr(entry, field) for entry in entries)

        def bits(entries):
            values = total(entries, "values")
            return 8 * total(entries, "bytes_after") / values if values else math.nan

        return Totals(
            parameters=len(self.entries),
            quantized=len(self.quantized),
            values=total(self.entries, "values"),
            quantized_values=total(self.quantized, "values"),
            bytes_before=total(self.entries, "bytes_before"),
            bytes_after=total(self.entries, "bytes_after"),
            bits_per_value=bits(self.entries),
            quantized_bits_per_value=bits(self.quantized),
        )

    def check(self, min_sqnr_db: float | None = None) -> "Report":
        """Raise if an entry has a fault; otherwise return the report itself.

        Faults are: an entry that is not expected; an SQNR that is NaN or minus infinity (plus infinity means that
        nothing was lost); an SQNR below `min_sqnr_db`, or not measured although a minimum is given; no quantized
        parameter at all. A report without parameters has no fault.

        Raises:
            ValueError: a fault was found; the message has one line per faulty entry.
        """
        faults = [
            f"  {_described(entry)}: {fault}"
            for entry in self.entries
            if (fault := _fault(entry, min_sqnr_db)) is not None
        ]
        if faults:
            are = "is" if len(faults) == 1 else "are"
            raise ValueError(
                f"{len(faults)} of {len(self.entries)} parameters {are} not as it should be:\n"
                + "\n".join(faults)
                + "\n"
                "A rule for what is to stay as it is says so: Rule(path, weight_fmt=None)"
            )
        if self.entries and not self.quantized:
            reasons = "; ".join(f"{entry.path}: {entry.reason}" for entry in self.entries[:5])
            raise ValueError(
                f"none of {len(self.entries)} parameters is quantized ({reasons}{'; ...' * (len(self.entries) > 5)}). "
                "Write Rule('.*') as the last rule to take whatever no rule before it matches"
            )
        return self

    # --- files ---

    def to_json(self) -> str:
        """Return entries and totals as JSON text; `from_json` restores the report.

        NaN and the infinities are written as the strings "nan", "inf" and "-inf", because JSON has no such numbers.
        """
        entries = [{key: _to_plain(value) for key, value in vars(entry).items()} for entry in self.entries]
        totals = {key: _to_plain(value) for key, value in self.totals._asdict().items()}
        return json.dumps({"totals": totals, "entries": entries}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Return the report that `to_json` wrote. Totals are computed from the entries, not read.

        Files of earlier versions, which called choice_share int_share, are read, too.

        Raises:
            ValueError: the text is not such a report.
        """
        try:
            return cls(tuple(_entry_of(fields) for fields in json.loads(text)["entries"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"this is not a report as Report.to_json writes it: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON to a file of any name. The write is atomic.

        Raises:
            OSError: the file cannot be written.
        """
        write_text(path, self.to_json())

    # --- the table ---

    def __str__(self) -> str:
        return as_text(self, _WIDTH)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        del console
        yield Text(_summary(self))
        if self.quantized:
            yield _quantized_table(self.quantized, options.max_width)
            for number, note in enumerate(_notes(self.quantized), start=1):
                yield Text(f" [{number}] {note}")
        if self.others:
            yield Text("\nLeft as they are")
            yield _others_table(self.others, options.max_width)

    # --- the picture ---

    def plot(self, path: str | os.PathLike | None = None) -> "Figure":
        """Return a figure of the SQNR of quantized parameters, coloured by format, and of the bytes before and after.

        It is also written to `path` if one is given. If there are more than 40 parameters, those whose paths differ
        only in numbers share a bar. The bar shows their mean, the line through its end their range.

        Raises:
            ValueError: nothing is quantized.
        """
        if not self.quantized:
            raise ValueError("nothing is quantized: there is no SQNR to plot")
        figure = _draw(self)
        if path is not None:
            figure.savefig(path)
        return figure


def _described(entry: Entry) -> str:
    module = f"{entry.module} " if entry.module else ""
    return f"{entry.path} ({module}{_shape(entry.shape)}, {entry.fmt or 'not quantized'})"


def _fault(entry: Entry, least: float | None) -> str | None:
    sqnr = entry.sqnr_db
    if not entry.expected:
        return entry.reason or entry.note or "it is not as a rule asked for"
    if entry.fmt is None:
        return None
    if sqnr is None:
        return None if least is None else "its SQNR was not measured"
    if math.isnan(sqnr) or sqnr == -math.inf:
        return f"its SQNR is {sqnr:g}: it holds values that are not finite, or nothing of it is left"
    return f"its SQNR of {sqnr:.4g} dB is below {least:g} dB" if least is not None and sqnr < least else None


# --- JSON ------------------------------------------------------------------------------------------------------------

_TYPES = typing.get_type_hints(Entry)


def _to_plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _entry_of(fields: dict[str, Any]) -> Entry:
    if "int_share" in fields:  # the field's name before layout 2
        fields["choice_share"] = fields.pop("int_share")
    return Entry(**{key: _of_type(_TYPES[key], value) for key, value in fields.items()})


def _of_type(kind: Any, value: Any) -> Any:
    if kind is float or (value is not None and float in typing.get_args(kind)):
        return float(value)
    return value


# --- tables ----------------------------------------------------------------------------------------------------------


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise): infinity without noise, minus infinity without signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else math.nan if math.isnan(signal + noise) else -math.inf


class _Group(NamedTuple):
    """Entries that share a line, and their common name."""

    name: str
    entries: tuple[Entry, ...]


def _grouped(entries: Sequence[Entry], key: Callable[[Entry], Any], name: Callable[[Entry], str]) -> list[_Group]:
    groups: dict[Any, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(key(entry), []).append(entry)
    # An entry that is alone in its group keeps the numbers in its path.
    return [_Group(name(g[0]) if len(g) > 1 else g[0].path, tuple(g)) for g in groups.values()]


def _pattern(entry: Entry) -> str:
    return re.sub(r"\d+", "*", entry.path)


def _lines_of(entries: Sequence[Entry]) -> list[_Group]:
    """Return a group per entry; with more than 40, entries that differ only in the numbers of their paths share one."""
    if len(entries) <= _MOST_LINES:
        return [_Group(entry.path, (entry,)) for entry in entries]
    return _grouped(entries, lambda e: (_pattern(e), e.shape, e.fmt, e.act_fmt, e.rule, e.note, e.expected), _pattern)


def _summary(report: Report) -> str:
    totals = report.totals
    if not totals.parameters:
        return "No parameters"
    before, after = _size(totals.bytes_before), _size(totals.bytes_after)
    share = totals.quantized_values / totals.values if totals.values else math.nan
    some = f"{totals.quantized} of {totals.parameters} parameters"
    if totals.quantized and totals.bytes_before == totals.bytes_after:
        text = f"{some}, {share:.1%} of {totals.values} values, are quantized, and stored as they were: {before}"
    else:
        factor = f", {totals.bytes_before / totals.bytes_after:.2f} times less" if totals.bytes_after else ""
        text = f"{some} are quantized: {before} -> {after}{factor}"
        if not totals.quantized:
            return text
        text += (
            f"\n{share:.1%} of {totals.values} values at {totals.quantized_bits_per_value:.3f} bits; over all "
            f"{totals.bits_per_value:.3f} bits a value"
        )
    rules = collections.Counter(repr(entry.rule) for entry in report.quantized if entry.rule is not None)
    if not rules:
        return text
    counts = ", ".join(f"{rule} {count}" for rule, count in rules.most_common(4))
    return f"{text}\nby the rule{'s' * (len(rules) > 1)} {counts}{', ...' * (len(rules) > 4)}"


def _quantized_table(entries: Sequence[Entry], width: int) -> Table:
    groups, notes, several = _lines_of(entries), _notes(entries), len(_rules(entries)) > 1
    flushed = any(entry.flushed_share for entry in entries)
    rows = []
    for name, group in groups[:_MOST_LINES]:
        first = group[0]
        mark = f" [{notes.index(first.note) + 1}]" if first.note is not None else ""
        before, after = (sum(getattr(entry, f) for entry in group) / 1e6 for f in ("bytes_before", "bytes_after"))
        row = [
            (f"{len(group)} x " if len(group) > 1 else "", name, mark),
            _shape(first.shape),
            f"{first.fmt}" + (f", act {first.act_fmt}" if first.act_fmt else ""),
            _range([entry.bits_per_value for entry in group], ".3f"),
            f"{before:.3g} -> {after:.3g}",
            _range([entry.sqnr_db for entry in group], ".1f"),
            _range(_percent(entry.choice_share for entry in group), ".0f"),
            *([_range(_percent(entry.flushed_share for entry in group), ".3g")] if flushed else []),
        ]
        rows.append([*row, _shortened(str(first.rule or ""), 24)] if several else row)
    headings = ["parameter", "shape", "format", "bits", "MB", "SQNR dB", "INT %"]
    headings += ["flushed %"] * flushed + ["rule"] * several
    more = sum(len(group.entries) for group in groups[_MOST_LINES:])
    if more:
        rows.append([("", f"and {more} more", ""), *[""] * (len(headings) - 1)])
    return _table(headings, rows, width, left=("parameter", "format", "rule"), optional=("rule", "bits", "shape"))


def _others_table(entries: Sequence[Entry], width: int) -> Table:
    """Return a table with the unexpected entries first, then a line for each name, class and reason."""

    def last(entry):
        return ".../" + _pattern(entry).rsplit("/", 1)[-1]

    unexpected = [entry for entry in entries if not entry.expected]
    expected = [entry for entry in entries if entry.expected]
    groups = [
        *_lines_of(unexpected),
        *_grouped(expected, lambda e: (last(e), e.module, e.reason), last),
    ]
    if len(groups) - len(_lines_of(unexpected)) > _MOST_LINES:
        groups = [*_lines_of(unexpected), *_grouped(expected, lambda e: e.reason, lambda _: "several")]
    rows = []
    for name, group in groups:
        classes = list(dict.fromkeys(entry.module for entry in group))
        first, size = group[0], _size(sum(entry.bytes_after for entry in group))
        why = f"{'' if first.expected else 'NOT EXPECTED: '}{first.reason}"
        module = (classes[0] or "") if len(classes) == 1 else "several"
        rows.append([("", name, ""), _shortened(module, 24), str(len(group)), size, why])
    headings = ["parameter", "class", "count", "size", "why"]
    return _table(headings, rows, width, left=("parameter", "class", "why"), wrap="why")


def _table(
    headings: Sequence[str],
    rows: Sequence[Sequence[Any]],
    width: int,
    *,
    left: Sequence[str],
    wrap: str | None = None,
    optional: Sequence[str] = (),
) -> Table:
    """Return a table of rows of text that fits a width.

    The first column holds (before, name, after). Names are shortened in the middle until the table fits. If that is
    not enough, the `optional` columns are dropped in their order.
    """
    columns = {heading: [row[i] for row in rows] for i, heading in enumerate(headings)}
    names = columns.pop(headings[0])

    def room():
        widths = {heading: max(map(len, [heading, *cells])) for heading, cells in columns.items()}
        if wrap is not None:  # the wrapped column takes at most half of the width
            widths[wrap] = min(widths[wrap], width // 2)
        return width - sum(widths.values()) - 3 * len(headings) - 1

    for heading in optional:
        if heading in columns and room() < 28:
            del columns[heading]
    length = max(room(), 16)
    columns = {headings[0]: [b + _shortened(name, length - len(b + a)) + a for b, name, a in names], **columns}
    table = Table(box=box.SIMPLE_HEAD)
    for heading in columns:
        justify = "left" if heading in left else "right"
        table.add_column(heading, justify=justify, no_wrap=heading != wrap, overflow="fold")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _shortened(text: str, length: int) -> str:
    if len(text) <= length:
        return text
    kept = max(length - 3, 2)
    return text[: kept // 2] + "..." + text[len(text) - (kept - kept // 2) :]


def _range(values: Iterable[float | None], spec: str) -> str:
    there = sorted({format(v, spec): v for v in values if v is not None}.items(), key=lambda pair: pair[1])
    if not there:
        return ""
    return there[0][0] if len(there) == 1 else f"{there[0][0]}..{there[-1][0]}"


def _percent(shares: Iterable[float | None]) -> list[float | None]:
    return [None if share is None else 100 * share for share in shares]


def _notes(entries: Iterable[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.note for entry in entries if entry.note is not None))


def _rules(entries: Iterable[Entry]) -> list[str | None]:
    return list(dict.fromkeys(entry.rule for entry in entries))


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.2f} kB"


# --- the picture -----------------------------------------------------------------------------------------------------

_HATCHES = ("", "///", "...", "xxx", "---", "ooo", "\\\\\\", "+++")  # so that formats differ in black and white, too


def _draw(report: Report) -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    groups = _lines_of(report.quantized)
    names = list(dict.fromkeys(str(entry.fmt) for entry in report.quantized))
    height = 2.6 + 0.22 * len(groups)
    figure = Figure(figsize=(9, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, height_ratios=(height - 1.6, 1.0))

    styles = {name: {"color": f"C{i}", "hatch": _HATCHES[i % len(_HATCHES)]} for i, name in enumerate(names)}
    for y, (_, entries) in enumerate(groups):
        sqnr = [entry.sqnr_db for entry in entries if entry.sqnr_db is not None]
        finite = [value for value in sqnr if math.isfinite(value)]
        if finite:
            mean = sum(finite) / len(finite)
            upper.barh(y, mean, edgecolor="white", **styles[str(entries[0].fmt)])
            upper.plot([min(finite), max(finite)], [y, y], color="black", linewidth=1.2)
        rest = sorted({f"{value:g}" for value in sqnr if not math.isfinite(value)})
        if len(sqnr) < len(entries):
            rest.append("not measured")
        if rest:
            upper.annotate(f" {', '.join(rest)}", (max(finite, default=0), y), va="center", fontsize=7)
    labels = [_shortened(f"{len(g.entries)} x {g.name}" if len(g.entries) > 1 else g.name, 48) for g in groups]
    upper.set_yticks(range(len(groups)), labels, fontsize=7)
    upper.set_ylim(len(groups) - 0.4, -0.6)  # reversed, so that the first group is on top
    upper.set_xlabel("SQNR, dB")
    upper.grid(axis="x", color="0.9", linewidth=0.6)
    upper.set_axisbelow(True)
    handles = [Patch(edgecolor="white", facecolor=s["color"], hatch=s["hatch"], label=n) for n, s in styles.items()]
    upper.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=8)

    totals = report.totals
    sizes = {"before": totals.bytes_before / 1e6, "after": totals.bytes_after / 1e6}
    lower.barh(list(sizes), list(sizes.values()), color=["0.75", "0.4"])
    for y, value in enumerate(sizes.values()):
        lower.annotate(f" {value:.3g}", (value, y), va="center", fontsize=8)
    lower.set_ylim(1.5, -0.5)
    lower.margins(x=0.12)
    lower.set_xlabel(f"MB of all {totals.parameters} parameters")
    return figure
