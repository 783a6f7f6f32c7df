"""The table of a monitor report."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from fptq_export.monitor.report import MonitorReport, RowFigures
from fptq_export.range_outputs import name_of_layers

__all__ = ["print_report"]

_LARGEST = 5
"""Rows without a finding that are shown: those nearest to one."""


def print_report(report: MonitorReport, console: Console) -> None:
    """Print the rows with findings, the nearest of the others, and what to do."""
    found = [row for row in report.rows if row.findings]
    quiet = sorted((row for row in report.rows if not row.findings), key=_distance, reverse=True)
    title = f"{report.model}: {len(report.rows)} static quantizations, {report.calls} calls"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("layers", overflow="fold")
    for name in ("clipped", "worst call", "x calib."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("found")
    for row in (*sorted(found, key=_distance, reverse=True), *quiet[:_LARGEST]):
        table.add_row(*_cells(row))
    console.print(table)
    if len(quiet) > _LARGEST:
        console.print(f"{len(quiet) - _LARGEST} more without a finding are in the file")
    limits = f"more than {report.max_saturation:.3%} clipped, or {report.max_drift:g} x calibration"
    console.print(f"{len(found)} beyond the thresholds ({limits})", markup=False)
    for hint in report.hints:
        console.print(f"-> {hint}", markup=False)


def _distance(row: RowFigures) -> tuple[float, float]:
    return row.saturation_rate, row.drift if row.drift is not None else 0.0


def _cells(row: RowFigures) -> Iterable[str]:
    yield name_of_layers(tuple(row.layers))
    yield f"{row.saturation_rate:.4%}"
    yield f"{row.worst_call:.4%}"
    yield "" if row.drift is None else f"{row.drift:.3g}"
    yield "expert:\nnot judged" if row.expert is not None else "\n".join(row.findings).replace("_", " ")
