"""Errors as OpenAI's clients read them: a status, and `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from fptq_export.errors import UserError
from fptq_export.runtime.refusals import PromptTooLongError, QueueFullError, ShuttingDownError

__all__ = [
    "ApiError",
    "ErrorBody",
    "ErrorResponse",
    "FieldError",
    "api_error_from_refusal",
    "api_error_from_validation",
    "internal_error",
    "unknown_model",
    "wrong_key",
]

ErrorType = Literal[
    "authentication_error", "invalid_request_error", "rate_limit_error", "server_error", "service_unavailable_error"
]
_RETRY = {"Retry-After": "1"}
"""Seconds. A place in the queue is free when a text ends, which takes about as long."""


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: ErrorType
    param: str | None
    """Field of the request."""
    code: str | None
    """For programs."""


class ErrorResponse(BaseModel):
    """Body of every answer with status 400 or higher."""

    error: ErrorBody


class FieldError(ValueError):
    """A value that a field does not take; pydantic adds where it is.

    Args:
        message: What is wrong with it.
        param: The field, where the mistake is one of several fields together.
        code: For programs.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ApiError(Exception):
    """Ends a request.

    Args:
        status: Of HTTP.
        message: For people.
        type: Kind, as OpenAI names it.
        param: Field of the request.
        code: For programs.
        headers: More headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: ErrorType = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorResponse(error=ErrorBody(message=message, type=type, param=param, code=code))
        self.headers = dict(headers or {})


def api_error_from_refusal(error: UserError, param: str) -> ApiError:
    """A request that the scheduler did not take.

    Args:
        error: What it raised.
        param: Field that holds the prompt.
    """
    message = f"{error.cause}; {error.hint}" if error.hint else error.cause
    if isinstance(error, QueueFullError):
        return ApiError(429, message, "rate_limit_error", code="queue_full", headers=_RETRY)
    if isinstance(error, ShuttingDownError):
        return ApiError(503, f"the server {message}", "service_unavailable_error", code="shutting_down", headers=_RETRY)
    code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
    return ApiError(400, f"{error.where}: {message}", param=param, code=code)


def api_error_from_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """A body that is no request: its first mistake. Others may only follow from that one."""
    first = errors[0]
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        message = f"{place[0]} is not a field that this server knows; leave it out"
        return ApiError(400, message, param=place[0], code="unknown_parameter")
    if first["type"] == "model_attributes_type" and not place:
        return ApiError(400, "the body is no JSON object, or the request has no Content-Type: application/json")
    cause = first.get("ctx", {}).get("error")
    mistake = cause if isinstance(cause, FieldError) else FieldError(first["msg"])
    message = f"{'.'.join(place)}: {mistake}" if place else str(mistake)
    return ApiError(400, message, param=place[0] if place else mistake.param, code=mistake.code)


def unknown_model(name: str, served: str) -> ApiError:
    """Another model than the one that is served."""
    message = f"the model {name!r} does not exist here; this server has {served!r}"
    return ApiError(404, message, param="model", code="model_not_found")


def wrong_key() -> ApiError:
    """No API key, or a wrong one. It does not say which."""
    message = "a valid API key is needed: send Authorization: Bearer KEY"
    headers = {"WWW-Authenticate": "Bearer"}
    return ApiError(401, message, "authentication_error", code="invalid_api_key", headers=headers)


def internal_error(message: str) -> ApiError:
    """The model cannot run, or a bug of ours."""
    return ApiError(500, message, "server_error", code="internal_error")
