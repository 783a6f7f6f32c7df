"""The table of a diagnosis: a row a layer, then what is wrong with the bad ones."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from fptq_export.debug.report import DebugReport, LayerReport, Match

__all__ = ["print_report"]

_GIB = 1 << 30
_WIDTH = 150
"""Columns that the table needs: a path is not broken."""


def print_report(report: DebugReport, console: Console) -> None:
    """Print every layer, the faults, the first bad layer, time and memory."""
    table = Table(title=report.model, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    table.add_column("runs", no_wrap=True)
    for name in ("weight dB", "FP input dB", "expected dB", "in graph dB", "cosine", "saturated"):
        table.add_column(name, justify="right")
    with_gains = any(layer.leave_one_out is not None for layer in report.layers.values())
    if with_gains:
        table.add_column("ppl if float", justify="right")
        table.add_column("KL gain", justify="right")
    for path, layer in report.layers.items():
        table.add_row(path, *_cells(layer, with_gains), style="bold red" if layer.faults else None)
    Console(file=console.file, width=max(console.width, _WIDTH), highlight=False).print(table)
    _say(console, f"text: {report.text}")
    graph, kl = report.graph_perplexity, report.graph_kl
    found = "not finite" if graph is None else f"{graph.perplexity:.2f}"
    against = "" if kl is None else f", KL {kl:.4f} nats"
    _say(console, f"perplexity: float {report.float_perplexity.perplexity:.2f}, graph {found}{against}")
    _say(console, f"{report.seconds:.0f} s, peak {report.peak_memory_bytes / _GIB:.2f} GiB")
    for path in report.bad_layers:
        for fault in report.layers[path].faults:
            _say(console, f"{path}: {fault.kind}: {fault.message}")
    if report.bad_layers:
        _say(console, f"first bad layer: {report.bad_layers[0]} ({len(report.bad_layers)} bad)")
    else:
        _say(console, f"healthy: {len(report.layers)} layers, none bad")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _cells(layer: LayerReport, with_gains: bool) -> list[str]:
    accumulated = layer.accumulated or Match(sqnr_db=None, cosine=None)
    cells = [
        layer.runs,
        _number(layer.weight_sqnr_db, ".1f"),
        _number(layer.fp_inputs.sqnr_db, ".1f"),
        _number(layer.predicted_sqnr_db, ".1f"),
        _number(accumulated.sqnr_db, ".1f"),
        _number(accumulated.cosine, ".4f"),
        _number(layer.saturated, ".2%"),
    ]
    if with_gains:
        left_out = layer.leave_one_out
        cells += [_number(left_out.perplexity, ".2f"), _number(left_out.kl_gain, ".4f")] if left_out else ["-", "-"]
    return cells


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
