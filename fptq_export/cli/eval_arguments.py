"""The command line of `fptq-export eval`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.errors import ExitCode, UserError
from fptq_export.evaluate.options import EvalOptions

__all__ = ["EVAL"]

_EXAMPLES = """\
examples:
  fptq-export eval run/                                            held-out text, every system of the run
  fptq-export eval run/ --text mine.txt more.jsonl --eval-windows 0
  fptq-export eval run/ --tasks lambada_openai piqa arc_easy --limit 200
  fptq-export eval run/ --tasks my_task --task-path tasks/ --systems float,onnx --text ''
  fptq-export eval MODEL -o out/                                   one model, before it is quantized
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", metavar="DIR|MODEL", help="run directory, or a model as `run` takes it")
    parser.add_argument("-o", "--output", metavar="DIR", help="where eval.json goes [the run directory, or NAME-eval]")
    parser.add_argument(
        "--systems", metavar="LIST", help="float,fake-quant,onnx: which of them to run [all that DIR has]"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="seed of solved examples and data set order [0]")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    group = parser.add_argument_group("perplexity")
    group.add_argument(
        "--text",
        nargs="+",
        metavar="DATA",
        help="builtin (held out), .txt, .jsonl or .npz files, datasets ids (id:config@split); '' for none [builtin]",
    )
    group.add_argument("--eval-windows", type=int, metavar="N", help="windows of each text, in order; 0 for all [8]")
    group.add_argument("--eval-seq", type=int, metavar="TOKENS", help="tokens in a window [512]")
    group = parser.add_argument_group("tasks of lm-evaluation-harness (pip install 'fptq-export[eval]')")
    group.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks, groups or tags, e.g. piqa,arc_easy [none]")
    group.add_argument(
        "--task-path", metavar="DIR", help="your own task files (YAML); they may run Python code, so know them"
    )
    group.add_argument("--num-fewshot", type=int, metavar="N", help="solved examples before a question [the task's]")
    group.add_argument("--limit", type=int, metavar="N", help="documents of each task, for a quick look [all]")
    group.add_argument(
        "--max-length", type=int, metavar="TOKENS", help="longest input of a task [the model's limit, at most 2048]"
    )


def _options_from_namespace(given: Mapping[str, Any]) -> EvalOptions:
    """Check the options.

    Raises:
        UserError: DIR or MODEL is missing.
        UserErrors: Every option with a value it does not take.
    """
    values = {name: value for name, value in given.items() if name in EvalOptions.model_fields}
    if "source" not in values:
        raise UserError("DIR or MODEL", "is missing", "fptq-export eval DIR, with the directory of an earlier run")
    if "systems" in values:
        values["systems"] = _comma_separated([values["systems"]])
    if "tasks" in values:
        values["tasks"] = _comma_separated(values["tasks"])
    if "text" in values:
        values["text"] = tuple(dict.fromkeys(text for text in values["text"] if text))
    return validated(EvalOptions, values, "eval")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    options = _options_from_namespace(given)
    from fptq_export.evaluate.run import run_eval
    from fptq_export.evaluate.table import print_report
    from fptq_export.progress import ConsoleProgress

    report, path = run_eval(options, command, console, ConsoleProgress(console))
    plain = Console(highlight=False)
    print_report(report, plain)
    plain.print(f"file: {path}", markup=False, soft_wrap=True)
    return ExitCode.OK


def _comma_separated(words: list[str]) -> tuple[str, ...]:
    """`["a,b", "c"]` -> `("a", "b", "c")`, each once."""
    return tuple(dict.fromkeys(name.strip() for word in words for name in word.split(",") if name.strip()))


EVAL = Tool(
    verb="eval",
    help="perplexity and lm-eval tasks: FP32 model, fake quantization and ONNX side by side -> eval.json",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
