"""From the scheduler's threads to the event loop: the texts of one request."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial

from fptq_export.errors import UserError
from fptq_export.runtime import FinishReason, Handle, Piece, Sampling, Scheduler
from fptq_export.runtime.refusals import ShuttingDownError
from fptq_export.runtime.scheduler import Event
from fptq_export.serve.api_errors import ApiError, api_error_from_refusal, internal_error

__all__ = ["Texts", "Written"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """A whole text."""

    text: str
    finish_reason: FinishReason


class Texts:
    """The texts of one request, which the model writes in turn. `Texts.asked` makes them.

    Args:
        handles: Of the scheduler, one a text.
        events: What it delivers, each with the number of its text.
    """

    def __init__(self, handles: Sequence[Handle], events: asyncio.Queue[tuple[int, Event]]) -> None:
        self._handles = handles
        self._events = events
        self.prompt_tokens = sum(handle.prompt_tokens for handle in handles)
        self.tokens = 0
        """That came so far."""

    @classmethod
    async def asked(cls, scheduler: Scheduler, prompts: Sequence[list[int]], samplings: Sequence[Sampling]) -> Texts:
        """Ask for texts: all of them or none.

        Args:
            scheduler: Writes them.
            prompts: Tokens of each prompt.
            samplings: How each goes on.

        Raises:
            UserError: The scheduler does not take one of them.
        """
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(index: int, event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        handles: list[Handle] = []
        try:
            for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
                handles.append(scheduler.submit(prompt, sampling, partial(deliver, index)))
        except UserError:
            for handle in handles:
                handle.cancel()
            raise
        return cls(handles, events)

    def cancel(self) -> None:
        """Nobody reads them any more. Does nothing to those that ended."""
        for handle in self._handles:
            handle.cancel()

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every piece with the number of its text, as they come.

        Raises:
            ApiError: The model cannot run, or the server shuts down.
        """
        unfinished = len(self._handles)
        while unfinished:
            index, event = await self._events.get()
            if not isinstance(event, Piece):
                raise _api_error_from_event(event)
            self.tokens += 1
            unfinished -= event.finish_reason is not None
            yield index, event

    async def whole(self) -> list[Written]:
        """Wait for all texts.

        Raises:
            ApiError: As `pieces`.
        """
        texts = ["" for _ in self._handles]
        reasons: dict[int, FinishReason] = {}
        async for index, piece in self.pieces():
            texts[index] += piece.text
            if piece.finish_reason is not None:
                reasons[index] = piece.finish_reason
        return [Written(text, reasons[index]) for index, text in enumerate(texts)]


def _api_error_from_event(event: Exception | None) -> ApiError:
    """Why a text ended that was not finished. Only the server cancels one that is still read."""
    if event is None:
        return api_error_from_refusal(ShuttingDownError("server", "is shutting down", "send the request again"), "")
    if isinstance(event, UserError):
        return internal_error(f"{event.where}: {event.cause}")
    _log.error("the model failed", exc_info=event)
    return internal_error("the model failed; the server's log says why")
