"""The command line of `fptq-export stats`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fptq_export.activations.options import StatsOptions
from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.errors import ExitCode, UserError

__all__ = ["STATS"]

_EXAMPLES = """\
examples:
  fptq-export stats run/                                   the run's calibration text against held-out text
  fptq-export stats run/ --text production.jsonl           against what the model will read
  fptq-export stats run/ --layer 'layers\\.0\\..*q_proj'      one layer: histogram, parts, outlier channels
  fptq-export stats MODEL -o out/ --calib-size 16          before anything is quantized
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="DIR|MODEL", help="run directory, or a model as `run` takes it")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="where stats.json and stats.svg go [the run directory, or NAME-stats]"
    )
    parser.add_argument("--layer", metavar="REGEX", help="show the layers that match one by one")
    parser.add_argument(
        "--max-range-ratio", type=float, metavar="X", help="warn above this many times the calibrated range [1.2]"
    )
    parser.add_argument(
        "--plot", action=argparse.BooleanOptionalAction, help="draw stats.svg, where matplotlib is installed [yes]"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group = parser.add_argument_group("calibration text [the run's]")
    group.add_argument("--calib-dataset", metavar="DATA", help="builtin, random, a file, or a datasets id")
    group.add_argument("--calib-size", type=int, metavar="N", help="windows")
    group.add_argument("--calib-seq", type=int, metavar="TOKENS", help="tokens in a window")
    group.add_argument("--parts", type=int, metavar="N", help="parts, to see whether ranges still grow [4]")
    group.add_argument("--seed", type=int, metavar="N", help="of the draw, for a model alone [0]")
    group = parser.add_argument_group("held-out text")
    group.add_argument("--text", metavar="DATA", help="builtin (held out), .txt, .jsonl or .npz file, datasets id")
    group.add_argument("--eval-windows", type=int, metavar="N", help="windows, in order [16]")
    group.add_argument("--eval-seq", type=int, metavar="TOKENS", help="tokens in a window [512]")


def _options_from_namespace(given: Mapping[str, Any]) -> StatsOptions:
    values = {name: value for name, value in given.items() if name in StatsOptions.model_fields}
    if "source" not in values:
        raise UserError("DIR or MODEL", "is missing", "fptq-export stats DIR, with the directory of an earlier run")
    return validated(StatsOptions, values, "stats")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    options = _options_from_namespace(given)
    from fptq_export.activations.run import run_stats
    from fptq_export.activations.table import chosen_inputs, print_inputs, print_layer
    from fptq_export.progress import ConsoleProgress

    report, path, drawn = run_stats(options, command, ConsoleProgress(console))
    plain = Console(highlight=False)
    if options.layer is None:
        print_inputs(report, plain)
    else:
        for figures in chosen_inputs(report, options.layer):
            print_layer(figures, plain)
    plain.print(f"file: {path}", markup=False, soft_wrap=True)
    if drawn is not None:
        plain.print(f"file: {drawn}", markup=False, soft_wrap=True)
    elif options.plot:
        console.print("no picture: matplotlib is missing (pip install 'fptq-export[plot]')")
    return ExitCode.OK


STATS = Tool(
    verb="stats",
    help="what every layer reads, in calibration and on held-out text: is calibration representative? -> stats.json",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
