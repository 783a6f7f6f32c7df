"""Clients that leave, and servers that are told to: nothing is lost, and nothing goes on for nobody."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest

from fptq_export.runtime import Session
from tests.serve.serving import NAME, SECONDS, Served, held_session, serving, until

LONG: dict[str, Any] = {"model": NAME, "max_tokens": 400, "temperature": 0.0, "extra_body": {"ignore_eos": True}}


def leave_a_stream(server: Served) -> None:
    """Read the beginning of a stream, and close it."""
    stream = server.openai.completions.create(prompt="a", stream=True, **LONG)
    next(iter(stream))
    stream.close()


def leave_an_answer(server: Served) -> None:
    """Ask for a whole answer, and do not wait for it; the server has the question."""
    with pytest.raises(openai.APITimeoutError):
        server.openai.with_options(timeout=openai.Timeout(SECONDS, read=0.2)).completions.create(prompt="a", **LONG)


@pytest.mark.parametrize("leave", [leave_a_stream, leave_an_answer])
def test_text_of_a_client_that_left_is_cancelled(session: Session, leave: Callable[[Served], None]) -> None:
    """Its place is free long before the text would have ended."""
    slow, held = held_session(session)
    held.delay = 0.02
    held.free.set()
    with serving(slow, max_active=1) as server:
        leave(server)
        until(lambda: server.metric("fptq_requests_total", outcome="cancelled") == 1.0)
        until(lambda: server.metric("fptq_num_requests_running") == 0.0)  # counted behind the outcome
        assert held.calls < LONG["max_tokens"]


def test_stream_that_nobody_began_to_read_is_cancelled(session: Session) -> None:
    """A client that left while its prompt was read is noticed before the first event, too."""
    slow, held = held_session(session)
    body = json.dumps({"model": NAME, "prompt": "a", "stream": True, "max_tokens": 400, "ignore_eos": True}).encode()
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    headers = [(b"content-type", b"application/json")]
    address = {"path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"", "root_path": ""}
    scope = {"type": "http", "asgi": {"spec_version": "2.3"}, "method": "POST", "headers": headers, **address}

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    async def send(message: object) -> None:
        await asyncio.sleep(0)

    with serving(slow) as server:
        application: Any = server.server.config.app

        async def leave_at_once() -> None:
            await application({**scope, "state": {}}, receive, send)
            held.free.set()  # the event loop goes on: without one the text could not be delivered, and would end
            await asyncio.to_thread(until, lambda: server.metric("fptq_num_requests_running") == 0.0)

        asyncio.run(leave_at_once())
        assert server.metric("fptq_requests_total", outcome="cancelled") == 1.0
        assert held.calls <= 1


def test_client_that_leaves_the_queue_keeps_nobody_out(session: Session) -> None:
    """A text that waits for nobody leaves the queue while another one runs."""
    slow, held = held_session(session)
    body: dict[str, Any] = {**LONG, "prompt": "a", "max_tokens": 1}
    with serving(slow, max_active=1, max_queue=1) as server:
        first = server.openai.completions.create(stream=True, **body)
        until(lambda: held.calls == 1)
        leave_an_answer(server)
        until(lambda: server.metric("fptq_requests_total", outcome="cancelled") == 1.0)
        assert server.metric("fptq_num_requests_waiting") == 0.0
        last = server.openai.completions.create(stream=True, **body)
        held.free.set()
        assert [chunk.choices[0].finish_reason for stream in (first, last) for chunk in stream] == ["length"] * 2
        assert held.calls == 2


def test_draining_server_finishes_and_takes_no_more(session: Session) -> None:
    """After the signal: not ready but alive, new requests are sent elsewhere, the running ones end as they would."""
    slow, held = held_session(session)
    body: dict[str, Any] = {**LONG, "prompt": "a", "max_tokens": 4}
    with serving(slow) as server, ThreadPoolExecutor(1) as pool:
        assert server.http.get("/ready").status_code == 200
        stream = server.openai.completions.create(stream=True, **body)
        whole = pool.submit(lambda: server.openai.completions.create(**body))
        until(lambda: server.metric("fptq_num_requests_waiting") == 1.0)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.http.get("/ready").status_code == 503)
        assert server.http.get("/health").status_code == 200
        answer = server.post("/v1/completions", prompt="a")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in answer.headers
        held.free.set()
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        assert whole.result(SECONDS).choices[0].finish_reason == "length"
        until(lambda: refuses_connections(server))
    assert server.notes == ["SIGTERM: running texts are finished; again to cancel them"]


@pytest.mark.parametrize("end", ["signal", "time"])
def test_texts_that_do_not_end_are_cancelled(session: Session, end: str) -> None:
    """By a second signal, or when their time is over: their clients are told, and the server ends."""
    slow, held = held_session(session)
    held.delay = 0.02
    held.free.set()
    timeout = 0.2 if end == "time" else SECONDS
    with serving(slow, drain_timeout=timeout) as server, ThreadPoolExecutor(1) as pool:
        stream = iter(server.openai.completions.create(prompt="a", stream=True, **LONG))
        next(stream)
        whole = pool.submit(lambda: server.openai.completions.create(prompt="a", **LONG))
        until(lambda: server.metric("fptq_num_requests_running") == 2.0)
        for _ in range(2 if end == "signal" else 1):
            server.server.handle_exit(signal.SIGINT, None)
        with pytest.raises(openai.APIError, match="is shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="is shutting down") as caught:
            whole.result(SECONDS)
        assert caught.value.status_code == 503
        until(lambda: refuses_connections(server))


def test_dead_thread_makes_the_server_unhealthy(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose model's thread died answers probes with 503, so that it is started again."""
    with serving(session) as server:
        assert server.http.get("/health").status_code == 200
        dead = threading.Thread()
        monkeypatch.setattr(server.service.scheduler, "_threads", [*server.service.scheduler._threads, dead])
        assert server.http.get("/health").status_code == 503
        monkeypatch.undo()


def refuses_connections(server: Served) -> bool:
    try:
        httpx2.get(f"{server.url}/health", timeout=SECONDS)
    except httpx2.ConnectError:
        return True
    except httpx2.TransportError:  # closed while it was answering
        return False
    return False
