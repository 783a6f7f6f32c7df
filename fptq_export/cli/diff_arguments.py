"""The command line of `fptq-export diff`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.diff.options import CANDIDATES, DiffOptions
from fptq_export.errors import ExitCode, UserError

__all__ = ["DIFF"]

_EXAMPLES = """\
examples:
  fptq-export diff run/                                    every candidate that the run and this machine have
  fptq-export diff run/ --text mine.txt --eval-windows 16 --decode-steps 64
  fptq-export diff run/ --systems onnx --max-kl 0.1 --min-top1 0.9 --max-ppl-increase 5%
  fptq-export diff run/ --save-io io/                      then repeat it with Polygraphy or trtexec:
    polygraphy run run/model.w4a8.onnx --onnxrt --load-inputs io/decode/inputs.json \\
      --load-outputs io/decode/outputs.json --compare cosine_similarity
    cd io/decode && trtexec --loadEngine=../../out.plan $(cat trtexec.args) --accuracyAlgorithm=cos \\
      --accuracyThreshold=0.05

exit codes:
  0 done    1 something you can mend    2 a bug of ours    3 beyond one of the thresholds
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", metavar="DIR", help="run directory")
    parser.add_argument("-o", "--output", metavar="DIR", help="where diff.json goes [the run directory]")
    parser.add_argument(
        "--systems", metavar="LIST", help=f"{','.join(CANDIDATES)}: what is compared [all that there is]"
    )
    parser.add_argument("--reference", metavar="DTYPE", help="torch model it is compared with: fp32 or fp16 [fp32]")
    parser.add_argument("--engine", metavar="FILE", help="TensorRT engine [the run's]")
    parser.add_argument("--save-io", metavar="DIR", help="write inputs and reference logits for Polygraphy and trtexec")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group = parser.add_argument_group("text")
    group.add_argument(
        "--text",
        metavar="DATA",
        help="builtin (held out), a .txt, .jsonl or .npz file, a datasets id (id:config@split) [builtin]",
    )
    group.add_argument("--eval-windows", type=int, metavar="N", help="windows of it, in order; 0 for all [4]")
    group.add_argument("--eval-seq", type=int, metavar="TOKENS", help="tokens in a window [256]")
    group.add_argument("--decode-steps", type=int, metavar="N", help="steps with the cache carried, a window [16]")
    group.add_argument("--seed", type=int, metavar="N", help="data set order [0]")
    group = parser.add_argument_group("thresholds; a candidate beyond one ends the command with exit code 3")
    group.add_argument("--max-ppl-increase", metavar="RATIO", help="3%% or 0.03, of the windows [any]")
    group.add_argument("--max-kl", type=float, metavar="NATS", help="mean KL, of windows and of decode steps [any]")
    group.add_argument("--min-cosine", type=float, metavar="C", help="mean cosine of logits, likewise [any]")
    group.add_argument("--min-psnr", type=float, metavar="DB", help="mean PSNR of logits, likewise [any]")
    group.add_argument("--min-top1", type=float, metavar="SHARE", help="top-1 agreement, 0 to 1, likewise [any]")


def _options_from_namespace(given: Mapping[str, Any]) -> DiffOptions:
    """Check the options.

    Raises:
        UserError: DIR is missing.
        UserErrors: Every option with a value it does not take.
    """
    values = {name: value for name, value in given.items() if name in DiffOptions.model_fields}
    if "source" not in values:
        raise UserError("DIR", "is missing", "fptq-export diff DIR, with the directory of an earlier run")
    if "systems" in values:
        names = (name.strip() for name in values["systems"].split(","))
        values["systems"] = tuple(dict.fromkeys(name for name in names if name))
    return validated(DiffOptions, values, "diff")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    options = _options_from_namespace(given)
    from fptq_export.diff.report import gate_thresholds
    from fptq_export.diff.run import run_diff
    from fptq_export.diff.table import print_report
    from fptq_export.progress import ConsoleProgress

    report, path = run_diff(options, command, ConsoleProgress(console))
    plain = Console(highlight=False)
    print_report(report, plain)
    plain.print(f"file: {path}", markup=False, soft_wrap=True)
    gate_thresholds(report)
    return ExitCode.OK


DIFF = Tool(
    verb="diff",
    help="logits and texts of the quantized forms against the float model, with the KV cache carried -> diff.json",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
