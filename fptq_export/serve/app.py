"""The endpoints. `app_for_service` makes an ASGI application of them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from fptq_export import __version__
from fptq_export.runtime.metrics import METRICS_MEDIA_TYPE
from fptq_export.serve.answers import Answer, ChatAnswer, CompletionAnswer, server_sent_events, usage_of
from fptq_export.serve.api_errors import ApiError, ErrorResponse, api_error_from_validation, internal_error
from fptq_export.serve.body_limit import BodyLimit
from fptq_export.serve.requests import ChatRequest, CompletionRequest
from fptq_export.serve.responses import ChatResponse, CompletionResponse, Model, ModelList
from fptq_export.serve.service import Service
from fptq_export.serve.texts import Texts

__all__ = ["app_for_service"]

_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that did not wait; it reaches logs only."""
_STATUSES = (400, 401, 404, 413, 429, 500, 503)
_ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in _STATUSES}


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


_Service = Annotated[Service, Depends(_service)]
_Key = Annotated[HTTPAuthorizationCredentials | None, Security(HTTPBearer(auto_error=False))]


async def _authorized(key: _Key, service: _Service) -> None:
    service.check_key(None if key is None else key.credentials)


_openai = APIRouter(prefix="/v1", dependencies=[Depends(_authorized)], responses=_ERRORS)
_operations = APIRouter()


@_openai.post("/completions", response_model=CompletionResponse)
async def completions(body: CompletionRequest, request: Request, service: _Service) -> Response:
    """Go on with one text or several."""
    service.check_model(body.model)
    texts, echoes = await service.complete(body)
    answer = CompletionAnswer(body.model, service.fingerprint, echoes)
    return await _answered(request, texts, answer, body)


@_openai.post("/chat/completions", response_model=ChatResponse)
async def chat_completions(body: ChatRequest, request: Request, service: _Service) -> Response:
    """Answer a chat."""
    service.check_model(body.model)
    texts = await service.chat(body)
    return await _answered(request, texts, ChatAnswer(body.model, service.fingerprint), body)


@_openai.get("/models")
async def models(service: _Service) -> ModelList:
    """What is served."""
    return ModelList(data=[service.model])


@_openai.get("/models/{name:path}")
async def model(name: str, service: _Service) -> Model:
    """One of them."""
    service.check_model(name)
    return service.model


@_operations.get("/health", responses={503: {}})
async def health(service: _Service) -> Response:
    """Whether the process works: 200, also while it shuts down, or 503: start it again."""
    return Response(status_code=200 if service.scheduler.is_alive else 503)


@_operations.get("/ready", responses={503: {}})
async def ready(service: _Service) -> Response:
    """Whether to send requests here: 200, or 503 while it shuts down."""
    return Response(status_code=503 if service.scheduler.is_closing else 200)


@_operations.get("/metrics")
async def metrics(service: _Service) -> Response:
    """For Prometheus."""
    return Response(service.metrics.page(), media_type=METRICS_MEDIA_TYPE)


async def _answered(request: Request, texts: Texts, answer: Answer, body: CompletionRequest | ChatRequest) -> Response:
    if body.stream:
        events = server_sent_events(texts, answer, includes_usage=body.includes_usage)
        # A proxy must not hold the events back.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        # The events cancel their texts when they are left; those of a client that left before are never begun.
        cancel = BackgroundTask(texts.cancel)
        return StreamingResponse(events, media_type="text/event-stream", headers=headers, background=cancel)
    writing = asyncio.create_task(texts.whole())
    leaving = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not writing.done():
            return Response(status_code=_CLIENT_CLOSED_REQUEST)
        whole = answer.whole(writing.result(), usage_of(texts))
        return Response(whole.model_dump_json(), media_type="application/json")
    finally:
        texts.cancel()
        writing.cancel()
        leaving.cancel()


async def _disconnected(request: Request) -> None:
    """Wait until the client is gone; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _response_from_error(request: Request, error: Exception) -> JSONResponse:
    """Any error, in OpenAI's form."""
    if isinstance(error, RequestValidationError):
        error = api_error_from_validation(error.errors())
    elif isinstance(error.__cause__, UnicodeDecodeError):
        error = ApiError(400, f"the body is not UTF-8 ({error.__cause__})")
    elif isinstance(error, HTTPException):
        error = ApiError(error.status_code, str(error.detail), headers=error.headers)
    elif not isinstance(error, ApiError):
        error = internal_error("this is a bug of the server; its log has the details")
    request.app.state.service.metrics.refused(error.status)
    return JSONResponse(error.body.model_dump(), error.status, error.headers)


def app_for_service(service: Service) -> FastAPI:
    """The application.

    Args:
        service: The model it serves.
    """
    # Without the pages that load scripts from elsewhere; /openapi.json is there.
    app = FastAPI(title="fptq-export serve", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(BodyLimit)
    app.include_router(_openai)
    app.include_router(_operations)
    for kind in (ApiError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, _response_from_error)
    return app
