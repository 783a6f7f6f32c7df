"""The command line of `fptq-export monitor`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.errors import ExitCode, UserError
from fptq_export.monitor.options import MonitorOptions
from fptq_export.verify.report import ratio_from_option

__all__ = ["MONITOR"]

_EXAMPLES = """\
examples:
  fptq-export rewrite run/ --emit-range-outputs                a graph with the output range_monitor
  fptq-export monitor run/ monday.npz tuesday.npz              what production collected of it
  fptq-export monitor run/ values.jsonl --max-saturation 0.01% --max-drift 1.5 -o report/

files: .npy with [rows, 3] or [calls, rows, 3]; .npz with such arrays; .jsonl with a list of rows a line, or an
object with one under "range_monitor". Every value that was quantized counts, that of padding too.

exit codes:
  0 every layer within the thresholds    1 something you can mend    3 a layer beyond them: see monitor.json
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", metavar="DIR", help="run directory with range_outputs.json")
    parser.add_argument("values", nargs="*", metavar="VALUES", help=".npz, .npy or .jsonl files of the output")
    parser.add_argument("-o", "--output", metavar="DIR", help="where monitor.json goes [the run directory]")
    parser.add_argument("--max-saturation", metavar="SHARE", help="of a layer's values that may be clipped [0.1%%]")
    parser.add_argument(
        "--max-drift", type=float, metavar="X", help="largest |x|, in units of the largest in calibration [2]"
    )


def _options_from_namespace(given: Mapping[str, Any]) -> MonitorOptions:
    """Check the options.

    Raises:
        UserError: DIR or VALUES are missing.
        UserErrors: Every option with a value it does not take.
    """
    values = {name: value for name, value in given.items() if name in MonitorOptions.model_fields}
    if not values.get("source") or not values.get("values"):
        where = "VALUES" if values.get("source") else "DIR"
        raise UserError(where, "is missing", "fptq-export monitor DIR VALUES, with what was collected of the graph")
    if "max_saturation" in values:
        values["max_saturation"] = ratio_from_option(values["max_saturation"], "--max-saturation")
    return validated(MonitorOptions, values, "monitor")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    options = _options_from_namespace(given)
    from fptq_export.monitor.run import run_monitor
    from fptq_export.monitor.table import print_report
    from fptq_export.progress import ConsoleProgress

    report, path = run_monitor(options, command, ConsoleProgress(console))
    plain = Console(highlight=False)
    print_report(report, plain)
    plain.print(f"file: {path}", markup=False, soft_wrap=True)
    return ExitCode.ACCURACY_GATE if any(row.findings for row in report.rows) else ExitCode.OK


MONITOR = Tool(
    verb="monitor",
    help="collected range outputs against the policy: what saturates, what drifted -> monitor.json",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
