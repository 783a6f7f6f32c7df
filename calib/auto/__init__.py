"""`--policy auto`: per linear, the candidate of least harm under a budget."""

from __future__ import annotations

from calib.auto.decision import AutoDecision, AutoOptions, decide_auto
from calib.auto.measure import Measured
from calib.auto.plot import can_plot, plot_report
from calib.auto.report import AutoReport, read_auto_report, write_auto_report

__all__ = [
    "AutoDecision",
    "AutoOptions",
    "AutoReport",
    "Measured",
    "can_plot",
    "decide_auto",
    "plot_report",
    "read_auto_report",
    "write_auto_report",
]
