"""Answers to one request, sent while its text is written."""

from __future__ import annotations

from typing import Any

import numpy as np

from fptq_export.errors import UserError
from fptq_export.runtime import Piece
from fptq_export.runtime.refusals import QueueFullError, ShuttingDownError

__all__ = ["CancelledError", "Responder", "send_error"]


_LATER = (QueueFullError, ShuttingDownError)
"""What is not the request's fault."""


class CancelledError(Exception):
    """Nobody waits for the text any more."""


class Responder:
    """Takes the events of a text in the thread that runs the model, and sends them.

    Args:
        backend: `triton_python_backend_utils`.
        sender: Of the request.
        stream: One response a token; else one in all.
    """

    def __init__(self, backend: Any, sender: Any, *, stream: bool) -> None:
        self._backend = backend
        self._sender = sender
        self._stream = stream
        self._pieces: list[Piece] = []
        self._tokens = 0

    def __call__(self, event: Piece | Exception | None) -> None:
        """Send a piece, or keep it for the answer; send an error, or the end of a text that was cancelled.

        Raises:
            CancelledError: The client is gone; the request is closed.
        """
        if isinstance(event, Exception):
            send_error(self._backend, self._sender, event)
            return
        if event is None or self._sender.is_cancelled():
            self._close_cancelled()
            raise CancelledError
        self._pieces.append(event)
        self._tokens += 1
        if self._stream or event.finish_reason is not None:
            self._send()

    def _send(self) -> None:
        pieces, self._pieces = self._pieces, []
        reason = pieces[-1].finish_reason
        tensors = [
            self._backend.Tensor("text_output", _texts("".join(piece.text for piece in pieces))),
            self._backend.Tensor("token_ids", np.array([piece.token_id for piece in pieces], np.int32)),
            self._backend.Tensor("finish_reason", _texts(reason or "")),
        ]
        response = self._backend.InferenceResponse(output_tensors=tensors)
        final = self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        self._sender.send(response, flags=final if reason is not None else 0)

    def _close_cancelled(self) -> None:
        self._backend.Logger.log_verbose(f"cancelled after {self._tokens} tokens")
        error = self._backend.TritonError("request was cancelled", self._backend.TritonError.CANCELLED)
        response = self._backend.InferenceResponse(output_tensors=[], error=error)
        self._sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def send_error(backend: Any, sender: Any, error: Exception) -> None:
    """End a request with what went wrong; a bug of ours is named by its type and stands in the server's log."""
    kinds = backend.TritonError
    if not isinstance(error, UserError):
        code, text = kinds.INTERNAL, f"{type(error).__name__}: {error}"
    else:
        code, text = kinds.UNAVAILABLE if isinstance(error, _LATER) else kinds.INVALID_ARG, str(error)
    response = backend.InferenceResponse(output_tensors=[], error=backend.TritonError(text, code))
    sender.send(response, flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _texts(text: str) -> Any:
    return np.array([text.encode("utf-8")], np.object_)
