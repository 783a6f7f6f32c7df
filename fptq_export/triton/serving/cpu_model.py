"""The text model of the CPU variant: ONNX Runtime on the portable graph beside `model.py`."""

from __future__ import annotations

from typing import Any

from fptq_export.runtime import Session
from fptq_export.triton.serving.text_model import ServedVersion, TextModel
from fptq_export.triton.text_config import parameter_of

__all__ = ["TritonPythonModel"]


class TritonPythonModel(TextModel):
    """The version's directory holds what a run directory holds of it: graph, weights, tokenizer and manifest."""

    def open_session(self, version: ServedVersion, backend: Any) -> Session:
        """ONNX Runtime, one call at a time: a step uses every core."""
        threads = parameter_of(version.config, "threads")
        return Session.open(version.directory, backend="onnxruntime", threads=threads)
