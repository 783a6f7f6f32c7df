"""`stats.svg`: four diagrams over all inputs, in the order of the model."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fptq_export.activations.report import ActivationsReport, InputFigures
from fptq_export.files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_inputs"]

_BLOCK = re.compile(r"\.(\d+)\.")
"""The first number in a torch path is that of the block."""
_MOST_TICKS = 32
_SMALLEST = 1e-6
"""Where a logarithmic axis puts an input that is all zero."""


def plot_inputs(report: ActivationsReport, path: Path) -> None:
    """Draw magnitudes, histograms, held-out over calibrated range, and parts of calibration."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "fptq-export"}):  # the same report gives the same bytes
        figure = Figure(figsize=(11, 12), layout="constrained")
        magnitudes, histograms, ratios, parts = figure.subplots(
            4, 1, sharex=True, gridspec_kw={"height_ratios": (3, 3, 2, 2)}
        )
        _draw_magnitudes(magnitudes, report)
        _draw_histograms(histograms, report.inputs)
        _draw_ratios(ratios, report)
        _draw_parts(parts, report.inputs)
        places = _block_starts(report.inputs)
        parts.set_xticks([place for place, _ in places], [name for _, name in places])
        parts.set_xlabel("block, and in it the inputs of its linears")
        figure.suptitle(f"{report.model}: inputs of linears")
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    write_text(text.getvalue(), path)


def _draw_magnitudes(axes: Axes, report: ActivationsReport) -> None:
    inputs = report.inputs
    x = np.arange(len(inputs))
    for name, values, marker in (
        ("max, calibration", [figures.absmax for figures in inputs], "_"),
        ("max, held out", [figures.held_out_absmax for figures in inputs], "x"),
        ("99.9 %", [figures.p999 for figures in inputs], "."),
        ("median", [figures.median for figures in inputs], "."),
    ):
        axes.plot(x, np.maximum(values, _SMALLEST), marker, markersize=4, label=name)
    axes.set_yscale("log")
    for name, threshold in (("v0", report.v0), ("v1", report.v1)):
        if threshold > 0.0:
            axes.axhline(threshold, color="gray", linewidth=0.8, linestyle="--")
            axes.annotate(name, (1.0, threshold), xycoords=("axes fraction", "data"), xytext=(4, 0),
                          textcoords="offset points", va="center")  # fmt: skip
    axes.set_ylabel("|x|, no unit")
    axes.legend(ncols=4, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)


def _draw_histograms(axes: Axes, inputs: tuple[InputFigures, ...]) -> None:
    low = min(figures.histogram.exponent for figures in inputs if figures.absmax > 0.0)
    high = max(figures.histogram.exponent + len(figures.histogram.counts) for figures in inputs)
    shares = np.full((high - low, len(inputs)), np.nan)
    for column, figures in enumerate(inputs):
        start = figures.histogram.exponent - low
        counts = np.array(figures.histogram.counts, np.float64)
        if figures.absmax > 0.0:
            shares[start : start + counts.size, column] = np.where(counts > 0, counts / counts.sum(), np.nan)
    extent = (-0.5, len(inputs) - 0.5, low, high)
    image = axes.imshow(100.0 * shares, origin="lower", aspect="auto", extent=extent, norm="log", cmap="viridis")
    axes.set_ylabel("log2 |x|, calibration")
    axes.figure.colorbar(image, ax=axes, label="% of values", pad=0.04)


def _draw_ratios(axes: Axes, report: ActivationsReport) -> None:
    ratios = [np.nan if found.held_out_ratio is None else found.held_out_ratio for found in report.inputs]
    axes.plot(np.arange(len(ratios)), ratios, ".", label="static inputs")
    axes.axhline(1.0, color="gray", linewidth=0.8)
    axes.axhline(report.max_range_ratio, color="tab:red", linewidth=0.8, linestyle="--", label="warning")
    axes.set_ylabel("held-out max,\nx calibrated range")
    axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)


def _draw_parts(axes: Axes, inputs: tuple[InputFigures, ...]) -> None:
    grown = np.array([figures.part_absmax for figures in inputs], np.float64).T
    relative: NDArray[np.float64] = grown / np.maximum(grown.max(axis=0), _SMALLEST)
    extent = (-0.5, len(inputs) - 0.5, len(relative) + 0.5, 0.5)
    image = axes.imshow(100.0 * relative, aspect="auto", extent=extent, cmap="viridis", vmin=0.0, vmax=100.0)
    axes.set_yticks(range(1, len(relative) + 1))
    axes.set_ylabel("part of calibration")
    axes.figure.colorbar(image, ax=axes, label="max, % of the largest", pad=0.04)


def _block_starts(inputs: tuple[InputFigures, ...]) -> list[tuple[int, str]]:
    """Where each block begins and its number; every second, third, ... where they are too many."""
    starts: dict[str, int] = {}
    for place, figures in enumerate(inputs):
        found = _BLOCK.search(figures.linears[0])
        starts.setdefault(found[1] if found else figures.linears[0].rpartition(".")[2], place)
    step = -(-len(starts) // _MOST_TICKS)
    return [(place, name) for name, place in starts.items()][::step]
