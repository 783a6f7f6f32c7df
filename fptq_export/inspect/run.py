"""Finds out what a file is, and has it looked at."""

from __future__ import annotations

import json
from pathlib import Path

from fptq_export.errors import UserError
from fptq_export.inspect.engine_file import inspect_engine, inspect_proof
from fptq_export.inspect.onnx_file import inspect_onnx
from fptq_export.inspect.policy_file import inspect_policy
from fptq_export.inspect.report import Inspection
from fptq_export.inspect.run_directory import inspect_run
from fptq_export.package.manifest import MANIFEST_FILE

__all__ = ["inspect_path"]


def inspect_path(path: Path, run: Path | None = None) -> Inspection:
    """Look at a run directory, an ONNX graph, `policy.json`, `proof.json` or an engine.

    Args:
        path: What to look at.
        run: Run directory of an engine; None looks beside it.

    Raises:
        UserError: It is not there, or none of these.
    """
    if path.is_dir():
        return inspect_run(path)
    if not path.is_file():
        raise UserError(str(path), "no such file or directory", "give an engine, .onnx, policy.json or a run directory")
    if path.name == MANIFEST_FILE:
        return inspect_run(path.parent)
    if path.suffix == ".onnx":
        return inspect_onnx(path)
    if path.suffix == ".json":
        return inspect_proof(path) if _is_proof(path) else inspect_policy(path)
    return inspect_engine(path, run)


def _is_proof(path: Path) -> bool:
    """Whether a JSON file has the fields of a proof; what is no JSON is left to those that read policies."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return False
    return isinstance(data, dict) and {"source", "expected", "limits"} <= data.keys()
