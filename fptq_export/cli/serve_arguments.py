"""The command line of `fptq-export serve`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from fptq_export.cli.tool import Tool
from fptq_export.cli.validated import validated
from fptq_export.errors import ExitCode, UserError
from fptq_export.serve.options import ServeOptions

__all__ = ["SERVE"]

_EXAMPLES = """\
examples:
  fptq-export serve run/                                     http://127.0.0.1:8000/v1, for OpenAI's clients
  fptq-export serve run/ --backend onnxruntime --threads 4   the portable graph, on the CPU
  fptq-export serve run/ --host 0.0.0.0 --api-key-file keys.txt
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "SmolLM2-135M-Instruct", "prompt": "The capital of France is", "max_tokens": 8}'

endpoints: /v1/completions, /v1/chat/completions, /v1/models; /health, /ready, /metrics (Prometheus), /openapi.json
signals:   SIGTERM and Ctrl-C finish the running texts and refuse new ones with status 503; a second one cancels them

needs a few libraries more: pip install 'fptq-export[serve]'

exit codes:
  0 stopped by a signal    1 something you can mend
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options; only those that are given appear in the namespace."""
    parser.add_argument("source", nargs="?", metavar="RUN", help="run directory, engine, or ONNX graph")
    parser.add_argument("--engine", metavar="FILE", help="another engine of the run [the last one built]")
    parser.add_argument(
        "--backend", metavar="NAME", help="auto, onnxruntime or tensorrt [auto: the engine where there is a GPU]"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of ONNX Runtime [every core]")
    group = parser.add_argument_group("server")
    group.add_argument("--host", metavar="ADDRESS", help="[127.0.0.1]")
    group.add_argument("--port", type=int, metavar="N", help="0 takes a free one [8000]")
    group.add_argument("--served-model-name", metavar="NAME", help="what requests call it [the exported model's name]")
    group.add_argument("--api-key-file", metavar="FILE", help="one key a line; requests must carry one [no key]")
    group.add_argument("--max-active", type=int, metavar="N", help="texts written at the same time [16]")
    group.add_argument("--max-queue", type=int, metavar="N", help="texts that wait; more get status 429 [256]")
    group.add_argument("--drain-timeout", type=float, metavar="SECONDS", help="for running texts after SIGTERM [25]")


def _options_from_namespace(given: Mapping[str, Any]) -> ServeOptions:
    """Check the options.

    Raises:
        UserError: RUN is missing.
        UserErrors: Every option with a value it does not take.
    """
    values = {name: value for name, value in given.items() if name in ServeOptions.model_fields}
    if not values.get("source"):
        raise UserError("RUN", "is missing", "fptq-export serve RUN, with the directory of an earlier run")
    return validated(ServeOptions, values, "serve")


def _run(given: Mapping[str, Any], command: str, console: Console) -> ExitCode:
    options = _options_from_namespace(given)
    from fptq_export.serve.run import run_serve

    plain = Console(highlight=False)

    def announce(url: str) -> None:
        plain.print(url, markup=False, soft_wrap=True)

    run_serve(options, console, announce, verbose=bool(given.get("verbose")))
    return ExitCode.OK


SERVE = Tool(
    verb="serve",
    help="an HTTP server for OpenAI's clients: completions and chats, streamed or whole",
    examples=_EXAMPLES,
    add_options=_add_options,
    run=_run,
)
