"""Pictures of an `ifjax.analysis.Report`. They are told apart by shape and by grey value, so they survive a printer.

Figures are made without pyplot: nothing global changes, no display is needed, and `figure.savefig` works anywhere.
"""

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*<>hd"
_MOST_KINDS = 100  # rows of the map: a name a line is all that a page can hold


def plot_errors(report: Any) -> "Figure":
    """Relative error by format: a dot for each quantized tensor, a black line with the figure for the total."""
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


def plot_choices(report: Any) -> "Figure":
    """Share of blocks that took the second decoding (for IF formats: integers), by layer.

    One line for each format that has a choice, with all weights of a layer together; below, for the first of them, a
    map of kind of weight by layer. The layer is the first number in a tensor's name; tensors without one stand under
    "other".

    Raises:
        ValueError: none of the formats has a choice.
    """
    names = [name for name, error in report.total.items() if error.second_share is not None]
    if not names:
        raise ValueError("no format of this report has two decodings, such as if4: there is no choice to plot")
    parts = [_layer_and_kind(t.name) for t in report.quantized]
    layers = sorted({layer for layer, _ in parts}, key=lambda layer: (layer is None, layer))
    kinds = list(dict.fromkeys(kind for _, kind in parts))[:_MOST_KINDS]

    def share(name, keep):
        errors = [t.errors[name] for t, part in zip(report.quantized, parts, strict=True) if keep(*part)]
        return 100 * sum(e.second for e in errors) / sum(e.blocks for e in errors) if errors else float("nan")

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
    # Light greys only, so that black numbers can be read; darker is more.
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

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda *_: ""))


def _layer_and_kind(name):
    """"encoder.layer.3.attention.query.weight" -> (3, "attention.query"): what all layers have in common is cut."""
    found = re.search(r"(?:^|[._/])(\d+)(?=[._/]|$)", name)
    layer = int(found.group(1)) if found else None
    kind = name[found.end() :] if found else name
    # Further numbers, experts say, are taken together.
    kind = re.sub(r"(?<=[._/])\d+(?=[._/]|$)", "*", kind.strip("._/"))
    return layer, re.sub(r"[._/](weight|kernel)$", "", kind) or name
