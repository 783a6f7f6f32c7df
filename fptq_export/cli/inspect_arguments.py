"""The command line of `fptq-export inspect`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.errors import ExitCode, UserError

__all__ = ["INSPECT"]

_EXAMPLES = """\
examples:
  fptq-export inspect out.plan               what the engine runs, layer by layer, and how that is known
  fptq-export inspect out.plan --run run/    where its manifest is not beside it
  fptq-export inspect run/model.w4a8.onnx    inputs, operators, what is quantized how, forbidden patterns
  fptq-export inspect run/policy.json        what runs what, and what stays in float and why
  fptq-export inspect run/                   all of it, and whether its files are still those that were written
  fptq-export inspect FILE --json            for machines

exit codes:
  0 as it should be    1 cannot be read, or a file is not what was recorded
  4 a precision problem: a pattern that TensorRT builds into wrong numbers (model.qdq.onnx has it by design, and is not
    for TensorRT), or an engine that does not run what the policy beside it says
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", metavar="FILE", help="engine, .onnx, policy.json, proof.json or run directory"
    )
    parser.add_argument("--run", type=Path, metavar="DIR", help="run directory of an engine [looked for beside it]")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    if "file" not in given:
        raise UserError("FILE", "is missing", "fptq-export inspect FILE")
    from fptq_export.inspect.run import inspect_path
    from fptq_export.inspect.table import print_inspection

    inspection = inspect_path(Path(given["file"]), given.get("run"))
    plain = Console(highlight=False)
    if given.get("json"):
        plain.print(inspection.model_dump_json(indent=2), markup=False, soft_wrap=True)
    else:
        print_inspection(inspection, plain)
    if inspection.precision_problems:
        return ExitCode.PRECISION_PROOF
    return ExitCode.USER_ERROR if inspection.file_problems else ExitCode.OK


INSPECT = Tool(
    verb="inspect",
    help="an engine, ONNX graph, policy or run directory in words and tables: what runs in which precision",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
