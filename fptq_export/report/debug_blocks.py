"""What `debug` measured of each layer: error alone and behind all layers before it, faults, what float would regain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from fptq_export.debug.report import DebugReport, LayerReport
from fptq_export.report.blocks import Block, Cell, Column, Note, Notes, Table, Text
from fptq_export.report.layers import LayerFigures, panels_from_layers
from fptq_export.report.numbers import number, plural
from fptq_export.report.plots import value_plot

__all__ = ["debug_blocks"]

_ALONE = (
    "Signal power over error power of each layer's output, in dB, where the layer reads what it reads in the float"
    " model. Higher is better; 20 dB is an error of a tenth."
)
_ACCUMULATED = (
    "The same in the quantized graph, behind the errors of all layers before it, in dB. Where it falls from one block"
    " to the next, something broke there."
)


def debug_blocks(report: DebugReport, layers: tuple[LayerFigures, ...]) -> Iterator[Block]:
    """Faults first, then pictures and a row for each layer."""
    yield Text(
        f"Measured by '{report.command}' on {report.text} ({report.windows} x {report.window_tokens} tokens),"
        f" {plural(len(report.layers), 'layer')}."
    )
    faults = [
        Note("warning", f"{path}: {fault.message}")
        for path in report.bad_layers
        for fault in report.layers[path].faults
    ]
    yield Notes(tuple(faults)) if faults else Text("No layer is worse than the steps of its integers explain.")
    yield from _plot(report, layers, "plot-debug-alone", _ALONE, lambda layer: layer.fp_inputs.sqnr_db)
    yield from _plot(
        report,
        layers,
        "plot-debug-accumulated",
        _ACCUMULATED,
        lambda layer: layer.accumulated.sqnr_db if layer.accumulated is not None else None,
    )
    yield _table(report)


def _plot(
    report: DebugReport,
    layers: tuple[LayerFigures, ...],
    plot_id: str,
    caption: str,
    value_of: Callable[[LayerReport], float | None],
) -> Iterator[Block]:
    """A picture of the layers that have a finite value; none where no layer has."""
    values = {path: value for path, layer in report.layers.items() if _is_finite(value := value_of(layer))}
    drawn = tuple(layer for layer in layers if layer.path in values)
    if drawn:
        finite = {path: value for path, value in values.items() if value is not None}
        yield value_plot(panels_from_layers(drawn, of_inputs=False), finite, "SQNR, dB", plot_id, caption)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _table(report: DebugReport) -> Table:
    titles = (
        "output SQNR alone, dB",
        "accumulated, dB",
        "weight SQNR, dB",
        "saturated inputs, %",
        "perplexity with it in float",
    )
    columns = (Column("layer"), *(Column(title, numeric=True) for title in titles), Column("faults"))
    rows = tuple(
        (
            Cell(path),
            _db(layer.fp_inputs.sqnr_db),
            _db(layer.accumulated.sqnr_db if layer.accumulated is not None else None),
            _db(layer.weight_sqnr_db),
            number(100 * layer.saturated if layer.saturated is not None else None, ".3g"),
            number(layer.leave_one_out.perplexity if layer.leave_one_out is not None else None),
            Cell(", ".join(fault.kind for fault in layer.faults) or "–"),
        )
        for path, layer in report.layers.items()
    )
    return Table("table-debug", "Every layer that was measured", columns, rows)


def _db(value: float | None) -> Cell:
    """Decibel; `exact` where there is no error."""
    return Cell("exact") if value is not None and math.isinf(value) else number(value, ".1f")
