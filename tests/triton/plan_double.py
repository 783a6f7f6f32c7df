"""`model.py` of a stand-in for an engine: the same inputs and outputs, computed by ONNX Runtime.

Triton's TensorRT backend keeps the cache of a stateful model itself; here it lies in a dictionary, by correlation id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import triton_python_backend_utils as backend

_PAST, _PRESENT = "past_key_values.", "present."


class TritonPythonModel:
    """Runs `model.w4a8.onnx` beside it, once for each request."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the graph; read from the config whether the server would keep the cache."""
        directory = Path(args["model_repository"]) / args["model_version"]
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # As our own sessions: else ONNX Runtime quantizes the activations once more.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(directory / "model.w4a8.onnx", options)
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.states = json.loads(config["parameters"]["states"]["string_value"])
        self.kept: dict[int, dict[str, Any]] = {}

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer each request."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        feed = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if "write_indices" in feed:
            feed["write_indices"] = feed["write_indices"].reshape(-1)
        number, flags = request.correlation_id(), request.flags()
        if self.states:
            zeros = {name: np.zeros((1, *dims), np.float16) for name, dims in self.states.items()}
            start = flags & backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START
            feed |= zeros if start else self.kept[number]
        found = dict(zip(self.outputs, self.session.run(self.outputs, feed), strict=True))
        if self.states:
            self.kept[number] = {name: found[name.replace(_PAST, _PRESENT, 1)] for name in self.states}
            if flags & backend.TRITONSERVER_REQUEST_FLAG_SEQUENCE_END:
                del self.kept[number]
            backend.Logger.log_info(f"sequences kept: {len(self.kept)}")
        wanted = request.requested_output_names()
        return backend.InferenceResponse([backend.Tensor(name, found[name]) for name in wanted])
