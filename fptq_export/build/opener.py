"""The process that opens an engine, or only imports TensorRT: what goes wrong there must not end the command.

Run as `python -m fptq_export.build.opener TARGET [ENGINE [PLUGIN_LIBRARY]]` by `open_engine`; prints one JSON object.
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

__all__ = ["main"]


def main(words: list[str]) -> int:
    """Do what the command line asks for and print the outcome."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what TensorRT prints must not stand in the answer
    outcome: dict[str, Any] = {"version": None, "opened": False, "layers": "", "errors": []}
    try:
        trt = tensorrt_for_target(Target(words[0]))
        outcome["version"] = str(trt.__version__)
        if len(words) > 1:
            _open(trt, Path(words[1]), Path(words[2]) if len(words) > 2 else None, outcome)
    except UserError as error:
        outcome["errors"].append(str(error))
    answers.write(json.dumps(outcome) + "\n")
    answers.flush()
    return 0


def _open(trt: Any, engine_path: Path, plugin: Path | None, outcome: dict[str, Any]) -> None:
    logger = logger_into(trt, outcome["errors"])
    runtime = trt.Runtime(logger)
    engine = deserialized_engine(trt, runtime, engine_path, plugin)
    if engine is None:
        return
    outcome["opened"] = True
    inspector = engine.create_engine_inspector()
    outcome["layers"] = inspector.get_engine_information(trt.LayerInformationFormat.ONELINE)


if __name__ == "__main__":
    # The answer is sent: a library that crashes while it is unloaded must not turn it into a failure.
    os._exit(main(sys.argv[1:]))
