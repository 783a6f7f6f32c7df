"""A request of the Python backend as a prompt and how it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.runtime import Sampling
from fptq_export.triton.text_config import INPUTS

__all__ = ["TextRequest", "text_request"]

_SAMPLING = frozenset(Sampling.model_fields)


@dataclass(frozen=True)
class TextRequest:
    """What a client asks for."""

    prompt: str
    sampling: Sampling
    stream: bool


def text_request(arrays: Mapping[str, NDArray[Any]]) -> TextRequest:
    """Read the inputs of a request.

    Args:
        arrays: Input -> its array, in the types and lengths of `text_config.INPUTS`; those that were not given are not
            there. The server has checked types and ranks, but a text of no bytes has passed.

    Raises:
        UserError: A text is not UTF-8, or an input has no element.
        UserErrors: Every value that `Sampling` does not take.
    """
    values = {name: _value(name, array) for name, array in arrays.items() if name in INPUTS}
    if "text_input" not in values:
        raise UserError("text_input", "is missing", "give the prompt")
    try:
        sampling = Sampling.model_validate({name: value for name, value in values.items() if name in _SAMPLING})
    except ValidationError as error:
        problems = [Problem(".".join(map(str, item["loc"])), item["msg"]) for item in error.errors()]
        raise UserErrors("request", problems, "mend the values and send it again") from None
    return TextRequest(values["text_input"], sampling, bool(values.get("stream", False)))


def _value(name: str, array: NDArray[Any]) -> Any:
    kind, length = INPUTS[name]
    items = [_text(name, item) if kind == "STRING" else item.item() for item in array.reshape(-1)]
    if length == 1 and len(items) != 1:
        raise UserError(name, f"has {len(items)} elements, not 1", "send one request for each text")
    return items[0] if length == 1 else tuple(items)


def _text(name: str, item: bytes | np.bytes_) -> str:
    try:
        return bytes(item).decode("utf-8")
    except UnicodeDecodeError as error:
        cause = f"is not UTF-8 (byte {error.start}: {error.reason})"
        raise UserError(name, cause, "encode the text as UTF-8") from None
