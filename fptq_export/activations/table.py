"""What `fptq-export stats` prints: a row an input, warnings, and the distribution of layers on request."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from fptq_export.activations.report import ActivationsReport, HistogramFigures, InputFigures

__all__ = ["chosen_inputs", "print_inputs", "print_layer"]

_BAR_CHARACTERS = 40
_SHOWN_CHANNELS = 8


def chosen_inputs(report: ActivationsReport, pattern: str) -> tuple[InputFigures, ...]:
    """The inputs that a layer matching a regular expression reads."""
    search = re.compile(pattern).search
    return tuple(figures for figures in report.inputs if any(search(path) for path in figures.linears))


def print_inputs(report: ActivationsReport, console: Console) -> None:
    """Print the table of all inputs, then the warnings."""
    table = Table(title=f"{report.model}: inputs of linears, |x|", title_justify="left")
    common = _common_parent(report.inputs)
    table.add_column(f"read by {common}*", overflow="fold")
    for column in ("tier", "median", "99.9 %", "max", "held out", "x range", "outliers"):
        table.add_column(column, justify="right")
    for figures in report.inputs:
        table.add_row(
            _short(figures.linears).removeprefix(common),
            figures.activation or "",
            f"{figures.median:.3g}",
            f"{figures.p999:.3g}",
            f"{figures.absmax:.4g}",
            f"{figures.held_out_absmax:.4g}",
            "" if figures.held_out_ratio is None else f"{figures.held_out_ratio:.2f}",
            str(len(figures.outlier_channels)) if figures.outlier_channels else "",
            style="yellow" if figures.warnings else None,
        )
    console.print(table)
    console.print(f"calibration: {report.calibration.description}", markup=False)
    console.print(f"held out: {report.held_out.description}", markup=False)
    for figures in report.suspicious:
        for warning in figures.warnings:
            console.print(
                f"warning: {_short(figures.linears)}: {warning}", style="yellow", markup=False, soft_wrap=True
            )
    if report.suspicious:
        static = sum(figures.static_range is not None for figures in report.inputs)
        console.print(
            f"{len(report.suspicious)} of {static} static ranges do not cover what the model reads: calibrate on text"
            " like that of production (--calib-dataset), on more of it (--calib-size), or make these layers per-token"
            " (--v0, --v1, or \"activation\" in policy.json).",
            markup=False,
            soft_wrap=True,
        )  # fmt: skip


def _short(paths: tuple[str, ...]) -> str:
    """`a.b.q, k, v` for linears of one parent."""
    parent = paths[0].rpartition(".")[0]
    if all(path.rpartition(".")[0] == parent for path in paths):
        return ", ".join((paths[0], *(path.rpartition(".")[2] for path in paths[1:])))
    return ", ".join(paths)


def _common_parent(inputs: tuple[InputFigures, ...]) -> str:
    """`model.layers.`, where all paths start with it; empty where they have nothing in common."""
    parents = (path.split(".")[:-1] for figures in inputs for path in figures.linears)
    same = itertools.takewhile(lambda words: len(set(words)) == 1, zip(*parents, strict=False))
    return "".join(f"{words[0]}." for words in same)


def print_layer(figures: InputFigures, console: Console) -> None:
    """Print one input: magnitudes by powers of two, parts, and its largest channels."""
    table = Table(title=_short(figures.linears), title_justify="left")
    for column, justify in (("|x| below", "right"), ("calibration", "left"), ("held out", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type] # a literal of rich's
    calibration, held_out = dict(_shares(figures.histogram)), dict(_shares(figures.held_out_histogram))
    for octave in sorted(calibration.keys() | held_out.keys(), reverse=True):
        table.add_row(f"{2.0**octave:.4g}", _bar(calibration.get(octave, 0.0)), _bar(held_out.get(octave, 0.0)))
    console.print(table)
    console.print("largest magnitude of each part: " + ", ".join(f"{value:.4g}" for value in figures.part_absmax))
    if figures.outlier_channels:
        shown = ", ".join(str(channel) for channel in figures.outlier_channels[:_SHOWN_CHANNELS])
        more = len(figures.outlier_channels) - _SHOWN_CHANNELS
        rest = f" and {more} more" if more > 0 else ""
        console.print(f"outlier channels, largest first: {shown}{rest} (half of the channels stay below"
                      f" {figures.channel_median:.4g})")  # fmt: skip


def _shares(histogram: HistogramFigures) -> Iterator[tuple[int, float]]:
    """Exponent of the end of each octave that holds anything, and its share of all magnitudes."""
    total = sum(histogram.counts)
    for index, count in enumerate(histogram.counts):
        if count:
            yield histogram.exponent + index + 1, count / total


def _bar(share: float) -> str:
    if share == 0.0:
        return ""
    return f"{'█' * round(_BAR_CHARACTERS * share)}▏ {100 * share:.2g} %"
