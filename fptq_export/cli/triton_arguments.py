"""The command line of `fptq-export triton`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.errors import ExitCode, UserError
from fptq_export.triton.options import TritonOptions

__all__ = ["TRITON"]

_EXAMPLES = """\
examples:
  fptq-export triton run/ --repository models/ --variant cpu      ONNX Runtime, on any machine
  fptq-export triton run/ --repository models/ --name smollm2     the engine, and a text model that calls it
  fptq-export triton run/ --repository models/ --variant stateful where the run has --kv-cache static
  fptq-export triton run/ --repository models/ --version 7        the next free version by default
  models/start.sh                                                 tritonserver on that repository
  curl localhost:8000/v2/models/smollm2/generate_stream \\
    -d '{"text_input": "Once upon a time", "max_tokens": 32, "stream": true}'

variants:
  stateless   the text model carries the KV cache from call to call
  stateful    the server keeps it, in place, one buffer a sequence; needs a static cache
  cpu         the portable graph in the Python backend

exit codes:
  0 written    1 something you can mend; the repository is as it was
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", type=Path, metavar="DIR", help="run directory")
    parser.add_argument("--repository", type=Path, metavar="REPO", help="model repository, made or extended")
    parser.add_argument("--engine", type=Path, metavar="FILE", help="an engine of the run [the last one built]")
    parser.add_argument("--name", metavar="NAME", help="of the text model; the engine's is NAME-plan [DIR's name]")
    parser.add_argument("--variant", metavar="V", help="stateless, stateful or cpu [stateless]")
    parser.add_argument("--version", type=int, metavar="N", help="version of the models [the next free one]")
    serving = parser.add_argument_group("serving")
    numbers = {
        "keep_versions": "newest versions of the text model that stay loaded [1]",
        "instances": "execution contexts of the engine on each GPU [1]",
        "max_queue_delay": "microseconds a call waits for others of its shape [500]",
        "max_sequences": "sequences whose cache the server keeps, stateful [64]",
        "max_sequence_idle": "seconds until an idle sequence is forgotten, stateful [60]",
        "max_active": "texts written at once [16]",
        "max_queue": "texts that may wait; more are refused [256]",
        "threads": "threads of ONNX Runtime, cpu [all]",
    }
    for name, text in numbers.items():
        serving.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    values = {name: value for name, value in given.items() if name in TritonOptions.model_fields}
    for name, word in (("source", "DIR"), ("repository", "--repository")):
        if name not in values:
            raise UserError(word, "is missing", "fptq-export triton DIR --repository REPO")
    options = validated(TritonOptions, values, "triton")
    from fptq_export.triton.run import run_triton
    from fptq_export.triton.table import print_report

    print_report(run_triton(options, command), options.repository, Console(highlight=False))
    return ExitCode.OK


TRITON = Tool(
    verb="triton",
    help="a model repository for Triton Inference Server: the engine, and a model that streams text",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
