"""Many texts on one model: none lost, none mixed up, none that holds up the rest."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from fptq_export.errors import UserError
from fptq_export.runtime import Observer, Piece, Sampling, Scheduler, Session
from fptq_export.runtime.refusals import QueueFullError, ShuttingDownError
from fptq_export.runtime.scheduler import Event
from tests.runtime.scripted import ScriptedModel, continue_alphabet, letters

WAIT = 20.0
"""Seconds after which a test gives up. Nothing waits so long where the code is right."""


def session(model: ScriptedModel | None = None) -> Session:
    """Goes on with the alphabet."""
    return Session(model or ScriptedModel(), letters())


class Recorder(Observer):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.outcomes: list[tuple[str, int]] = []
        self.depths: list[tuple[int, int]] = []
        self.first = 0
        self.more = 0
        self.prompts: list[int] = []

    def queued(self, waiting: int, running: int) -> None:
        """Keep the depths."""
        self.depths.append((waiting, running))

    def started(self, queue_seconds: float, prompt_tokens: int) -> None:
        """Keep the length of the prompt."""
        assert queue_seconds >= 0.0
        self.prompts.append(prompt_tokens)

    def first_token(self, seconds: float) -> None:
        """Count."""
        self.first += seconds > 0.0

    def next_token(self, seconds: float) -> None:
        """Count."""
        self.more += seconds > 0.0

    def finished(self, outcome: str, tokens: int) -> None:
        """Keep the outcome."""
        self.outcomes.append((outcome, tokens))


@contextmanager
def held(max_active: int = 16, max_queue: int = 256) -> Iterator[tuple[Scheduler, ScriptedModel, threading.Semaphore]]:
    """A scheduler whose model waits for a semaphore, one release a step; opened wide at the end."""
    gate = threading.Semaphore(0)
    model = ScriptedModel(gate=gate)
    scheduler = Scheduler(session(model), max_active=max_active, max_queue=max_queue)
    try:
        yield scheduler, model, gate
    finally:
        gate.release(10_000)
        scheduler.close(drain=False)


@pytest.mark.parametrize("workers", [1, 4])
def test_every_answer_is_that_of_its_prompt_alone(workers: int) -> None:
    """A hundred texts at once are the hundred texts one by one."""
    prompts = ["abcdefghij"[start : start + 1 + start % 3] for start in range(10)] * 10
    sampling = [Sampling(max_tokens=1 + number % 7) for number in range(len(prompts))]
    alone = [session().generate(prompt, one).text for prompt, one in zip(prompts, sampling, strict=True)]
    with Scheduler(session(), workers=workers, max_active=5) as scheduler:
        handles = [scheduler.submit(prompt, one) for prompt, one in zip(prompts, sampling, strict=True)]
        assert [handle.result().text for handle in handles] == alone


def test_texts_take_turns() -> None:
    """A long text does not hold up a short one that came later."""
    gate = threading.Semaphore(0)
    model = ScriptedModel(gate=gate)
    with Scheduler(session(model)) as scheduler:
        scheduler.submit("a", Sampling(max_tokens=20))
        assert model.called.wait(WAIT)
        scheduler.submit("m", Sampling(max_tokens=3))
        gate.release(100)
    texts = ["a" if ids[0] == 0 else "m" for ids in model.calls]
    assert texts[:7] == ["a", "m", "a", "m", "a", "m", "a"]


def test_no_more_than_max_active_have_a_cache() -> None:
    """A third text waits until one of two has ended."""
    recorder = Recorder()
    with Scheduler(session(), max_active=2, observer=recorder) as scheduler:
        for handle in [scheduler.submit("a", Sampling(max_tokens=5)) for _ in range(6)]:
            handle.result()
    assert max(running for _, running in recorder.depths) == 2


def test_full_queue_refuses() -> None:
    """One runs, one waits, the third is told to come again; the two are answered."""
    with held(max_active=1, max_queue=1) as (scheduler, model, gate):
        first = scheduler.submit("a", Sampling(max_tokens=2))
        assert model.called.wait(WAIT)
        second = scheduler.submit("b", Sampling(max_tokens=2))
        with pytest.raises(QueueFullError, match="1 requests wait already"):
            scheduler.submit("c")
        gate.release(100)
        assert (first.result().text, second.result().text) == ("bc", "cd")


def test_cancelled_text_ends_and_frees_its_place() -> None:
    """Its iterator ends without a reason, and the next text runs."""
    with held(max_active=1) as (scheduler, model, gate):
        first = scheduler.submit("a")
        assert model.called.wait(WAIT)
        second = scheduler.submit("y", Sampling(max_tokens=1))
        first.cancel()
        gate.release(100)
        assert [piece.finish_reason for piece in first] == [None]
        assert second.result().text == "z"


def test_cancelled_text_that_waits_leaves_the_queue_at_once() -> None:
    """Clients that gave up must not keep others out while a long text runs."""
    with held(max_active=1, max_queue=1) as (scheduler, model, gate):
        running = scheduler.submit("a", Sampling(max_tokens=1))
        assert model.called.wait(WAIT)
        given_up = scheduler.submit("b")
        given_up.cancel()
        given_up.cancel()
        assert list(given_up) == []
        last = scheduler.submit("y", Sampling(max_tokens=1))
        gate.release(100)
        assert (running.result().text, last.result().text) == ("b", "z")
        assert [ids[0] for ids in model.calls] == [0, 24]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_thread_that_died_is_noticed() -> None:
    """A bug that ends the thread leaves a server that answers nobody: it must be started again."""

    class Broken(Recorder):
        def started(self, queue_seconds: float, prompt_tokens: int) -> None:
            raise RuntimeError("a bug")

    with held() as (scheduler, _, _):
        assert scheduler.is_alive
        scheduler.close()
        assert scheduler.is_alive, "it ended on purpose"
    scheduler = Scheduler(session(), observer=Broken())
    scheduler.submit("a")
    (thread,) = scheduler._threads
    thread.join(WAIT)
    assert not scheduler.is_alive


def test_result_of_a_cancelled_text_is_an_error() -> None:
    """Half an answer must not look like one."""
    with held() as (scheduler, model, gate):
        handle = scheduler.submit("a")
        assert model.called.wait(WAIT)
        handle.cancel()
        gate.release(100)
        with pytest.raises(UserError, match="cancelled"):
            handle.result()


def test_error_of_one_text_is_its_own() -> None:
    """The model fails on one prompt; the texts beside it go on, and so does the scheduler."""

    def script(ids: Sequence[int]) -> int:
        if ids[0] == 23 and len(ids) == 2:
            raise UserError("model", "cannot run x", "")
        return continue_alphabet(ids)

    with Scheduler(session(ScriptedModel(script))) as scheduler:
        good, bad, late = scheduler.submit("a"), scheduler.submit("x"), scheduler.submit("v")
        with pytest.raises(UserError, match="cannot run x"):
            bad.result()
        assert (good.result().text, late.result().text) == ("bcdefghijklmnopqrstuvwxyz", "wxyz")
        assert scheduler.submit("y").result().text == "z"


def test_bad_prompt_is_refused_at_once() -> None:
    """The one who asks gets the error; nothing is queued."""
    recorder = Recorder()
    with Scheduler(session(), observer=recorder) as scheduler, pytest.raises(UserError, match="is empty"):
        scheduler.submit("")
    assert recorder.depths == []


def test_closing_finishes_what_was_asked_for() -> None:
    """Running and waiting texts are answered, new ones are refused."""
    with held(max_active=1) as (scheduler, model, gate):
        handles = [scheduler.submit("v"), scheduler.submit("w")]
        assert model.called.wait(WAIT)
        closer = threading.Thread(target=scheduler.close)
        closer.start()
        while not scheduler.is_closing:
            pass
        with pytest.raises(ShuttingDownError, match="shutting down"):
            scheduler.submit("a")
        gate.release(100)
        assert [handle.result().text for handle in handles] == ["wxyz", "xyz"]
        closer.join(WAIT)
        assert not closer.is_alive()


@pytest.mark.parametrize("drain", [False, True], ids=["at once", "after a time"])
def test_closing_can_cancel(drain: bool) -> None:
    """The text that runs ends at its next step, one that waits never begins."""
    with held(max_active=1) as (scheduler, model, gate):
        handles = [scheduler.submit("a"), scheduler.submit("b")]
        assert model.called.wait(WAIT)
        closer = threading.Thread(target=lambda: scheduler.close(drain=drain, timeout=0.05))
        closer.start()
        assert handles[0]._cancelled.wait(WAIT)  # the time to drain is over, and the model still holds the first step
        gate.release(1)
        closer.join(WAIT)
        assert not closer.is_alive()
        assert [len(list(handle)) for handle in handles] == [1, 0]


def test_closing_tells_listeners_without_holding_up_others() -> None:
    """A listener that waits for a thread which asks for a text does not wait for ever."""
    refused = threading.Event()

    def ask(scheduler: Scheduler) -> None:
        with pytest.raises(UserError, match="shutting down"):
            scheduler.submit("a")
        refused.set()

    with held(max_active=1) as (scheduler, model, gate):
        told: list[bool] = []

        def listener(event: Event) -> None:
            threading.Thread(target=ask, args=[scheduler]).start()
            told.append(refused.wait(WAIT))
            gate.release(100)

        scheduler.submit("a")
        assert model.called.wait(WAIT)
        scheduler.submit("b", listener=listener)
        scheduler.close(drain=False)
        assert told == [True]


def test_listener_is_told_everything_in_order() -> None:
    """Pieces come to the listener as they come to the iterator."""
    events: list[Event] = []
    done = threading.Event()

    def listener(event: Event) -> None:
        events.append(event)
        if not isinstance(event, Piece) or event.finish_reason is not None:
            done.set()

    with Scheduler(session()) as scheduler:
        scheduler.submit("w", listener=listener)
        assert done.wait(WAIT)
    assert events == list(session().stream("w"))


def test_listener_that_is_gone_cancels_its_text() -> None:
    """A client that left does not keep its place, and hurts nobody."""
    recorder = Recorder()

    def gone(event: Event) -> None:
        raise ConnectionResetError

    with Scheduler(session(), max_active=1, observer=recorder) as scheduler:
        scheduler.submit("a", listener=gone)
        assert scheduler.submit("y").result().text == "z"
    assert recorder.outcomes == [("cancelled", 1), ("stop", 2)]


def test_observer_is_told_every_token_and_outcome() -> None:
    """Counts add up to what was written."""
    recorder = Recorder()
    with Scheduler(session(), observer=recorder) as scheduler:
        scheduler.submit("w").result()
        scheduler.submit("ab", Sampling(max_tokens=3)).result()
    assert recorder.outcomes == [("stop", 4), ("length", 3)]
    assert (recorder.first, recorder.more, recorder.prompts) == (2, 5, [1, 2])
    assert recorder.depths[-1] == (0, 0)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, 0)], ids=["workers", "active", "queue"])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    """No scheduler that could never run a text."""
    workers, max_active, max_queue = sizes
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(session(), workers=workers, max_active=max_active, max_queue=max_queue)
