"""The table of what was written into a repository."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from fptq_export.triton.report import REPORT_FILE, TritonReport
from fptq_export.triton.start_script import START_SCRIPT

__all__ = ["print_report"]


def print_report(report: TritonReport, repository: Path, console: Console) -> None:
    """Print models and versions, what the server needs, and how to start it."""
    table = Table(title=f"{repository}: {report.variant}", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("model", "version", "backend", "files"):
        table.add_column(name, justify="right" if name == "version" else "left", overflow="fold")
    for model in report.models:
        table.add_row(model.name, str(model.version), model.backend, " ".join(model.files))
    console.print(table)
    for need in report.needs:
        console.print(f"needs: {need}", markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(f"start: {repository / START_SCRIPT}", markup=False, soft_wrap=True)
    console.print(f"file: {repository / REPORT_FILE}", markup=False, soft_wrap=True)
