"""The command line: its options, its help, and the `RunOptions` they make."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fptq_export import __version__
from fptq_export.cli.debug_arguments import DEBUG
from fptq_export.cli.diff_arguments import DIFF
from fptq_export.cli.doctor_arguments import DOCTOR
from fptq_export.cli.eval_arguments import EVAL
from fptq_export.cli.inspect_arguments import INSPECT
from fptq_export.cli.monitor_arguments import MONITOR
from fptq_export.cli.presets import values_of_preset
from fptq_export.cli.report_arguments import REPORT
from fptq_export.cli.road_arguments import DIRECTORY_VERBS, add_road_options
from fptq_export.cli.serve_arguments import SERVE
from fptq_export.cli.stats_arguments import STATS
from fptq_export.cli.triton_arguments import TRITON
from fptq_export.cli.validated import validated
from fptq_export.errors import UserError
from fptq_export.options import RunOptions
from fptq_export.package.manifest import read_manifest
from fptq_export.tasks import HALF_DIRECTORIES

__all__ = ["RUN_VERB", "TOOLS", "VERB_HELP", "options_from_namespace", "parser_for_cli", "verb_and_arguments"]

RUN_VERB = "run"
VERB_HELP = {
    RUN_VERB: "the whole road: model -> policy -> ONNX -> proof -> engine (this is the default verb)",
    "trace": "model -> model.onnx and sites.json",
    "calibrate": "model -> stats.safetensors and policy.json",
    "rewrite": "model.onnx and policy -> model.qdq.onnx and model.w4a8.onnx",
    "verify": "model.w4a8.onnx against the FP32 model -> verify.json",
    "checkpoint": "policy -> compressed-tensors checkpoint, for llm-compressor and vLLM",
    "build": "model.w4a8.onnx -> engine, with its layers checked against the policy",
}
"""The verbs of the road."""
TOOLS = {tool.verb: tool for tool in (EVAL, DIFF, DEBUG, STATS, REPORT, INSPECT, DOCTOR, MONITOR, SERVE, TRITON)}
"""The verbs beside the road."""

_EXAMPLES = """\
examples:
  fptq-export ./SmolLM2-135M --engine smollm2.plan
  fptq-export model.gguf -o run/ --engine out.plan --max-ppl-increase 20%
  fptq-export MODEL -o run/ --engine out.plan --preset accurate            more accurate, slower to make
  fptq-export MODEL -o run/ --target onnx --calib-dataset prompts.jsonl
  fptq-export MODEL -o run/ --precision 'down_proj$=w8a8' 'layers\\.0\\.=w4a16'
  fptq-export esm2/ --calib-dataset proteins.fasta --eval-text held-out.fasta --min-cosine 0.97
  fptq-export unet.onnx --calib-data inputs.npz -o run/ --engine out.plan  any ONNX model
  fptq-export t5/ -o run/ --engine t5.plan             run/encoder and run/decoder, t5.encoder.plan and t5.decoder.plan
  fptq-export MODEL -o run/ --policy run/policy.json --engine out.plan     replay an edited policy
  fptq-export checkpoint run/ --checkpoint out/ --checkpoint-per-token     for vLLM
  fptq-export MODEL -o run/ --policy auto --effective-bits 5               choose per layer under a budget
  fptq-export eval run/ --tasks piqa,arc_easy                              what quantization costs
  fptq-export debug run/                                                   which layer broke
  torchrun --nproc-per-node 4 -m fptq_export MODEL -o run/                 calibrate in four processes
  fptq-export build run/ --engine b8.plan --max-batch-size 8 --max-kv-len 4096
  fptq-export MODEL --engine out.plan --dry-run

exit codes:
  0 done    1 something you can mend    2 a bug of ours    3 less accurate than --max-ppl-increase allows
  4 a graph or engine would not run what the policy says    130 interrupted
"""


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage as a UserError, like every other mistake."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting with argparse's own code."""
        raise UserError(self.prog, message, f"see {self.prog} --help")


def parser_for_cli() -> argparse.ArgumentParser:
    """The parser; only options that are given appear in its namespace."""
    parser = _Parser(
        prog="fptq-export",
        description="Turn an LLM from Hugging Face into a TensorRT engine with FPTQ: INT4 weights, INT8 activations.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for verb, text in VERB_HELP.items():
        road = _add_verb(verbs, verb, text, _EXAMPLES)
        add_road_options(road, verb)
        other = _add_other_options(road)
        other.add_argument(
            "--dry-run", action="store_true", help="print what would be done, with sizes, and do nothing"
        )
        if verb == RUN_VERB:
            other.add_argument(
                "--report", action="store_true", help="write report.html and report.md at the end (fptq-export report)"
            )
    for tool in TOOLS.values():
        parser_of_tool = _add_verb(verbs, tool.verb, tool.help, tool.examples)
        tool.add_options(parser_of_tool)
        _add_other_options(parser_of_tool)
    return parser


def _add_verb(verbs: argparse._SubParsersAction[Any], verb: str, text: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        verb,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    return parser


def _add_other_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    other = parser.add_argument_group("other")
    other.add_argument("-v", "--verbose", action="store_true", help="show tracebacks and library warnings")
    return other


def verb_and_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """Split off the verb; a command line that starts with anything else is a `run`."""
    if arguments and (arguments[0] in VERB_HELP or arguments[0] in TOOLS):
        return arguments[0], arguments[1:]
    return RUN_VERB, arguments


def options_from_namespace(verb: str, given: Mapping[str, Any]) -> RunOptions:
    """Check the options of a command line.

    Verbs that take a run directory continue with the options in its manifest, others with those of `--preset`; what is
    given wins.

    Raises:
        UserError: The model, or the run directory, is missing; or there is no such preset.
        UserErrors: Every option with a value it does not take.
    """
    values = {name: value for name, value in given.items() if name in RunOptions.model_fields}
    if verb in DIRECTORY_VERBS:
        values = {**_options_of_earlier_run(verb, values), **values}
    if "preset" in given:
        values = {**values_of_preset(given["preset"]), **values}
    if "model" not in values:
        raise UserError("MODEL", "is missing", f"fptq-export {verb} MODEL -o DIR")
    values.setdefault("output", Path(f"{Path(values['model']).stem}-w4a8"))
    for name in {"exclude", "precision"} & given.keys():
        values[name] = tuple(pattern for pattern in given[name] if pattern)
    return validated(RunOptions, values, verb)


def _options_of_earlier_run(verb: str, values: Mapping[str, Any]) -> dict[str, Any]:
    if "output" not in values:
        raise UserError("DIR", "is missing", f"fptq-export {verb} DIR, with the directory of an earlier run")
    manifest = read_manifest(Path(values["output"]))
    if manifest is None:
        parts = [name for name in HALF_DIRECTORIES.values() if read_manifest(Path(values["output"]) / name) is not None]
        hint = (
            f"give one of its halves: {Path(values['output']) / parts[0]}"
            if parts
            else "run fptq-export MODEL -o there"
        )
        raise UserError(str(values["output"]), "is not a run directory (no manifest.json)", hint)
    earlier = manifest.options.model_dump()
    return {**earlier, "output": values["output"]}
