"""Looks at the machine and, where one is given, at an engine."""

from __future__ import annotations

from fptq_export import __version__
from fptq_export.doctor.machine import Machine, checks_of_machine, rows_from_machine
from fptq_export.doctor.plan import PlanQuestion, report_on_plan
from fptq_export.doctor.report import DoctorReport

__all__ = ["diagnose"]


def diagnose(machine: Machine, question: PlanQuestion | None = None) -> DoctorReport:
    """What the machine has, what is wrong with it, and whether an engine will load on it."""
    return DoctorReport(
        tool_version=__version__,
        machine=rows_from_machine(machine),
        checks=tuple(checks_of_machine(machine)),
        plan=report_on_plan(question, machine) if question is not None else None,
    )
