"""Plots of formats, of quantization errors of arrays, and of reports. Needs matplotlib (the extra `viz`).

Formats: plot_grid, plot_block, plot_bytes. Arrays: plot_error_by_magnitude, plot_choices_by_peak. Reports:
plot_errors, plot_choices and plot_pareto for an `ifjax.analysis.Report`, plot_report for `ifjax.Report`s. Any data:
plot_curves.

Series differ in shape and in grey value, so that plots remain readable in grey. Each function returns a matplotlib
Figure. Figures are made without pyplot: no global state changes, no display is needed, and `figure.savefig` works
everywhere. A notebook shows the figure that a cell ends with, after `%matplotlib inline`.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from ifjax.arrays import QTensor, quantize
from ifjax.codec import Encoding
from ifjax.codec.decode import scaled
from ifjax.codec.encode import decoded_place, inverse_for, wanted_payload
from ifjax.codec.headers import normalized
from ifjax.formats import FORMATS, Candidate, Format, get_format
from ifjax.formats.floats import bits_of
from ifjax.measure.errors import ErrorStats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*<>hd"
# Adjacent colours differ in grey value.
_COLOURS = ("black", "#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "0.6")
_DASHES = ("-", "--", "-.", ":")
_MOST_KINDS = 100  # maximum number of rows of the map, one name each, that fit on a page


# --- formats ---------------------------------------------------------------------------------------------------------


def plot_grid(*formats: str | Format) -> "Figure":
    """Plot the values that a block can represent, in units of its maximum, and the distance to the nearest value.

    Each candidate of each format has a line. Marks are its values; the area above is the distance to the nearest value,
    on the same scale for all candidates; the largest distance is on the right. Scales are taken as exact. Values beyond
    the block's maximum, such as 1.5 for a candidate that maps the maximum to 4 of 6, are not drawn.

    Raises:
        ValueError: no format is given, or one is unknown.
    """
    if not formats:
        raise ValueError("plot_grid needs formats, as in plot_grid('nvfp4', 'if4')")
    rows = [(fmt, candidate) for fmt in map(get_format, formats) for candidate in fmt.candidates]
    grids = [_values_in_block(fmt, candidate) for fmt, candidate in rows]
    figure = _figure(8.5, 1.2 + 0.62 * len(rows))
    axes = figure.subplots()
    z = np.linspace(-1, 1, 4201)
    distances = [np.min(np.abs(z[:, None] - values), axis=1) for values in grids]
    height = 0.72 / max(float(d.max()) for d in distances)
    for y, (row, values, distance) in enumerate(zip(rows, grids, distances, strict=True)):
        _, candidate = row
        first = row[0].candidates[0] is candidate
        colour = _COLOURS[0 if first else 1]
        axes.fill_between(z, -y, distance * height - y, color=colour, alpha=0.3 if first else 0.45, linewidth=0)
        axes.axhline(-y, color="0.7", linewidth=0.8, zorder=1)
        used = values[np.abs(values) <= 1 + 1e-6]
        marker = "o" if first else "s"
        axes.plot(used, np.full(len(used), -y), marker, color=colour, markersize=4.5, zorder=3)
        axes.annotate(f"{100 * distance.max():.2g} %", (1.09, -y + 0.1), fontsize=8, annotation_clip=False)
    axes.annotate("largest\nerror, % of\nmaximum", (1.09, 0.5), fontsize=8, annotation_clip=False, va="bottom")
    axes.set_yticks(range(0, -len(rows), -1), [_candidate_name(fmt, c) for fmt, c in rows], fontsize=9)
    axes.set_ylim(-len(rows) + 0.6, 0.95)
    axes.set_xlim(-1.06, 1.06)
    axes.set_xlabel("value / block maximum")
    axes.set_title("Values in a block, and the distance to the nearest one", fontsize=10)
    _only_bottom(axes)
    return figure


def plot_block(
    x: Float[ArrayLike, "n"], fmt: str | Format = "if4", *, amax: float | None = None, loss: str = "mse"
) -> "Figure":
    """Plot the values of one block as each candidate encodes them, and mark the candidate that is kept.

    Horizontal lines are the values that a candidate can represent at the block's scale. The title of the kept candidate
    says so; its decoded values are those of `ifjax.quantize(x, fmt, amax=amax, loss=loss)`.

    Args:
        x: finite numbers, at most one block. A partial block is padded with zeros, which are not drawn.
        amax: the maximum of the tensor that contains the block; by default that of x.
        loss: "mse", "mae" or "abs_max".

    Raises:
        ValueError: x does not fit into one block or is not finite, or the loss is unknown.
    """
    fmt = get_format(fmt)
    x = np.asarray(x, np.float32)
    if x.ndim != 1 or not 1 <= x.size <= fmt.block:
        raise ValueError(f"x must be one block of {fmt.name}, of 1 to {fmt.block} numbers, got shape {x.shape}")
    if not np.all(np.isfinite(x)):
        raise ValueError("x must be finite")
    trials = _trials_of(x, fmt, amax, loss)
    kept = _kept(trials, fmt)
    figure = _figure(9, 1.0 + 2.5 * len(trials))
    rows = np.atleast_1d(figure.subplots(len(trials), sharex=True))
    for i, (axes, trial) in enumerate(zip(rows, trials, strict=True)):
        for value in trial.offered:
            axes.axhline(value, color="0.88", linewidth=0.7, zorder=0)
        places = np.arange(x.size)
        axes.vlines(places, x, trial.decoded, color="0.35", linewidth=2.2, zorder=2)
        axes.plot(places, x, "o", color="white", markeredgecolor="black", markersize=6, zorder=3, label="number")
        axes.plot(places, trial.decoded, "x", color="black", markersize=7, zorder=4, label="decoded")
        margin = 1.12 * max(float(np.abs(x).max()), float(np.abs(trial.decoded).max()), 1e-30)
        axes.set_ylim(-margin, margin)
        axes.set_ylabel("value")
        name, verdict = _candidate_name(fmt, fmt.candidates[i]), "   kept" if i == kept and len(trials) > 1 else ""
        title = f"{name}   scale {trial.scale:.4g}, {_LOSSES[loss]} {trial.loss:.4g}{verdict}"
        axes.set_title(title, fontsize=10, loc="left", fontweight="bold" if verdict else "normal")
        axes.margins(x=0.03)
    rows[-1].set_xticks(range(x.size))
    rows[-1].set_xlabel("place in the block")
    rows[-1].legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, frameon=False, fontsize=8)
    return figure


def plot_bytes(q: QTensor, block: int = 0) -> "Figure":
    """Plot the stored bits of one block of a QTensor: the bytes of its header, then those of its codes.

    Bytes are in memory order, each with its highest bit on the left. Adjacent codes have different greys. Below each
    byte are the values of its codes, in the order of the drawn bits.

    Args:
        q: a QTensor with one axis. Index a larger one first, as in `q[0]`.
        block: index of the block.

    Raises:
        ValueError: q has more than one axis, or the codes of a block do not fill whole bytes.
        IndexError: the block index is out of range.
    """
    if q.ndim != 1:
        raise ValueError(f"plot_bytes draws a QTensor of one axis, got shape {q.shape}: index it first, as in q[0]")
    fmt, bits = q.fmt, q.fmt.bits
    if fmt.block * bits % 8:
        raise ValueError(f"the codes of a block of {fmt.name} do not fill whole bytes")
    if not 0 <= block < q.blocks:
        raise IndexError(f"block {block} of a QTensor of {q.blocks} blocks")
    nbytes, size = fmt.scale.nbytes, fmt.block * bits // 8
    header = int(np.asarray(q.headers())[block])
    codes = np.asarray(q.codes)[block * size : (block + 1) * size]
    values = np.asarray(q.dequantize(np.float32))[block * fmt.block : (block + 1) * fmt.block]
    per_row = 4 if bits != 3 else 3
    rows = -(-size // per_row)
    figure = _figure(2.45 * per_row + 0.3, 1.0 + 1.05 * (rows + 1))
    axes = figure.subplots()

    def draw(byte, x, y, shades, caption):
        for place in range(8):
            bit = 7 - place
            axes.add_patch(_box(x + place, y, shades[bit]))
            axes.text(x + place + 0.5, y + 0.5, str(byte >> bit & 1), ha="center", va="center", fontsize=10)
        axes.text(x + 4, y - 0.12, caption, ha="center", va="top", fontsize=8)

    selector, payload = fmt.split(jnp.int32(header))
    which = f": decoded as {fmt.decodings[int(selector)].grid.name}" if fmt.has_selector else ""
    for i in range(nbytes):
        byte = header >> 8 * i & 0xFF
        spare = [fmt.has_selector and 8 * i + bit >= fmt.scale.bits for bit in range(8)]
        caption = f"header 0x{header & 2 ** (8 * nbytes) - 1:0{2 * nbytes}X}{which}" if i == 0 else f"byte {i}"
        draw(byte, 9 * i, 0, ["0.55" if is_spare else "0.94" for is_spare in spare], caption)
    value = float(fmt.scale.decode(jnp.int32(payload)))
    note = f"{fmt.scale.name} = {value:.4g}" + ("; the dark bits choose the decoding" if fmt.has_selector else "")
    axes.text(9 * nbytes - 0.5, 0.5, note, va="center", fontsize=9)
    for i, byte in enumerate(codes.tolist()):
        owners = [(8 * i + bit) // bits for bit in range(8)]
        shades = ["0.97" if owner % 2 == 0 else "0.8" for owner in owners]
        shown = [owner for owner in dict.fromkeys(owners) if owner < len(values)]
        caption = ", ".join(f"{values[owner]:.3g}" for owner in reversed(shown))
        draw(byte, 9 * (i % per_row), -1.9 * (1 + i // per_row), shades, caption)
    axes.set_xlim(-0.2, 9 * max(per_row, nbytes) - 0.8)
    axes.set_ylim(-1.9 * rows - 0.75, 1.3)
    axes.set_axis_off()
    total = 8 * nbytes + bits * fmt.block
    axes.set_title(
        f"{fmt.name}: a block of {fmt.block} values in {total} bits, {total / fmt.block:g} a value", fontsize=10
    )
    return figure


# --- arrays ----------------------------------------------------------------------------------------------------------


def plot_error_by_magnitude(
    x: Float[ArrayLike, "... n"], formats: Sequence[str | Format] = ("nvfp4", "nvint4", "if4"), *, bins: int = 24
) -> "Figure":
    """Plot the error of values by their magnitude (above), and its share of the total error (below).

    The abscissa of both is |x| divided by the maximum of x's block. The upper plot shows the root mean squared error in
    percent of the block's maximum. The lower plot shows the squared error of the values in a bin, divided by the sum of
    squares of all values. Its sum over the bins, which is the normalized error, is in the legend.

    Args:
        x: finite numbers with blocks along the last axis, whose length must be a multiple of every block size.

    Raises:
        ValueError: there are no formats or no numbers, or blocks do not fit.
    """
    formats = _formats_for(x, formats, "plot_error_by_magnitude")
    x = jnp.asarray(x, jnp.float32)
    figure = _figure(8, 6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
    edges = np.linspace(0, 1, bins + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    for i, fmt in enumerate(formats):
        error = np.asarray(quantize(x, fmt).dequantize() - x, np.float64).reshape(-1, fmt.block)
        size = np.abs(np.asarray(x, np.float64)).reshape(-1, fmt.block)
        peak = size.max(axis=1, keepdims=True)
        keep = np.broadcast_to(peak > 0, size.shape)
        ratio = np.divide(size, peak, where=keep, out=np.zeros_like(size))[keep]
        at = np.minimum((ratio * bins).astype(int), bins - 1)
        relative = np.square(np.divide(error, peak, where=keep, out=np.zeros_like(error))[keep])
        count = np.bincount(at, minlength=bins)
        mean = np.bincount(at, relative, bins) / np.where(count, count, np.nan)
        energy = np.bincount(at, np.square(error[keep]), bins)
        part = energy / max(float(np.sum(np.square(size))), np.finfo(np.float64).tiny)
        upper.plot(middles, 100 * np.sqrt(mean), label=fmt.name, **_style(i))
        lower.plot(middles, 1e3 * part, label=f"{fmt.name}: {1e3 * part.sum():.3g}", **_style(i))
    upper.set_ylabel("rms error,\n% of block maximum")
    lower.set_ylabel("squared error /\nall squared, x 1e-3")
    lower.set_xlabel("|x| / block maximum")
    upper.set_title("Error by magnitude", fontsize=10)
    for axes, title in ((upper, None), (lower, "sum x 1e-3")):
        beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
        axes.legend(frameon=False, fontsize=8, title=title, title_fontsize=8, **beside)
        axes.set_ylim(bottom=0)
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    lower.set_xlim(0, 1)
    return figure


def plot_choices_by_peak(
    x: Float[ArrayLike, "... n"] | Mapping[str, ArrayLike], fmt: str | Format = "if4", *, bins: int = 32
) -> "Figure":
    """Plot the share of blocks with another decoding than the first (IF: integers), by the block's peak ratio.

    The abscissa is a block's maximum divided by its root mean square: 1 if all magnitudes are equal, and the square
    root of the block size if one value is nonzero. The lower plot shows the number of blocks. The legend gives the
    ratio at which the share first falls below one half after its largest value, by linear interpolation.

    Args:
        x: an array with blocks along the last axis, or a mapping of legend names to such arrays.

    Raises:
        ValueError: the format has only one decoding, or blocks do not fit.
    """
    fmt = get_format(fmt)
    if not fmt.has_selector:
        raise ValueError(f"{fmt.name} has one decoding: there is no choice to plot. if4 has two")
    arrays = x if isinstance(x, Mapping) else {fmt.name: x}
    figure = _figure(8, 5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    edges = np.linspace(1, math.sqrt(fmt.block), bins + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    for i, (name, array) in enumerate(arrays.items()):
        _formats_for(array, [fmt], "plot_choices_by_peak")
        ratio, second = _peaks_and_choices(array, fmt)
        count, _ = np.histogram(ratio, edges)
        # Bins with fewer than 30 blocks are left out, because their share is too noisy.
        share = 100 * np.histogram(ratio[second], edges)[0] / np.where(count >= 30, count, np.nan)
        half = _falls_through(middles, share, 50.0)
        label = name if half is None else f"{name}: half at {half:.2f}"
        upper.plot(middles, share, label=label, **_style(i))
        lower.plot(middles, 100 * count / count.sum(), **_style(i))
    upper.axhline(50, color="0.75", linewidth=0.8, zorder=0)
    upper.set_ylim(-3, 103)
    upper.set_ylabel(f"blocks that took {' or '.join(d.grid.name for d in fmt.decodings[1:])}, %")
    upper.set_title(f"{fmt.name}: choice by the block's maximum", fontsize=10)
    upper.legend(frameon=False, fontsize=8)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("all blocks, %")
    lower.set_xlabel("block maximum / root mean square of the block")
    for axes in (upper, lower):
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure


# --- reports ---------------------------------------------------------------------------------------------------------


def plot_errors(report: Any) -> "Figure":
    """Plot relative errors by format: a dot for each quantized tensor, and a black bar for the total."""
    figure = _figure(7.5, 1.3 + 0.42 * len(report.total))
    axes = figure.subplots()
    total = report.total
    order = sorted(total, key=lambda name: -total[name].relative_error)
    for y, name in enumerate(order):
        errors = [100 * t.errors[name].relative_error for t in report.quantized]
        axes.plot(errors, [y] * len(errors), "o", color="0.45", alpha=0.45, markersize=5, markeredgewidth=0)
        x = 100 * total[name].relative_error
        axes.plot([x, x], [y - 0.32, y + 0.32], color="black", linewidth=2)
        axes.annotate(f"{x:.3g} %", (x, y + 0.34), ha="center", va="bottom", fontsize=8)
    axes.set_yticks(range(len(order)), [f"{name}  ({total[name].bits_per_value:.3g} bits)" for name in order])
    axes.set_ylim(-0.6, len(order) - 0.2)
    if _positive(report):
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    axes.set_xlabel("relative error (Frobenius norm), %: dots are tensors, bars the total")
    axes.set_title(f"Error by format\n{report.source}", fontsize=10)
    axes.grid(axis="x", which="both", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


def plot_pareto(errors: Mapping[str, ErrorStats], title: str = "") -> "Figure":
    """Plot error against bits per value, and mark the formats on the Pareto front.

    The left plot has all formats: squared error divided by squared signal (lower is better) against bits per value. Its
    line joins the formats for which no other format is at least as good in both and better in one. The right plot lists
    by name the formats with the most common number of bits.

    Args:
        errors: errors by format name, such as the `total` of an `ifjax.analysis.Report`.
        title: title of the figure, such as the name of what was quantized.

    Raises:
        ValueError: there are no errors, or one is not a positive finite number.

    Example:
        >>> from ifjax import analysis, plots
        >>> errors = {fmt: analysis.error(analysis.sample("normal", 4096), fmt) for fmt in ("nvfp4", "if4", "mxfp4")}
        >>> figure = plots.plot_pareto(errors, "4096 normal numbers")
    """
    if not errors or not all(0 < e.normalized_mse < math.inf for e in errors.values()):
        raise ValueError("plot_pareto needs an error above 0 for each format: {name: ErrorStats}")
    # For named formats, bits exclude the tensor's amax and padding, which differ between arrays.
    bits = {n: get_format(n).bits_per_value if n in FORMATS else e.bits_per_value for n, e in errors.items()}
    value = {name: errors[name].normalized_mse for name in errors}
    front = [name for name in bits if not any(_betters(bits, value, other, name) for other in bits)]
    front.sort(key=bits.__getitem__)
    counts = Counter(bits.values())
    usual = max(counts, key=lambda b: (counts[b], -b))
    ranked = sorted((name for name in bits if bits[name] == usual), key=lambda name: -value[name])
    figure = _figure(10, max(4.2, 1.1 + 0.21 * len(ranked)))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))

    left.step([bits[n] for n in front], [value[n] for n in front], where="post", color=_COLOURS[2], zorder=1)
    for axes, names, at in ((left, bits, bits), (right, ranked, {name: i for i, name in enumerate(ranked)})):
        for name in names:
            best, selects = name in front, errors[name].choice_share is not None
            points = (at[name], value[name]) if axes is left else (value[name], at[name])
            axes.plot(
                *points, "s" if selects else "o", color=_COLOURS[2] if best else "0.55", zorder=3 if best else 2,
                markerfacecolor=None if best else "white", markersize=7 if best else 5.5,
            )  # fmt: skip
    labels: dict[tuple[float, float], list[str]] = {}
    for name in front:  # of one format by two names there is one point
        labels.setdefault((bits[name], value[name]), []).append(name)
    for point, names in labels.items():
        left.annotate(
            ", ".join(names), point, (-7, -5), textcoords="offset points", ha="right", va="top", fontsize=9
        )
    span = max(bits.values()) - min(bits.values()) or 1
    left.set_xlim(min(bits.values()) - 0.22 * span, max(bits.values()) + 0.06 * span)
    left.set_yscale("log")
    _plain_ticks(left.yaxis)
    left.set_ylim(top=1.5 * max(value.values()), bottom=min(value.values()) / 1.8)
    left.set_xticks(sorted(counts), [f"{b:g}" for b in sorted(counts)], rotation=90)
    left.set_xlabel("bits a value, scales included")
    left.set_ylabel("squared error / squared signal (lower is better)")
    right.set_yticks(range(len(ranked)), ranked, fontsize=9)
    right.set_xlim(left=0, right=1.08 * max(value[name] for name in ranked))
    right.set_ylim(-0.7, len(ranked) - 0.3)
    right.set_xlabel("squared error / squared signal (lower is better)")
    right.set_title(f"formats of {usual:g} bits a value", fontsize=10)
    legend = "blue: no other format has less error in as few bits\nsquares: a selector for each block"
    left.set_title(legend, fontsize=9)
    for axes in (left, right):
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def _betters(bits, value, other: str, name: str) -> bool:
    """Return whether `other` is at least as good in bits and error, and better in one of them."""
    as_good = bits[other] <= bits[name] and value[other] <= value[name]
    return as_good and (bits[other] < bits[name] or value[other] < value[name])


def plot_choices(report: Any) -> "Figure":
    """Plot the share of blocks with another decoding than the first (IF: integers), by layer.

    The upper plot has a line for each format with several decodings, with all weights of a layer together. The lower
    plot is a map for the first of these formats, with a row for each kind of weight. The layer is the first number in a
    tensor's name; tensors without a number are under "other".

    Raises:
        ValueError: no format of the report has several decodings.
    """
    names = [name for name, error in report.total.items() if error.choice_share is not None]
    if not names:
        raise ValueError("no format of this report has two decodings, such as if4: there is no choice to plot")
    parts = [_layer_and_kind(t.name) for t in report.quantized]
    layers = sorted({layer for layer, _ in parts}, key=lambda layer: (layer is None, layer))
    kinds = list(dict.fromkeys(kind for _, kind in parts))[:_MOST_KINDS]

    def share(name, keep):
        errors = [t.errors[name] for t, part in zip(report.quantized, parts, strict=True) if keep(*part)]
        return 100 * sum(e.others for e in errors) / sum(e.blocks for e in errors) if errors else float("nan")

    width = 4.6 + max(3.2, 0.42 * len(layers))
    figure = _figure(width, 4.2 + 0.26 * len(kinds))
    upper, lower = figure.add_gridspec(2, 1, height_ratios=(2.2, 0.4 + 0.26 * len(kinds)))
    lines, grid = figure.add_subplot(upper), figure.add_subplot(lower)

    for name, marker in zip(names, _MARKERS * len(names), strict=False):
        grey = str(0.55 * names.index(name) / max(len(names) - 1, 1))
        shares = [share(name, lambda layer, _, at=at: layer == at) for at in layers]
        numbered = len([layer for layer in layers if layer is not None])
        lines.plot(range(numbered), shares[:numbered], marker=marker, color=grey, label=name, linewidth=1.2)
        lines.plot(range(numbered, len(layers)), shares[numbered:], marker=marker, color=grey)
    lines.axhline(50, color="0.8", linewidth=0.8, zorder=0)
    lines.set_ylim(0, 100)
    lines.set_ylabel("blocks, %")
    lines.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    lines.set_title(f"Blocks that took the second decoding (IF: integers), by layer\n{report.source}", fontsize=10)

    values = [[share(names[0], lambda *part, at=(layer, kind): part == at) for layer in layers] for kind in kinds]
    there = [value for row in values for value in row if value == value]
    span = max(max(there) - min(there), 1)
    # Only light greys, so that black numbers are readable; darker means more.
    grid.imshow(values, cmap="Greys", vmin=min(there) - 0.2 * span, vmax=max(there) + span, aspect="auto")
    if len(layers) <= 40:
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                if value == value:
                    grid.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7)
    grid.set_yticks(range(len(kinds)), kinds, fontsize=7)
    some = f" (the first {len(kinds)} kinds)" if len(kinds) == _MOST_KINDS else ""
    grid.set_title(f"{names[0]} by kind of weight, %{some}", fontsize=9)
    every = -(-len(layers) // 40)
    ticks = range(0, len(layers), every)
    for axes in (lines, grid):
        axes.set_xticks(ticks, ["other" if layers[i] is None else str(layers[i]) for i in ticks], fontsize=8)
        axes.set_xlim(-0.5, len(layers) - 0.5)
    grid.set_xlabel("layer (the first number in a tensor's name)")
    return figure


def plot_report(reports: Any) -> "Figure":
    """Plot the SQNR of quantized weights by layer, and the size of the parameters, for `ifjax.quantize_params` reports.

    The upper plot shows SQNR in dB against the layer, which is the first number in a parameter's path ("other" if there
    is none): the mean over the layer's quantized parameters, and a thin line from the smallest to the largest. The
    lower plot shows the size of all parameters, in MB, before and after. `Report.plot` shows the single parameters of
    one report.

    Args:
        reports: an `ifjax.Report`, or a mapping of names to reports, to compare them.

    Raises:
        ValueError: there is no report, or a report has no quantized parameters with a measured SQNR.
    """
    named = reports if isinstance(reports, Mapping) else {"": reports}
    layers_of = {name: _sqnr_by_layer(report) for name, report in named.items()}
    if not named or not all(layers_of.values()):
        empty = ", ".join(repr(name) for name, layers in layers_of.items() if not layers) or "all"
        raise ValueError(f"no SQNR to plot in these reports: {empty}. Is anything quantized and measured?")
    layers = sorted({layer for found in layers_of.values() for layer in found}, key=lambda n: (n is None, n))
    figure = _figure(max(6.5, 2.5 + 0.5 * len(layers)), 4.4 + 0.26 * len(named))
    upper, lower = figure.subplots(2, 1, height_ratios=(3.2, 0.5 + 0.26 * len(named)))
    for i, (name, found) in enumerate(layers_of.items()):
        shift = 0.12 * (i - (len(named) - 1) / 2)
        at = [x + shift for x, layer in enumerate(layers) if layer in found]
        values = [found[layer] for layer in layers if layer in found]
        means = [sum(v) / len(v) for v in values]
        numbered = len([layer for layer in layers if layer in found and layer is not None])
        style = _style(i)
        upper.plot(at[:numbered], means[:numbered], label=name or None, **style)
        upper.plot(at[numbered:], means[numbered:], label=None if numbered else name or None, **style)
        upper.vlines(at, [min(v) for v in values], [max(v) for v in values], color=style["color"], linewidth=0.9)
    upper.set_xticks(range(len(layers)), ["other" if layer is None else str(layer) for layer in layers], fontsize=8)
    upper.set_xlabel("layer (the first number in a parameter's path)")
    upper.set_ylabel("SQNR, dB")
    upper.set_title("Weights kept, by layer: mean, and from least to largest", fontsize=10)
    upper.grid(axis="y", color="0.92", linewidth=0.6)
    upper.set_axisbelow(True)
    if any(named):
        upper.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    first = next(iter(named.values()))
    sizes = {"before": first.totals.bytes_before / 1e6}
    sizes |= {name or "after": report.totals.bytes_after / 1e6 for name, report in named.items()}
    lower.barh(list(sizes), list(sizes.values()), color=["0.8"] + ["0.45"] * len(named))
    for y, value in enumerate(sizes.values()):
        lower.annotate(f" {value:.3g}", (value, y), va="center", fontsize=8)
    lower.set_ylim(len(sizes) - 0.4, -0.6)
    lower.margins(x=0.12)
    lower.tick_params(labelsize=8)
    lower.set_xlabel(f"MB of all {first.totals.parameters} parameters")
    return figure


# --- anything --------------------------------------------------------------------------------------------------------


def plot_curves(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], *, xlabel: str, ylabel: str, title: str = ""
) -> "Figure":
    """Plot named lines, each given as (x, y) of equal lengths, with distinct markers, dashes and colours.

    `xlabel` and `ylabel` should state units.

    Raises:
        ValueError: there are no curves.
    """
    if not curves:
        raise ValueError("plot_curves needs curves: {name: (x, y)}")
    figure = _figure(7.5, 4)
    axes = figure.subplots()
    for i, (name, (x, y)) in enumerate(curves.items()):
        x, y = np.asarray(x), np.asarray(y)
        axes.plot(x, y, label=name, markevery=max(1, x.size // 12), **_style(i))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure


# --- below the surface -----------------------------------------------------------------------------------------------

_LOSSES = {"mse": "squared error", "mae": "absolute error", "abs_max": "largest error"}


class _Trial(NamedTuple):
    """A block as one candidate encodes it.

    Holds the decoded values, all values that it can represent (at the first place, if scales differ within a block),
    the scale in x's units, and the loss.
    """

    decoded: np.ndarray
    offered: np.ndarray
    scale: float
    loss: float


def _trials_of(x: np.ndarray, fmt: Format, amax: float | None, loss: str) -> list[_Trial]:
    if loss not in _LOSSES:
        raise ValueError(f"loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
    whole = jnp.asarray(np.pad(x, (0, fmt.block - x.size)))
    peak = jnp.max(jnp.abs(whole))
    constant = fmt.tensor_constant()
    tensor = normalized(peak if amax is None else jnp.float32(amax), constant, 0) if fmt.has_tensor_scale else None
    runs = [[bits_of(jnp.max(jnp.abs(part))) for part in whole.reshape(-1, run)] for run in fmt.scale.runs]
    place, how = jnp.arange(fmt.block, dtype=jnp.int32), Encoding.of(fmt)
    power = np.float32(1 if tensor is None else tensor.power)
    trials = []
    for candidate in fmt.candidates:
        payload = wanted_payload(candidate, bits_of(peak), runs, tensor, fmt, 1.0)
        inverse = inverse_for(payload, None, None, place, tensor, how)
        scale = fmt.scale.decode(payload, place)
        _, decoded = decoded_place(whole, None, inverse, scale, tensor, constant, candidate, fmt)
        decoded = np.asarray(decoded)[: x.size] / power
        e = np.abs(decoded.astype(np.float64) - x)
        total = {"mse": np.sum(e * e), "mae": np.sum(e), "abs_max": np.max(e)}[loss]
        values = jnp.asarray(_written(candidate))
        first = fmt.scale.decode(payload)
        offered = np.asarray(scaled(values, first, candidate.step, tensor, constant)) / power
        unit = 1.0 if tensor is None else float(tensor.amax / fmt.tensor_constant()) / float(power)
        trials.append(_Trial(decoded, offered, float(first) * unit, float(total)))
    return trials


def _kept(trials: Sequence[_Trial], fmt: Format) -> int:
    """Return the index of the trial with the least loss; ties follow the format's `ties`."""
    order = range(len(trials)) if fmt.ties == "first" else range(len(trials) - 1, -1, -1)
    return min(order, key=lambda i: trials[i].loss)


def _written(candidate: Candidate) -> np.ndarray:
    """Return the values of a candidate's codes in ascending order, in units of its step."""
    grid = candidate.grid
    values = [v for code, v in enumerate(grid.values) if code not in grid.unused]
    return np.unique(np.asarray(values, np.float32) + np.float32(candidate.offset))


def _values_in_block(fmt: Format, candidate: Candidate) -> np.ndarray:
    """Return the values that a candidate can represent, divided by the block's maximum.

    Where runs within a block have factors, the values are those of the run that holds the maximum: its factor is the
    largest, and its largest value is the maximum.
    """
    values = _written(candidate) * candidate.step * candidate.scale_multiplier
    return values / (values.max() if fmt.scale.runs else float(fmt.block_peak(candidate)))


def _candidate_name(fmt: Format, candidate: Candidate) -> str:
    factors = {"step": candidate.step, "scale times": candidate.scale_multiplier}
    notes = [f"{what} {_fraction(factor)}" for what, factor in factors.items() if factor != 1]
    if fmt.peak is not None or candidate.peak is not None:
        notes.append(f"maximum at {float(fmt.block_peak(candidate)):g}")
    if candidate.offset:
        notes.append(f"plus {candidate.offset:g}")
    return f"{fmt.name}: {candidate.grid.name}" + (f" ({', '.join(notes)})" if notes else "")


def _fraction(value: float) -> str:
    near = Fraction(value).limit_denominator(64)
    return str(near) if abs(float(near) - value) < 1e-6 else f"{value:.4g}"


def _formats_for(x, formats, caller) -> list[Format]:
    records = [get_format(fmt) for fmt in formats]
    shape = np.shape(x)
    if not records or not shape or not math.prod(shape):
        raise ValueError(f"{caller} needs formats and numbers, got {len(records)} formats and shape {shape}")
    for fmt in records:
        if shape[-1] % fmt.block:
            raise ValueError(f"{caller}: blocks of {fmt.block} ({fmt.name}) do not divide a last axis of {shape[-1]}")
    return records


def _peaks_and_choices(x, fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Return, for nonzero blocks, maximum / root mean square, and whether the decoding is not the first."""
    blocks = np.asarray(x, np.float64).reshape(-1, fmt.block)
    second = np.asarray(quantize(jnp.asarray(x, jnp.float32), fmt).choices()).reshape(-1) > 0
    peak = np.abs(blocks).max(axis=1)
    keep = peak > 0
    ratio = peak[keep] / np.sqrt(np.mean(np.square(blocks[keep]), axis=1))
    return np.clip(ratio, 1, math.sqrt(fmt.block)), second[keep]


def _falls_through(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Return the x at which y first falls below the level after its largest value; None if it does not."""
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    start = int(np.argmax(y)) if y.size else 0
    for i in range(start, y.size - 1):
        if y[i] >= level > y[i + 1]:
            return float(x[i] + (y[i] - level) / (y[i] - y[i + 1]) * (x[i + 1] - x[i]))
    return None


def _sqnr_by_layer(report: Any) -> dict[int | None, list[float]]:
    found: dict[int | None, list[float]] = {}
    for entry in report.quantized:
        if entry.sqnr_db is not None and math.isfinite(entry.sqnr_db):
            found.setdefault(_layer_and_kind(entry.path)[0], []).append(entry.sqnr_db)
    return found


def _style(i: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)], "markersize": 4.5,
        "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 1.4,
    }  # fmt: skip


def _only_bottom(axes) -> None:
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(left=False)


def _box(x: float, y: float, shade: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="0.35", linewidth=0.7)


def _figure(width, height):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _positive(report):
    return all(e.relative_error > 0 for t in report.quantized for e in t.errors.values())


def _plain_ticks(axis):
    from matplotlib.ticker import FuncFormatter, LogLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 5 * low else range(1, 10)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _layer_and_kind(name):
    """Split a name into layer and kind: "encoder.layer.3.attention.query.weight" -> (3, "attention.query")."""
    found = re.search(r"(?:^|[._/])(\d+)(?=[._/]|$)", name)
    layer = int(found.group(1)) if found else None
    kind = name[found.end() :] if found else name
    # Further numbers, such as those of experts, are combined.
    kind = re.sub(r"(?<=[._/])\d+(?=[._/]|$)", "*", kind.strip("._/"))
    return layer, re.sub(r"[._/](weight|kernel)$", "", kind) or name
