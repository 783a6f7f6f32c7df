"""Prints what `doctor` found."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fptq_export.doctor.report import Check, DoctorReport

__all__ = ["print_doctor"]

_STYLES = {"ok": "green", "note": "dim", "unknown": "yellow", "problem": "bold red"}


def print_doctor(report: DoctorReport, console: Console) -> None:
    """The machine, then the engine, then the verdict."""
    table = Table("what", "value", title=f"fptq-export {report.tool_version} on this machine", title_justify="left")
    for what, value in report.machine.items():
        table.add_row(what, escape(value))
    console.print(table)
    if report.checks:
        console.print(_checks("what to know about it", report.checks))
    if report.plan is not None:
        console.print(_checks(report.plan.path, report.plan.checks))
        console.print(f"Will it load? {report.plan.verdict}", markup=False, soft_wrap=True)
    elif report.is_healthy:
        console.print("nothing is wrong")


def _checks(title: str, checks: Iterable[Check]) -> Table:
    table = Table("what", "is", "why", "next step", title=escape(title), title_justify="left")
    for check in checks:
        style = _STYLES[check.status]
        table.add_row(check.what, f"[{style}]{check.status}[/{style}]", escape(check.text), escape(check.fix))
    return table
