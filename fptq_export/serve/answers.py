"""The two kinds of answers, a completion and a chat, each whole or in chunks."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fptq_export.runtime import FinishReason
from fptq_export.serve.api_errors import ApiError, ErrorResponse
from fptq_export.serve.responses import (
    AnyChunk,
    AnyResponse,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatMessageOut,
    ChatResponse,
    CompletionChoice,
    CompletionChunk,
    CompletionResponse,
    Delta,
    Usage,
)
from fptq_export.serve.texts import Texts, Written

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer", "server_sent_events", "usage_of"]

_END = "data: [DONE]\n\n"


class Answer(ABC):
    """How texts are put into an answer.

    Args:
        model: Name that the request called it by.
        fingerprint: Of the version, the backend and the kernels.
        prefix: Of its id.
    """

    def __init__(self, model: str, fingerprint: str, prefix: str) -> None:
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    @abstractmethod
    def whole(self, written: Sequence[Written], usage: Usage) -> AnyResponse:
        """All of it."""

    @abstractmethod
    def opening(self) -> Sequence[AnyChunk]:
        """Chunks before the first token."""

    @abstractmethod
    def chunk(self, index: int, text: str, reason: FinishReason | None) -> AnyChunk:
        """What came of one text."""

    @abstractmethod
    def closing(self, usage: Usage) -> AnyChunk:
        """The chunk that counts the tokens."""


class CompletionAnswer(Answer):
    """Of `/v1/completions`.

    Args:
        model: Name that the request called it by.
        fingerprint: Of the version, the backend and the kernels.
        echoes: What each text begins with: its prompt, or nothing.
    """

    def __init__(self, model: str, fingerprint: str, echoes: Sequence[str]) -> None:
        super().__init__(model, fingerprint, "cmpl")
        self._echoes = echoes

    def whole(self, written: Sequence[Written], usage: Usage) -> CompletionResponse:
        """All of it."""
        choices = [
            CompletionChoice(index=index, text=echo + text.text, finish_reason=text.finish_reason)
            for index, (echo, text) in enumerate(zip(self._echoes, written, strict=True))
        ]
        return CompletionResponse(**self._head, choices=choices, usage=usage)

    def opening(self) -> Sequence[CompletionChunk]:
        """The prompts, where they are echoed."""
        return [self.chunk(index, echo, None) for index, echo in enumerate(self._echoes) if echo]

    def chunk(self, index: int, text: str, reason: FinishReason | None) -> CompletionChunk:
        """What came of one text."""
        return CompletionChunk(**self._head, choices=[CompletionChoice(index=index, text=text, finish_reason=reason)])

    def closing(self, usage: Usage) -> CompletionChunk:
        """The chunk that counts the tokens."""
        return CompletionChunk(**self._head, choices=[], usage=usage)


class ChatAnswer(Answer):
    """Of `/v1/chat/completions`.

    Args:
        model: Name that the request called it by.
        fingerprint: Of the version, the backend and the kernels.
    """

    def __init__(self, model: str, fingerprint: str) -> None:
        super().__init__(model, fingerprint, "chatcmpl")

    def whole(self, written: Sequence[Written], usage: Usage) -> ChatResponse:
        """All of it."""
        choices = [
            ChatChoice(index=index, message=ChatMessageOut(content=text.text), finish_reason=text.finish_reason)
            for index, text in enumerate(written)
        ]
        return ChatResponse(**self._head, choices=choices, usage=usage)

    def opening(self) -> Sequence[ChatChunk]:
        """Who speaks."""
        return [self._chunk(0, Delta(role="assistant", content=""), None)]

    def chunk(self, index: int, text: str, reason: FinishReason | None) -> ChatChunk:
        """What came of one text."""
        return self._chunk(index, Delta(content=text) if text else Delta(), reason)

    def closing(self, usage: Usage) -> ChatChunk:
        """The chunk that counts the tokens."""
        return ChatChunk(**self._head, choices=[], usage=usage)

    def _chunk(self, index: int, delta: Delta, reason: FinishReason | None) -> ChatChunk:
        return ChatChunk(**self._head, choices=[ChatChunkChoice(index=index, delta=delta, finish_reason=reason)])


def usage_of(texts: Texts) -> Usage:
    """The tokens that came so far."""
    total = texts.prompt_tokens + texts.tokens
    return Usage(prompt_tokens=texts.prompt_tokens, completion_tokens=texts.tokens, total_tokens=total)


async def server_sent_events(texts: Texts, answer: Answer, *, includes_usage: bool) -> AsyncIterator[str]:
    """A streamed answer, event by event. An error that comes after the first is an event too.

    Args:
        texts: They are cancelled when nobody reads on.
        answer: Their form.
        includes_usage: End with the number of tokens.
    """
    unsent = None if includes_usage else {"usage"}
    try:
        for chunk in answer.opening():
            yield _event(chunk, unsent)
        async for index, piece in texts.pieces():
            if piece.text or piece.finish_reason is not None:
                yield _event(answer.chunk(index, piece.text, piece.finish_reason), unsent)
        if includes_usage:
            yield _event(answer.closing(usage_of(texts)), None)
        yield _END
    except ApiError as error:
        yield _event(error.body, None)
    finally:
        texts.cancel()


def _event(body: AnyChunk | ErrorResponse, unsent: set[str] | None) -> str:
    return f"data: {body.model_dump_json(exclude=unsent)}\n\n"
