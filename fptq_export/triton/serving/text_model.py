"""What text models have in common: requests come in, texts are written at once, tokens go out as they come."""

from __future__ import annotations

import json
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fptq_export.errors import UserError
from fptq_export.runtime import Scheduler, Session
from fptq_export.runtime.metrics import Metrics
from fptq_export.triton.serving.metrics import MetricsMirror
from fptq_export.triton.serving.requests import text_request
from fptq_export.triton.serving.responder import Responder, send_error
from fptq_export.triton.text_config import INPUTS, parameter_of

__all__ = ["ServedVersion", "TextModel"]


class ServedVersion:
    """What the Python backend tells a model about itself."""

    def __init__(self, arguments: Mapping[str, str]) -> None:
        self.name = arguments["model_name"]
        self.version = int(arguments["model_version"])
        self.directory = Path(arguments["model_repository"]) / arguments["model_version"]
        self.config: Mapping[str, Any] = json.loads(arguments["model_config"])


class TextModel(ABC):
    """A decoupled model of the Python backend.

    Its methods are called by the backend's one thread; the scheduler's threads send the answers, so that `execute`
    returns at once and takes the next request.
    """

    workers = 1
    """Threads that run the model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the model.

        Raises:
            UserError: It cannot be loaded; the server says why, and goes on without it.
        """
        import triton_python_backend_utils

        self._backend: Any = triton_python_backend_utils
        version = ServedVersion(args)
        self._session = self.open_session(version, self._backend)
        if self._session.tokenizer is None:
            raise UserError(str(version.directory), "has no tokenizer.json", "write it again: fptq-export triton")
        notes = [self._session.model.name, *([self._session.note] if self._session.note else [])]
        self._backend.Logger.log_info(f"{version.name}: {', '.join(notes)}")
        limits = {key: value for key in ("max_active", "max_queue") if (value := parameter_of(version.config, key))}
        metrics = Metrics(version.name, with_process=False, ranges=self._session.ranges)
        self._mirror = MetricsMirror(metrics.registry, self._backend, {"version": str(version.version)})
        self._scheduler = Scheduler(self._session, workers=self.workers, observer=metrics, **limits)

    @abstractmethod
    def open_session(self, version: ServedVersion, backend: Any) -> Session:
        """The model and its tokenizer."""

    def execute(self, requests: list[Any]) -> None:
        """Take requests; what is wrong with one is answered to the one who sent it."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except UserError as error:
                send_error(self._backend, sender, error)
            except Exception as error:  # noqa: BLE001  one request must not end the model for all
                self._backend.Logger.log_error(traceback.format_exc())
                send_error(self._backend, sender, error)

    def finalize(self) -> None:
        """Finish the texts that were begun: the server calls this when nobody waits for one any more."""
        self._scheduler.close()
        self._mirror.close()
        self._session.close()

    def _accept(self, request: Any, sender: Any) -> None:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs() if tensor.name() in INPUTS}
        asked = text_request(arrays)
        self._scheduler.submit(asked.prompt, asked.sampling, Responder(self._backend, sender, stream=asked.stream))
