"""The text model of the engine variants: it calls the engine's model in the same server, token by token."""

from __future__ import annotations

from typing import Any

from fptq_export.files import read_json_model
from fptq_export.runtime import Session
from fptq_export.runtime.limits import Limits
from fptq_export.runtime.text import tokenizer_from_directory
from fptq_export.triton.serving.called_plan import CALLED_PLAN_FILE, CalledPlan
from fptq_export.triton.serving.plan_session import PlanSession
from fptq_export.triton.serving.text_model import ServedVersion, TextModel

__all__ = ["TritonPythonModel"]


class TritonPythonModel(TextModel):
    """The version's directory holds the tokenizer and `plan.json`."""

    workers = 16
    """Calls that wait for the engine at once, so that the server can batch those of one shape."""

    def open_session(self, version: ServedVersion, backend: Any) -> Session:
        """The engine's model of the same version."""
        plan = read_json_model(version.directory / CALLED_PLAN_FILE, CalledPlan)
        limits = Limits(plan.facts.max_input_len, plan.facts.max_kv_len, max(1, plan.facts.max_batch_size))
        model = PlanSession(backend, plan, version.version)
        return Session(model, tokenizer_from_directory(version.directory), limits, backend="tensorrt")
