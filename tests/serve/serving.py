"""A server on the loopback interface, in a thread of the tests, and models that a test can hold or break."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import numpy as np
import openai
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from fptq_export.runtime import Scheduler, Session
from fptq_export.runtime.metrics import Metrics
from fptq_export.serve.app import app_for_service
from fptq_export.serve.server import DrainingServer, socket_for_address, url_of_socket
from fptq_export.serve.service import Service
from fptq_export.verify.sessions import CausalSession

__all__ = ["NAME", "SECONDS", "Held", "Served", "held_session", "serving", "until"]

NAME = "tiny"
SECONDS = 60.0
"""For what takes a moment: finds what hangs, also on a machine with other work."""


@dataclass(frozen=True)
class Served:
    """A server that runs, and clients of it. Neither client tries anything twice."""

    url: str
    service: Service
    server: DrainingServer
    notes: list[str]
    openai: openai.OpenAI
    http: httpx2.Client

    def post(self, path: str, **body: Any) -> httpx2.Response:
        """Send a request of which the test gives every field but the model."""
        return self.http.post(path, json={"model": NAME, **body})

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels, as it is scraped."""
        return self._sum(self.http.get("/metrics").text, name, labels)

    def sample(self, name: str, **labels: str) -> float:
        """The same without the server, which may be gone."""
        return self._sum(self.service.metrics.page().decode(), name, labels)

    @staticmethod
    def _sum(page: str, name: str, labels: dict[str, str]) -> float:
        families = text_string_to_metric_families(page)
        samples = [sample for family in families for sample in family.samples if sample.name == name]
        assert samples, f"there is no metric {name}"
        return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())


class Held:
    """A model whose every call waits for the test; or fails as the test says.

    Args:
        model: Does the work.
    """

    def __init__(self, model: CausalSession) -> None:
        self._model = model
        self.calls = 0
        self.free = threading.Event()
        """Set, the model runs."""
        self.delay = 0.0
        """Seconds of every call."""
        self.error: Exception | None = None

    @property
    def name(self) -> str:
        """The model's."""
        return self._model.name

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
        """The model's, when it is free."""
        self._wait()
        return self._model.prefill(input_ids)

    def decode(self, input_ids: NDArray[np.int64], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """The model's, when it is free."""
        self._wait()
        return self._model.decode(input_ids, cache)

    def _wait(self) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        assert self.free.wait(SECONDS), "the test did not let the model go on"
        time.sleep(self.delay)


def held_session(session: Session) -> tuple[Session, Held]:
    """The same model, held by the test."""
    held = Held(session.model)
    return Session(held, session.tokenizer, session.limits), held


def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in another thread."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come about")


@contextmanager
def serving(
    session: Session,
    *,
    max_active: int = 16,
    max_queue: int = 256,
    keys: tuple[str, ...] = (),
    drain_timeout: float = SECONDS,
) -> Iterator[Served]:
    """Serve a session on a free port."""
    assert session.tokenizer is not None
    metrics = Metrics(NAME, ranges=session.ranges)
    scheduler = Scheduler(session, max_active=max_active, max_queue=max_queue, observer=metrics)
    service = Service(session, session.tokenizer, scheduler, metrics, NAME, max_queue, keys)
    notes: list[str] = []
    started = threading.Event()
    server = DrainingServer(
        app_for_service(service), scheduler, drain_timeout=drain_timeout, notify=notes.append, started=started.set
    )
    bound = socket_for_address("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    assert started.wait(SECONDS)
    url = url_of_socket(bound)
    key = keys[0] if keys else "none"
    try:
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=SECONDS) as client,
            httpx2.Client(base_url=url, timeout=SECONDS) as http,
        ):
            yield Served(url, service, server, notes, client, http)
    finally:
        server.stop(drain=False)
        thread.join(SECONDS)
        assert not thread.is_alive(), "the server did not stop"
