"""The command line of `fptq-export report`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.errors import ExitCode, UserError

__all__ = ["REPORT"]

_EXAMPLES = """\
examples:
  fptq-export report run/                           run/report.html and run/report.md
  fptq-export report run/ -o reports/
  fptq-export report run/ --cost-table measured.json    with decode times measured on your GPU
  fptq-export MODEL -o run/ --report                the same at the end of a run

needs matplotlib and jinja2: pip install 'fptq-export[report]'
exit codes: 0 written   1 something you can mend
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", metavar="DIR", help="run directory, or the one above both halves")
    parser.add_argument("-o", "--output", metavar="DIR", help="where report.html and report.md go [the run directory]")
    parser.add_argument(
        "--cost-table", metavar="FILE", help="decode times that were measured, JSON [the run's, if it has one]"
    )


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    if "source" not in given:
        raise UserError("DIR", "is missing", "fptq-export report DIR, with the directory of an earlier run")
    from fptq_export.progress import ConsoleProgress
    from fptq_export.report.run import run_report

    output, table = (Path(given[name]) if name in given else None for name in ("output", "cost_table"))
    plain = Console(highlight=False)
    for files in run_report(Path(given["source"]), output, table, ConsoleProgress(console)):
        plain.print(f"file: {files.html}\nfile: {files.markdown}", markup=False, soft_wrap=True)
    return ExitCode.OK


REPORT = Tool(
    verb="report",
    help="one page about a run: accuracy, policy, ranges, size, proof, warnings -> report.html, report.md",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
