"""The command line of `fptq-export triton`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.errors import ExitCode, Problem, UserError, UserErrors
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.router_options import RouterOptions

__all__ = ["TRITON"]

OptionsT = TypeVar("OptionsT", TritonOptions, RouterOptions)

_EXAMPLES = """\
examples:
  fptq-export triton run/ --repository models/ --variant cpu      ONNX Runtime, on any machine
  fptq-export triton run/ --repository models/ --name smollm2     the engine, and a text model that calls it
  fptq-export triton run/ --repository models/ --variant stateful where the run has --kv-cache static
  fptq-export triton run/ --repository models/ --version 7        the next free version by default
  models/start.sh                                                 tritonserver on that repository
  curl localhost:8000/v2/models/smollm2/generate_stream \\
    -d '{"text_input": "Once upon a time", "max_tokens": 32, "stream": true}'

  fptq-export triton run/ --repository models/ --variant cpu --graph float --name smollm2-fp16
  fptq-export triton --repository models/ --router chat --route smollm2=90 --route smollm2-fp16=10 \\
    --shadow smollm2-fp16 --comparison-log comparison.jsonl     a canary, and what it would have said

variants:
  stateless   the text model carries the KV cache from call to call
  stateful    the server keeps it, in place, one buffer a sequence; needs a static cache
  cpu         the portable graph in the Python backend

exit codes:
  0 written    1 something you can mend; the repository is as it was
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", metavar="DIR", help="run directory")
    parser.add_argument("--repository", type=Path, metavar="REPO", help="model repository, made or extended")
    parser.add_argument("--engine", type=Path, metavar="FILE", help="an engine of the run [the last one built]")
    parser.add_argument("--name", metavar="NAME", help="of the text model; the engine's is NAME-plan [DIR's name]")
    parser.add_argument("--variant", metavar="V", help="stateless, stateful or cpu [stateless]")
    parser.add_argument("--graph", metavar="G", help="w4a8, or float: the model before quantization; cpu [w4a8]")
    parser.add_argument("--version", type=int, metavar="N", help="version of the models [the next free one]")
    serving = parser.add_argument_group("serving")
    numbers = {
        "keep_versions": "newest versions of the text model that stay loaded [1]",
        "instances": "execution contexts of the engine on each GPU [1]",
        "max_queue_delay": "microseconds a call waits for others of its shape [500]",
        "max_sequences": "sequences whose cache the server keeps, stateful [64]",
        "max_sequence_idle": "seconds until an idle sequence is forgotten, stateful [60]",
        "max_active": "texts written at once [16]; of a router, requests on their way [64]",
        "max_queue": "texts that may wait; more are refused [256]",
        "threads": "threads of ONNX Runtime, cpu [all]",
    }
    for name, text in numbers.items():
        serving.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    router = parser.add_argument_group("router: a model that has others answer (no DIR)")
    router.add_argument("--router", metavar="NAME", help="its name")
    router.add_argument("--route", action="append", metavar="MODEL=SHARE", help="a text model and its share; repeat it")
    router.add_argument("--shadow", metavar="MODEL", help="gets every request too; its answers go to the log alone")
    router.add_argument("--comparison-log", type=Path, metavar="FILE", help="a JSON line for each request")
    router.add_argument("--log-texts", action="store_true", help="with prompts and answers [without]")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    if "repository" not in given:
        raise UserError("--repository", "is missing", "fptq-export triton DIR --repository REPO")
    from fptq_export.triton.run import run_router, run_triton
    from fptq_export.triton.table import print_report

    if "router" in given:
        report = run_router(_options(RouterOptions, given), command)
    else:
        if "source" not in given:
            raise UserError("DIR", "is missing", "fptq-export triton DIR --repository REPO")
        report = run_triton(_options(TritonOptions, given), command)
    print_report(report, given["repository"], Console(highlight=False))
    return ExitCode.OK


def _options(model: type[OptionsT], given: Mapping[str, Any]) -> OptionsT:
    """Options of one of the two forms.

    Raises:
        UserErrors: Options of the other form, and values that are not taken.
    """
    names = {*TritonOptions.model_fields, *RouterOptions.model_fields}
    values = {name: value for name, value in given.items() if name in names}
    strange = sorted(values.keys() - model.model_fields.keys())
    if strange:
        kind = "a router" if model is RouterOptions else "a run; it needs --router"
        problems = [Problem(f"--{name.replace('_', '-')}", f"is no option of {kind}") for name in strange]
        raise UserErrors("options", problems, "see fptq-export triton --help")
    return validated(model, values, "triton")


TRITON = Tool(
    verb="triton",
    help="a model repository for Triton Inference Server: the engine, and a model that streams text",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
