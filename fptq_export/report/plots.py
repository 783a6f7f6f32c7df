"""The pictures, as SVG that stands in a page: colours are the page's variables, text is text, ids are unique.

matplotlib draws with one colour for each variable, and the colours are replaced afterwards: the same picture is dark
on light and light on dark. The same figures give the same bytes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fptq_export.report.blocks import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fptq_export.report.layers import LayerFigures, Panel

__all__ = ["TIERS", "Bars", "Points", "bar_plot", "frontier_plot", "limits_with_zero", "range_plot", "value_plot"]

_COLOURS: Final[Mapping[str, str]] = {
    "#010203": "var(--ink)",
    "#010204": "var(--line)",
    "#010205": "var(--static)",
    "#010206": "var(--lae)",
    "#010207": "var(--token)",
    "#010208": "var(--float)",
    "#010209": "var(--limit)",
}
_INK, _LINE, _STATIC, _LAE, _TOKEN, _FLOAT, _LIMIT = _COLOURS
TIERS: Final[Mapping[str, tuple[str, str, str]]] = {
    "static": ("static", _STATIC, "o"),
    "lae_static": ("equalized, then static", _LAE, "s"),
    "per_token": ("per token", _TOKEN, "^"),
    "float": ("not quantized", _FLOAT, "D"),
}
"""Tier -> what it is called, its colour, its marker: shapes differ too, for those who do not tell colours apart."""
_FONT = 8.0
_WIDTH = 9.0
"""Inches: a page's width."""
_MARK_ROOM = 0.08
"""Part of a panel's range beyond its outermost values: half a mark is 0.03 of a panel's height."""
_MOST_LABELS = 40
"""Blocks that each have a label below the axis; of more, every fifth has one."""


@dataclass(frozen=True)
class Points:
    """A line, or single points, of a frontier."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    marked: bool = False
    """A single choice, drawn as a star."""


@dataclass(frozen=True)
class Bars:
    """One bar for each name."""

    label: str
    values: tuple[float, ...]


def range_plot(panels: Sequence[Panel], v0: float, v1: float) -> Plot:
    """Largest magnitude of every layer's input, before and after equalization, on a log scale with both thresholds."""
    figure, rows = _panel_figure(panels)
    for axes, panel in zip(rows, panels, strict=True):
        _log_scale(axes)
        _draw_ranges(axes, panel)
        for name, value in (("v0", v0), ("v1", v1)):
            axes.axhline(value, color=_LIMIT, linestyle="--", linewidth=0.9)
            label = f"{name} = {value:g}"
            axes.annotate(
                label, (1.005, value), xycoords=("axes fraction", "data"), va="center", color=_LIMIT, fontsize=_FONT
            )
        low = min(v0, *(min(_ranges(layer)) for layer in panel.layers))
        high = max(v1, *(max(_ranges(layer)) for layer in panel.layers))
        axes.set_ylim(low / 2.0, high * 2.0)
        axes.set_ylabel("max |x|, no unit")
    _legend(figure, panels, equalized=any(layer.after is not None for panel in panels for layer in panel.layers))
    caption = (
        "Largest magnitude of each layer's input in calibration, in the activation's own unit, log scale. A hollow mark"
        " is the range before equalization, joined to the range after it. v0 and v1 are the thresholds of the rule."
    )
    return _plot(figure, "plot-ranges", caption)


def limits_with_zero(values: Sequence[float]) -> tuple[float, float]:
    """Limits of an axis that shows zero and every value with its whole mark."""
    low, high = min(0.0, *values), max(0.0, *values)
    room = _MARK_ROOM * (high - low if high > low else 1.0)
    return low - room, high + room


def value_plot(panels: Sequence[Panel], values: Mapping[str, float], label: str, plot_id: str, caption: str) -> Plot:
    """One value for each layer, by block.

    Args:
        panels: Layers that all have a value.
        values: Path of a layer -> what is drawn.
        label: What the values are, with their unit.
        plot_id: Id of the picture.
        caption: What it shows.
    """
    figure, rows = _panel_figure(panels)
    for axes, panel in zip(rows, panels, strict=True):
        _draw_marks(axes, panel, values)
        axes.set_ylim(limits_with_zero([values[layer.path] for layer in panel.layers]))
        axes.set_ylabel(label)
    _legend(figure, panels, equalized=False)
    return _plot(figure, plot_id, caption)


def frontier_plot(left: Sequence[Points], right: Sequence[Points], labels: tuple[str, str, str], caption: str) -> Plot:
    """Two diagrams with one vertical axis: `labels` names both horizontal axes and the vertical one."""
    figure = _figure(_WIDTH, 3.2)
    for axes, lines, label in zip(figure.subplots(1, 2, sharey=True), (left, right), labels[:2], strict=True):
        for points, colour in zip(lines, (_STATIC, _LAE, _TOKEN), strict=False):
            style = {"marker": "*", "linestyle": "", "markersize": 9} if points.marked else {"marker": "."}
            axes.plot(points.x, points.y, color=colour, label=points.label, **style)
        axes.set_xlabel(label)
        _quiet(axes)
    figure.axes[0].set_ylabel(labels[2])
    figure.axes[0].legend(frameon=False, fontsize=_FONT)
    return _plot(figure, "plot-pareto", caption)


def bar_plot(names: Sequence[str], bars: Sequence[Bars], label: str, plot_id: str, caption: str) -> Plot:
    """Horizontal bars, those of one name below each other, each with its value beside it."""
    height = 0.8 / len(bars)
    figure = _figure(_WIDTH, 0.7 + 0.32 * len(names) * max(1.0, 0.75 * len(bars)))
    axes = figure.subplots()
    for index, (group, colour) in enumerate(zip(bars, (_STATIC, _LAE, _TOKEN), strict=False)):
        places = [place + (index - (len(bars) - 1) / 2) * height for place in range(len(names))]
        drawn = axes.barh(places, group.values, height * 0.85, color=colour, label=group.label)
        axes.bar_label(drawn, [f"{value:.4g}" for value in group.values], padding=3, color=_INK, fontsize=_FONT)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(label)
    if len(bars) > 1:
        figure.legend(loc="outside upper left", ncols=len(bars), frameon=False, fontsize=_FONT)
    _quiet(axes)
    return _plot(figure, plot_id, caption)


def _draw_ranges(axes: Axes, panel: Panel) -> None:
    """The range after equalization, or the only one; before it a hollow mark, joined by a line."""
    layers = dict(
        zip((layer.path for layer in panel.layers), zip(panel.places, panel.layers, strict=True), strict=True)
    )
    equalized = {path: found for path, found in layers.items() if found[1].after is not None}
    for tier, (_, colour, marker) in TIERS.items():
        found = [(place, layer) for place, layer in equalized.values() if layer.tier == tier]
        if found:
            places = [place for place, _ in found]
            before = [layer.before or 0.0 for _, layer in found]
            axes.vlines(places, before, [layer.after or 0.0 for _, layer in found], colors=colour, linewidth=1.0)
            axes.plot(places, before, marker, color=colour, markerfacecolor="none", markersize=4.5)
    _draw_marks(axes, panel, {path: _ranges(layer)[-1] for path, (_, layer) in layers.items()})


def _draw_marks(axes: Axes, panel: Panel, values: Mapping[str, float]) -> None:
    """One mark for each layer, in the colour and shape of its tier."""
    for tier, (_, colour, marker) in TIERS.items():
        found = [
            (place, values[layer.path])
            for place, layer in zip(panel.places, panel.layers, strict=True)
            if layer.tier == tier
        ]
        if found:
            places, heights = zip(*found, strict=True)
            axes.plot(places, heights, marker, color=colour, markersize=4.5)


def _log_scale(axes: Axes) -> None:
    """Powers of ten alone have labels: those between them would touch."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _ranges(layer: LayerFigures) -> list[float]:
    """What is drawn of a layer that has a range."""
    return [value for value in (layer.before, layer.after) if value is not None]


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panel_figure(panels: Sequence[Panel]) -> tuple[Figure, list[Axes]]:
    """A figure with one row a panel, and the blocks below each."""
    figure = _figure(_WIDTH, 0.5 + 1.75 * len(panels))
    rows: list[Axes] = list(figure.subplots(len(panels), 1, squeeze=False)[:, 0])
    blocks = sorted({place for panel in panels if panel.in_blocks for place in panel.places})
    for axes, panel in zip(rows, panels, strict=True):
        places = blocks if panel.in_blocks else sorted(set(panel.places))
        step = 1 if len(places) <= _MOST_LABELS else 5 if len(places) <= 5 * _MOST_LABELS else len(places) // 20
        axes.set_xticks(places[::step])
        if step > 1:
            axes.set_xticks(places, minor=True)
        axes.set_xlim(places[0] - 0.7, places[-1] + 0.7)
        axes.set_title(_wrapped(panel.title), loc="left", fontsize=_FONT + 1, color=_INK)
        _quiet(axes)
        if panel is panels[-1] or not panel.in_blocks:
            axes.set_xlabel("block" if panel.in_blocks else "layer, in the order of the policy table")
    return figure, rows


def _wrapped(title: str) -> str:
    """A title no longer than the axes."""
    return title if len(title) <= 110 else title[:109] + "…"


def _quiet(axes: Axes) -> None:
    """Axes without a frame, in the page's colours."""
    axes.patch.set_visible(False)
    axes.grid(axis="both", color=_LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(_LINE)
    axes.tick_params(which="both", colors=_INK, labelsize=_FONT)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(_INK)
        label.set_fontsize(_FONT)


def _legend(figure: Figure, panels: Sequence[Panel], *, equalized: bool) -> None:
    """What the marks of all panels mean, above them."""
    from matplotlib.lines import Line2D

    used = {layer.tier for panel in panels for layer in panel.layers}
    marks = [
        Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5, label=name)
        for tier, (name, colour, marker) in TIERS.items()
        if tier in used
    ]
    if equalized:
        hollow: dict[str, Any] = {"markerfacecolor": "none", "marker": "s", "linestyle": "", "markersize": 5}
        marks.append(Line2D([], [], color=_LAE, label="before equalization", **hollow))
    figure.legend(handles=marks, loc="outside upper left", ncols=len(marks), frameon=False, fontsize=_FONT)


def _plot(figure: Figure, plot_id: str, caption: str) -> Plot:
    import matplotlib

    settings: Any = {
        "svg.hashsalt": plot_id,
        "svg.fonttype": "none",  # text stays text: it can be searched and read aloud
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": _FONT,
        "text.color": _INK,
    }
    text = io.StringIO()
    with matplotlib.rc_context(settings):
        figure.patch.set_visible(False)
        for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)):
            for entry in legend.get_texts() if legend is not None else ():
                entry.set_color(_INK)
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Plot(plot_id, caption, _inline_svg(text.getvalue(), plot_id))


def _inline_svg(document: str, plot_id: str) -> str:
    """The `<svg>` element of matplotlib's document: no metadata, the page's colours, ids that start with the plot's."""
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\b(id="|xlink:href="#)', rf"\g<1>{plot_id}-", svg)
    svg = svg.replace("url(#", f"url(#{plot_id}-")
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for colour, variable in _COLOURS.items():
        svg = svg.replace(colour, variable)
    return svg
