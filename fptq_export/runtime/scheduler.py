"""Many texts on one model: each step is given to another text in turn, so that all of them stream.

Each text runs as if it were alone: its own cache, batch 1. So its answer does not depend on what else runs; a larger
batch would sum in another order, and a token whose logits nearly tie could turn out otherwise.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator

from fptq_export.errors import UserError
from fptq_export.runtime.generation import Completion, Generation, Piece, completion_from_pieces, now
from fptq_export.runtime.refusals import QueueFullError, ShuttingDownError
from fptq_export.runtime.sampling import Sampling
from fptq_export.runtime.session import Prompt, Session

__all__ = ["Event", "Handle", "Observer", "Scheduler"]

Event = Piece | Exception | None
"""A piece; an error, which is the last event; or None, the last event of a text that was cancelled."""


class Observer:
    """Is told what happens, from the threads that do it. Does nothing; metrics override it."""

    def queued(self, waiting: int, running: int) -> None:
        """So many texts wait, and so many run."""

    def started(self, queue_seconds: float, prompt_tokens: int) -> None:
        """A text left the queue."""

    def first_token(self, seconds: float) -> None:
        """The first token came so long after the request."""

    def next_token(self, seconds: float) -> None:
        """Another token came so long after the one before."""

    def finished(self, outcome: str, tokens: int) -> None:
        """A text ended: `stop`, `length`, `cancelled` or `error`."""


class Handle:
    """A text that is being written. Iterate over its pieces, or wait for its `result`; one of the two.

    Args:
        generation: The text.
        listener: Takes each event in the thread that runs the model, instead of the iterator.
        withdraw: Takes the handle out of the queue, if it still waits there.
    """

    def __init__(
        self,
        generation: Generation,
        listener: Callable[[Event], None] | None,
        withdraw: Callable[[Handle], None],
    ) -> None:
        self._generation = generation
        self._withdraw = withdraw
        self._events: queue.SimpleQueue[tuple[Event, float]] = queue.SimpleQueue()
        self._listener = listener
        self._cancelled = threading.Event()
        self._asked = now()
        self._last = self._asked
        self._tokens = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._generation.prompt_tokens

    def cancel(self) -> None:
        """Stop before the next token; a text that waits leaves the queue at once."""
        self._cancelled.set()
        self._withdraw(self)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces as they come; the error that ended them is raised."""
        return (piece for piece, _ in self._timed())

    def result(self) -> Completion:
        """Wait for the whole text.

        Raises:
            UserError: It was cancelled, or the model cannot run.
        """
        pieces = list(self._timed())
        if not pieces or pieces[-1][0].finish_reason is None:
            raise UserError("request", "was cancelled", "send it again")
        return completion_from_pieces(pieces, self.prompt_tokens, self._asked)

    def _timed(self) -> Iterator[tuple[Piece, float]]:
        while True:
            event, moment = self._events.get()
            if isinstance(event, Exception):
                raise event
            if event is None:
                return
            yield event, moment
            if event.finish_reason is not None:
                return

    def _deliver(self, event: Event) -> None:
        if self._listener is None:
            self._events.put((event, now()))
        else:
            self._listener(event)


class Scheduler:
    """Runs texts on a session.

    Args:
        session: Its model takes calls from `workers` threads at once.
        workers: Threads that run steps. One is right where a step uses every core; more where the model waits for
            another process, as Triton's do.
        max_active: Texts that have a cache; the others wait.
        max_queue: Texts that may wait; more are refused.
        observer: Is told what happens.
    """

    def __init__(
        self,
        session: Session,
        *,
        workers: int = 1,
        max_active: int = 16,
        max_queue: int = 256,
        observer: Observer | None = None,
    ) -> None:
        if min(workers, max_active, max_queue) < 1:
            raise ValueError("workers, max_active and max_queue are at least 1")
        self._session = session
        self._max_active, self._max_queue = max_active, max_queue
        self._observer = observer or Observer()
        self._waiting: deque[Handle] = deque()
        self._ready: deque[Handle] = deque()
        self._running: set[Handle] = set()
        self._closing = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, daemon=True, name="fptq-run") for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(
        self, prompt: Prompt, sampling: Sampling | None = None, listener: Callable[[Event], None] | None = None
    ) -> Handle:
        """Ask for a text.

        Args:
            prompt: Text or tokens.
            sampling: How it goes on.
            listener: Takes each event in the thread that runs the model, or that cancels a text which waits; what it
                raises cancels the text.

        Raises:
            QueueFullError: As many texts wait as may.
            ShuttingDownError: The scheduler is closing.
            UserError: The prompt is empty or too long.
        """
        handle = Handle(self._session.generation(prompt, sampling), listener, self._withdraw)
        with self._changed:
            if self._closing:
                raise ShuttingDownError("server", "is shutting down", "send the request to another one")
            if len(self._waiting) >= self._max_queue:
                cause = f"{len(self._waiting)} requests wait already"
                raise QueueFullError("server", cause, "send it again in a while")
            self._waiting.append(handle)
            self._observer.queued(len(self._waiting), len(self._running))
            self._changed.notify()
        return handle

    @property
    def is_closing(self) -> bool:
        """Whether new texts are refused."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """Whether texts are written: false once a thread died, which only a bug can bring about."""
        return self._closing or all(thread.is_alive() for thread in self._threads)

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more texts; finish those that were asked for, or cancel them.

        Args:
            drain: Finish them.
            timeout: Seconds to wait; then the rest is cancelled.
        """
        with self._changed:
            self._closing = True
            if drain:
                self._changed.wait_for(self._is_idle, timeout)
            rest = (*self._waiting, *self._running)
            self._changed.notify_all()
        for handle in rest:  # without the lock: their listeners are told, and may wait for a thread that wants it
            handle.cancel()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Scheduler:
        """The scheduler itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Finish what was asked for."""
        self.close()

    def _is_idle(self) -> bool:
        return not self._waiting and not self._running

    def _withdraw(self, handle: Handle) -> None:
        with self._changed:
            if handle not in self._waiting:
                return
            self._waiting.remove(handle)
            self._observer.queued(len(self._waiting), len(self._running))
            self._changed.notify_all()
        self._end(handle, None, "cancelled")

    def _work(self) -> None:
        while (handle := self._next()) is not None:
            goes_on = self._step(handle)
            with self._changed:
                if goes_on:
                    self._ready.append(handle)
                else:
                    self._running.remove(handle)
                    self._observer.queued(len(self._waiting), len(self._running))
                self._changed.notify_all()

    def _next(self) -> Handle | None:
        """The text whose turn it is: a new one first, so that first tokens come soon. None at the end."""
        with self._changed:
            while True:
                if self._waiting and len(self._running) < self._max_active:
                    handle = self._waiting.popleft()
                    self._running.add(handle)
                    self._observer.queued(len(self._waiting), len(self._running))
                    self._observer.started(now() - handle._asked, handle.prompt_tokens)
                    return handle
                if self._ready:
                    return self._ready.popleft()
                if self._closing and self._is_idle():
                    return None
                self._changed.wait()

    def _step(self, handle: Handle) -> bool:
        """One token; whether the text goes on."""
        if handle._cancelled.is_set():
            return self._end(handle, None, "cancelled")
        try:
            piece = handle._generation.step()
        except Exception as error:  # noqa: BLE001  it belongs to the one who asked; the others go on
            return self._end(handle, error, "error")
        self._observe_token(handle)
        try:
            handle._deliver(piece)
        except Exception:  # noqa: BLE001  the listener is gone
            self._observer.finished("cancelled", handle._tokens)
            return False
        if piece.finish_reason is not None:
            self._observer.finished(piece.finish_reason, handle._tokens)
        return piece.finish_reason is None

    def _end(self, handle: Handle, event: Event, outcome: str) -> bool:
        self._observer.finished(outcome, handle._tokens)
        try:
            handle._deliver(event)
        except Exception:  # noqa: BLE001  the listener is gone
            return False
        return False

    def _observe_token(self, handle: Handle) -> None:
        moment = now()
        if handle._tokens == 0:
            self._observer.first_token(moment - handle._asked)
        else:
            self._observer.next_token(moment - handle._last)
        handle._tokens, handle._last = handle._tokens + 1, moment
