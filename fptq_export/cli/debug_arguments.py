"""The command line of `fptq-export debug`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.debug.options import DebugOptions
from fptq_export.errors import ExitCode, UserError

__all__ = ["DEBUG"]

_EXAMPLES = """\
examples:
  fptq-export debug run/                              which layer broke, and what each one costs
  fptq-export debug run/ --no-leave-one-out           faults alone, in a fraction of the time
  fptq-export debug run/ --text mine.txt --windows 4 --seq 256
  fptq-export debug run/ --cut model.layers.17.mlp.down_proj     that layer as an ONNX file, for polygraphy run

exit codes:
  0 every layer computes what its numerics predict, or a layer was cut out
  1 something you can mend    2 a bug of ours    3 a layer is bad: it is named, with the reason
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", metavar="DIR", help="directory of a finished run of a language model")
    parser.add_argument("-o", "--output", metavar="DIR", help="where debug.json goes [the run directory]")
    parser.add_argument("--text", metavar="DATA", help="builtin (held out), .txt, .jsonl, .npz or a data set [builtin]")
    parser.add_argument("--windows", type=int, metavar="N", help="windows of the text, one batch [1]")
    parser.add_argument("--seq", type=int, metavar="TOKENS", help="tokens in a window [128]")
    parser.add_argument(
        "--max-excess", type=float, metavar="DB", help="how far a layer's error may exceed what rounding predicts [6]"
    )
    parser.add_argument(
        "--no-leave-one-out",
        dest="leave_one_out",
        action="store_false",
        help="do not measure what the model gains with each layer in float",
    )
    parser.add_argument(
        "--cut", metavar="LAYER", help="write this layer alone, its real input and the float answer to DIR/cut/LAYER"
    )


def _options_from_namespace(given: Mapping[str, Any]) -> DebugOptions:
    """Check the options.

    Raises:
        UserError: DIR is missing.
        UserErrors: Every option with a value it does not take.
    """
    values = {name: value for name, value in given.items() if name in DebugOptions.model_fields}
    if "source" not in values:
        raise UserError("DIR", "is missing", "fptq-export debug DIR, with the directory of a finished run")
    return validated(DebugOptions, values, "debug")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    options = _options_from_namespace(given)
    from fptq_export.debug.cut import LEAST_COSINE
    from fptq_export.debug.run import run_cut, run_debug
    from fptq_export.debug.table import print_report
    from fptq_export.progress import ConsoleProgress

    plain = Console(highlight=False)
    if options.cut is not None:
        files = run_cut(options, ConsoleProgress(console))
        inputs = f"polygraphy run {files.graph} --onnxrt --load-inputs {files.inputs} --load-outputs {files.outputs}"
        compare = f"--compare cosine_similarity --cosine-similarity-threshold y:{LEAST_COSINE}"
        plain.print(f"{inputs} {compare}", markup=False, soft_wrap=True)
        return ExitCode.OK
    report, path = run_debug(options, command, console, ConsoleProgress(console))
    print_report(report, plain)
    plain.print(f"file: {path}", markup=False, soft_wrap=True)
    return ExitCode.ACCURACY_GATE if report.bad_layers else ExitCode.OK


DEBUG = Tool(
    verb="debug",
    help="which layer broke: float model against graph, block by block; leave-one-out; --cut LAYER -> debug.json",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
