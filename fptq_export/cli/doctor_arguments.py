"""The command line of `fptq-export doctor`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.errors import ExitCode, UserError

__all__ = ["DOCTOR"]

_EXAMPLES = """\
examples:
  fptq-export doctor                                      this machine: GPUs, TensorRT, plugin, ONNX Runtime
  fptq-export doctor out.plan                             will it load here? if not, why, and what to do
  fptq-export doctor out.plan --run run/                  where the manifest is not beside the engine
  fptq-export doctor out.plan --compute-capability 8.9    would it load on a GPU like this?
  fptq-export doctor out.plan --json                      for machines

exit codes:
  0 it will load, or nothing is wrong    1 it will not, or something is
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", nargs="?", metavar="ENGINE", help="an engine file")
    parser.add_argument("--run", type=Path, metavar="DIR", help="its run directory [looked for beside the engine]")
    parser.add_argument(
        "--compute-capability", metavar="CC", help="judge for a GPU like this, e.g. 8.9 [the GPUs of this machine]"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    wanted = given.get("compute_capability")
    if wanted is not None and re.fullmatch(r"\d+\.\d", wanted) is None:
        cause = f"{wanted!r} is not of the form major.minor"
        raise UserError("--compute-capability", cause, "write it like 8.9")
    if "engine" not in given and (wanted is not None or "run" in given):
        raise UserError("ENGINE", "is missing", "fptq-export doctor ENGINE --run DIR")
    from fptq_export.doctor.machine import machine_of_here
    from fptq_export.doctor.plan import PlanQuestion
    from fptq_export.doctor.run import diagnose
    from fptq_export.doctor.table import print_doctor

    question = PlanQuestion(Path(given["engine"]), given.get("run"), wanted) if "engine" in given else None
    report = diagnose(machine_of_here(), question)
    plain = Console(highlight=False)
    if given.get("json"):
        plain.print(report.model_dump_json(indent=2), markup=False, soft_wrap=True)
    else:
        print_doctor(report, plain)
    return ExitCode.OK if report.is_healthy else ExitCode.USER_ERROR


DOCTOR = Tool(
    verb="doctor",
    help="this machine, and whether an engine will load on it: if not, why, and what to do",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
