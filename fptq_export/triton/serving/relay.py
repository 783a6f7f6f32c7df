"""A text model that another one asks: its tokens, as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fptq_export.runtime import Piece
from fptq_export.triton.serving.comparison_log import Answer
from fptq_export.triton.serving.responder import CancelledError
from fptq_export.triton.text_config import INPUTS, OUTPUTS

__all__ = ["RelayError", "Relayed", "relay"]


class RelayError(Exception):
    """The other model did not answer.

    Args:
        text: What it, or the server, said.
        code: Of Triton's errors.
    """

    def __init__(self, text: str, code: Any) -> None:
        super().__init__(text)
        self.code = code


@dataclass
class Relayed:
    """What came of a request."""

    answer: Answer
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    error: RelayError | None = None


def relay(
    backend: Any,
    model: str,
    arrays: Mapping[str, NDArray[Any]],
    request_id: str,
    listener: Callable[[Piece], None] | None = None,
) -> Relayed:
    """Ask a text model of the same server, and wait for its whole answer. What goes wrong there stands in the answer.

    Args:
        backend: `triton_python_backend_utils`.
        model: Which one.
        arrays: Inputs of the request that are those of text models; a stream is asked for whatever they say.
        request_id: Of the request.
        listener: Takes each piece; `CancelledError` ends the answer as cancelled, and anything else it raises goes on.
    """
    started = perf_counter()
    first: float | None = None
    tokens: list[int] = []
    text, outcome, error = "", "error", None
    try:
        for piece in _pieces(backend, model, arrays, request_id):
            first = perf_counter() - started if first is None else first
            tokens.append(piece.token_id)
            text += piece.text
            outcome = piece.finish_reason or outcome
            if listener is not None:
                listener(piece)
    except CancelledError:
        outcome = "cancelled"
    except RelayError as raised:
        outcome, error = "error", raised
    answer = Answer(
        model=model,
        outcome=outcome,
        tokens=len(tokens),
        first_token_seconds=first,
        seconds=perf_counter() - started,
        error=None if error is None else str(error),
    )
    return Relayed(answer, tokens, text, error)


def _pieces(backend: Any, model: str, arrays: Mapping[str, NDArray[Any]], request_id: str) -> Iterator[Piece]:
    inputs = {name: array for name, array in arrays.items() if name in INPUTS} | {"stream": np.array([True])}
    call = backend.InferenceRequest(
        model_name=model,
        request_id=request_id,
        requested_output_names=list(OUTPUTS),
        inputs=[backend.Tensor(name, array) for name, array in inputs.items()],
    )
    reason = None
    try:
        for response in call.exec(decoupled=True):
            if response.has_error():
                raise RelayError(f"{model}: {response.error().message()}", response.error().code())
            outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if outputs:  # the last response may be an end and nothing else
                reason = bytes(outputs["finish_reason"][0]).decode() or None
                text = bytes(outputs["text_output"][0]).decode()
                yield Piece(int(outputs["token_ids"][0]), text, reason)  # type: ignore[arg-type]  # as it was sent
    except backend.TritonModelException as error:
        raise RelayError(f"{model}: {error}", backend.TritonError.UNAVAILABLE) from error
    if reason is None:
        raise RelayError(f"{model}: its answer has no end", backend.TritonError.INTERNAL)
