"""The process that opens an engine, or only imports TensorRT: what goes wrong there must not end the command.

Run as `python -m fptq_export.build.opener TARGET [ENGINE [PLUGIN_LIBRARY]] [--host-code]` by `open_engine`; prints one
JSON object.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fptq_export.build.deserialize import deserialized_engine, logger_into
from fptq_export.build.targets import Target
from fptq_export.build.tensorrt import tensorrt_for_target
from fptq_export.errors import UserError

__all__ = ["HOST_CODE", "main"]

HOST_CODE = "--host-code"
"""The engine may bring code that runs in this process."""


def main(words: list[str]) -> int:
    """Do what the command line asks for and print the outcome."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what TensorRT prints must not stand in the answer
    outcome: dict[str, Any] = {"version": None, "opened": False, "layers": "", "errors": []}
    target, *files = [word for word in words if word != HOST_CODE]
    try:
        trt = tensorrt_for_target(Target(target))
        outcome["version"] = str(trt.__version__)
        if files:
            _open(trt, [Path(file) for file in files], outcome, host_code=HOST_CODE in words)
    except UserError as error:
        outcome["errors"].append(str(error))
    answers.write(json.dumps(outcome) + "\n")
    answers.flush()
    return 0


def _open(trt: Any, files: list[Path], outcome: dict[str, Any], *, host_code: bool) -> None:
    logger = logger_into(trt, outcome["errors"])
    runtime = trt.Runtime(logger)
    plugin = files[1] if len(files) > 1 else None
    engine = deserialized_engine(trt, runtime, files[0], plugin, host_code=host_code)
    if engine is None:
        return
    outcome["opened"] = True
    inspector = engine.create_engine_inspector()
    outcome["layers"] = inspector.get_engine_information(trt.LayerInformationFormat.ONELINE)


if __name__ == "__main__":
    # The answer is sent: a library that crashes while it is unloaded must not turn it into a failure.
    os._exit(main(sys.argv[1:]))
