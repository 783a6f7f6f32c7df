"""What is scraped must move with what happens, or nobody notices that a server is slow."""

from __future__ import annotations

from typing import Any

import pytest

from fptq_export.runtime import Session
from tests.serve.serving import NAME, Served, serving, until

TOKENS = 5


@pytest.fixture(scope="module")
def counted(session: Session) -> Served:
    """A server that answered one text of five tokens and refused two requests; it is gone, its numbers are there."""
    with serving(session) as server:
        body: dict[str, Any] = {"max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
        answer = server.openai.completions.create(model=NAME, prompt="An assignment", **body)
        assert answer.choices[0].finish_reason == "length"
        assert server.post("/v1/completions", prompt="").status_code == 400
        assert server.http.get("/v1/models/other").status_code == 404
        until(lambda: server.metric("fptq_num_requests_running") == 0.0)
        return server


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("fptq_requests_total", {"outcome": "length"}, 1),
        ("fptq_requests_total", {"outcome": "stop"}, 0),
        ("fptq_requests_total", {"outcome": "cancelled"}, 0),
        ("fptq_requests_total", {"outcome": "error"}, 0),
        ("fptq_requests_refused_total", {"status": "400"}, 1),
        ("fptq_requests_refused_total", {"status": "404"}, 1),
        ("fptq_num_requests_waiting", {}, 0),
        ("fptq_num_requests_running", {}, 0),
        ("fptq_generation_tokens_total", {}, TOKENS),
        ("fptq_request_queue_time_seconds_count", {}, 1),
        ("fptq_time_to_first_token_seconds_count", {}, 1),
        ("fptq_inter_token_latency_seconds_count", {}, TOKENS - 1),
    ],
)
def test_metric_counts(counted: Served, name: str, labels: dict[str, str], value: int) -> None:
    """One request, its tokens, its times, and what was refused; all labelled with the model."""
    assert counted.sample(name, model_name=NAME, **labels) == value


def test_prompt_tokens_are_those_of_the_tokenizer(counted: Served, session: Session) -> None:
    """Not characters, and not the answer."""
    assert counted.sample("fptq_prompt_tokens_total") == len(session.tokens("An assignment"))


def test_times_are_seconds(counted: Served) -> None:
    """The times of a tiny model add up to more than nothing and less than the test took."""
    for name in ("fptq_request_queue_time", "fptq_time_to_first_token", "fptq_inter_token_latency"):
        assert 0.0 < counted.sample(f"{name}_seconds_sum") < 60.0


def test_process_is_watched(counted: Served) -> None:
    """Memory that grows is seen."""
    assert counted.sample("process_resident_memory_bytes") > 1e6


def test_page_is_of_the_type_that_prometheus_reads(served: Served) -> None:
    """The version of the text format stands in the content type."""
    assert served.http.get("/metrics").headers["content-type"].startswith("text/plain; version=")
