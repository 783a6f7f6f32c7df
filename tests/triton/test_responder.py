"""What a text model sends, with a double in the Python backend's place: the cases a server seldom comes to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from fptq_export.errors import UserError
from fptq_export.runtime import Piece
from fptq_export.runtime.refusals import QueueFullError, ShuttingDownError
from fptq_export.triton.serving.responder import CancelledError, Responder, send_error

FINAL = 1
BACKEND = SimpleNamespace(
    TRITONSERVER_RESPONSE_COMPLETE_FINAL=FINAL,
    Tensor=lambda name, array: (name, array.tolist()),
    InferenceResponse=lambda output_tensors, error=None: error or dict(output_tensors),
    TritonError=lambda message, code: (code, message),
    Logger=SimpleNamespace(log_verbose=lambda text: None),
)
for code in ("CANCELLED", "INTERNAL", "INVALID_ARG", "UNAVAILABLE"):
    setattr(BACKEND.TritonError, code, code)


class Sender:
    """Keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, int]] = []
        self.cancelled = False

    def send(self, response: Any, flags: int = 0) -> None:
        """Keep it."""
        self.sent.append((response, flags))

    def is_cancelled(self) -> bool:
        """Whether the client is gone."""
        return self.cancelled


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("prompt", "is empty"), "INVALID_ARG"),
        (QueueFullError("server", "256 requests wait already"), "UNAVAILABLE"),
        (ShuttingDownError("server", "is shutting down"), "UNAVAILABLE"),
        (ZeroDivisionError("division by zero"), "INTERNAL"),
    ],
)
def test_code_says_whose_fault_it_is(error: Exception, code: str) -> None:
    """The request's, the moment's or ours; the text says what, and the request is closed."""
    sender = Sender()
    send_error(BACKEND, sender, error)
    (((found, text), flags),) = sender.sent
    assert (found, flags) == (code, FINAL)
    assert str(error) in text


def test_answer_in_one_holds_every_piece() -> None:
    """Sent at the end, once."""
    sender = Sender()
    responder = Responder(BACKEND, sender, stream=False)
    for piece in (Piece(5, "a"), Piece(6, ""), Piece(7, "b", "length")):
        responder(piece)
    expected = {"text_output": [b"ab"], "token_ids": [5, 6, 7], "finish_reason": [b"length"]}
    assert sender.sent == [(expected, FINAL)]


def test_error_in_the_middle_ends_a_stream() -> None:
    """Behind the pieces that were sent."""
    sender = Sender()
    responder = Responder(BACKEND, sender, stream=True)
    responder(Piece(5, "a"))
    responder(UserError("model", "cannot run"))
    assert [flags for _, flags in sender.sent] == [0, FINAL]


@pytest.mark.parametrize("event", [Piece(6, "b"), None], ids=["client gone", "server ends"])
def test_cancelled_text_is_closed_and_stops(event: Piece | None) -> None:
    """The request gets its end, without which the server would wait for it, and the scheduler is told."""
    sender = Sender()
    responder = Responder(BACKEND, sender, stream=True)
    responder(Piece(5, "a"))
    sender.cancelled = event is not None
    with pytest.raises(CancelledError):
        responder(event)
    assert sender.sent[-1] == (("CANCELLED", "request was cancelled"), FINAL)
