"""Bodies of answers, whole and in chunks, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, SerializerFunctionWrapHandler, model_serializer

from fptq_export.runtime import FinishReason

__all__ = [
    "AnyChunk",
    "AnyResponse",
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatMessageOut",
    "ChatResponse",
    "CompletionChoice",
    "CompletionChunk",
    "CompletionResponse",
    "Delta",
    "Model",
    "ModelList",
    "Usage",
]


class Usage(BaseModel):
    """Tokens of all prompts and all answers, those that ended a text included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Head(BaseModel):
    id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str
    """Version, backend and kernels: with the same one, a seed gives the same text."""


class CompletionChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None


class CompletionResponse(_Head):
    """Answer of `/v1/completions`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Head):
    """Part of a streamed answer of `/v1/completions`."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessageOut(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatMessageOut
    logprobs: None = None
    finish_reason: FinishReason


class ChatResponse(_Head):
    """Answer of `/v1/chat/completions`."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer(mode="wrap")
    def _without_nothing(self, handler: SerializerFunctionWrapHandler) -> dict[str, str]:
        """A null would be read as: no content, as opposed to: no more of it."""
        return {name: value for name, value in handler(self).items() if value is not None}


class ChatChunkChoice(BaseModel):
    """Part of one answer."""

    index: int
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None


class ChatChunk(_Head):
    """Part of a streamed answer of `/v1/chat/completions`."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int | None
    """Tokens of prompt and answer; None where nothing says so."""


class ModelList(BaseModel):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


AnyResponse = CompletionResponse | ChatResponse
AnyChunk = CompletionChunk | ChatChunk
