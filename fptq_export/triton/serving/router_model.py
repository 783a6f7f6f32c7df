"""A text model that has others answer: some of the requests one, some another.

Requests and answers are those of any text model, and `route` names a model that is wanted; metadata of a gRPC call does
that too. Each request has a thread, which waits for tokens and hands them on.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.files import read_json_model
from fptq_export.runtime.refusals import QueueFullError
from fptq_export.triton.serving.comparison_log import Comparison, ComparisonLog, utc_now
from fptq_export.triton.serving.relay import Relayed, RelayError, relay
from fptq_export.triton.serving.requests import TextRequest, text_request
from fptq_export.triton.serving.responder import Responder, send_error
from fptq_export.triton.serving.routing import ROUTE, ROUTE_HEADER, ROUTES_FILE, Choice, Routes
from fptq_export.triton.serving.text_model import ServedVersion
from fptq_export.triton.text_config import parameter_of

__all__ = ["TritonPythonModel"]

_THREADS, _WAITING = 64, 256
"""Requests on their way, and behind them, where the config says nothing."""


class TritonPythonModel:
    """A decoupled model of the Python backend; the version's directory holds `routes.json`."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the routes.

        Raises:
            UserError: They cannot be read.
        """
        import triton_python_backend_utils

        self._backend: Any = triton_python_backend_utils
        version = ServedVersion(args)
        self._routes = read_json_model(version.directory / ROUTES_FILE, Routes)
        log = self._routes.comparison_log
        self._log = None if log is None else ComparisonLog(Path(log))
        threads = parameter_of(version.config, "max_active") or _THREADS
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fptq-route")
        self._room = BoundedSemaphore(threads + (parameter_of(version.config, "max_queue") or _WAITING))

    def execute(self, requests: list[Any]) -> None:
        """Take requests; each is answered by its own thread."""
        for request in requests:
            sender = request.get_response_sender()
            if self._room.acquire(blocking=False):
                self._pool.submit(self._serve, request, sender)
            else:
                full = QueueFullError("server", "as many requests wait already as may", "send it again in a while")
                send_error(self._backend, sender, full)

    def finalize(self) -> None:
        """Wait for the requests that were begun."""
        self._pool.shutdown(wait=True)
        if self._log is not None:
            self._log.close()

    def _serve(self, request: Any, sender: Any) -> None:
        try:
            self._answer(request, sender)
        except UserError as error:
            send_error(self._backend, sender, error)
        except Exception as error:  # noqa: BLE001  one request must not end the model for all
            self._backend.Logger.log_error(traceback.format_exc())
            send_error(self._backend, sender, error)
        finally:
            self._room.release()

    def _answer(self, request: Any, sender: Any) -> None:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        asked = text_request(arrays)
        choice = self._routes.choose(request.request_id(), _wanted(request, arrays))
        responder = Responder(self._backend, sender, stream=asked.stream)
        given = relay(self._backend, choice.model, arrays, request.request_id(), responder)
        if given.error is not None:
            self._send_failure(sender, given.error)
        if self._log is not None:
            self._write_comparison(self._log, request.request_id(), asked, choice, given, arrays)

    def _send_failure(self, sender: Any, failure: RelayError) -> None:
        """Hand on what the other model, or the server in its place, said."""
        error = self._backend.TritonError(str(failure), failure.code)
        response = self._backend.InferenceResponse(output_tensors=[], error=error)
        sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _write_comparison(self, log: ComparisonLog, *parts: Any) -> None:
        """The client has its answer, so what goes wrong now is the server's alone."""
        try:
            log.write(self._comparison(*parts))
        except Exception:  # noqa: BLE001  a full disk must not end the model
            self._backend.Logger.log_error(traceback.format_exc())

    def _comparison(
        self, request_id: str, asked: TextRequest, choice: Choice, given: Relayed, arrays: Mapping[str, NDArray[Any]]
    ) -> Comparison:
        """The line of a request; the shadow is asked now, when nobody waits any more."""
        shadow = None
        if self._routes.shadow not in (None, choice.model):
            shadow = relay(self._backend, str(self._routes.shadow), arrays, request_id)
        return Comparison(
            time=utc_now(),
            request_id=request_id,
            reason=choice.reason,
            answer=self._shown(given),
            shadow=None if shadow is None else self._shown(shadow),
            common_tokens=None if shadow is None else _common(given.token_ids, shadow.token_ids),
            same=None if shadow is None else given.token_ids == shadow.token_ids,
            prompt=asked.prompt if self._routes.log_texts else None,
        )

    def _shown(self, relayed: Relayed) -> Any:
        texts = {"text": relayed.text} if self._routes.log_texts else {}
        return relayed.answer.model_copy(update=texts)


def _wanted(request: Any, arrays: Mapping[str, NDArray[Any]]) -> str | None:
    """The model a request names: by the input, else by the metadata of the call."""
    if ROUTE in arrays and arrays[ROUTE].size:
        return bytes(arrays[ROUTE].reshape(-1)[0]).decode("utf-8", errors="replace")
    value = json.loads(request.parameters() or "{}").get(ROUTE_HEADER)
    return str(value) if value else None


def _common(one: list[int], other: list[int]) -> int:
    """Tokens until two answers differ."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))
