"""The server's page for Prometheus has what the text model counts."""

from __future__ import annotations

import re
import time
import urllib.request

from tests.support.triton_server import TritonServer

NEW_TOKENS = 5
SECONDS = 10.0
"""For counts to arrive: they are handed over once a second."""


def page(server: TritonServer) -> dict[str, float]:
    """Series with its labels, those of `tiny` -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=SECONDS) as reply:
        text = reply.read().decode()
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(fptq_\w+)\{(.*)\} (\S+)", line)
        if match and 'model_name="tiny"' in match[2]:
            labels = sorted(item for item in match[2].split(",") if not item.startswith(("model_name=", "version=")))
            found[match[1] + (f"{{{','.join(labels)}}}" if labels else "")] = float(match[3])
    return found


def test_every_token_and_outcome_is_counted(server: TritonServer) -> None:
    """A text of five tokens adds just that, and its times add up to less than the request took."""
    before = page(server)
    started = time.monotonic()
    body = {"text_input": "An assignment", "max_tokens": NEW_TOKENS, "ignore_eos": True}
    assert server.post("/v2/models/tiny/generate", body).status == 200
    seconds = time.monotonic() - started
    end = time.monotonic() + SECONDS
    while (after := page(server)).get("fptq_generation_tokens_total") != before[
        "fptq_generation_tokens_total"
    ] + NEW_TOKENS:
        assert time.monotonic() < end, after
        time.sleep(0.1)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown['fptq_requests_total{outcome="length"}'] == 1
    assert grown['fptq_requests_total{outcome="error"}'] == 0
    assert grown["fptq_time_to_first_token_seconds_count"] == 1
    assert grown["fptq_inter_token_latency_seconds_count"] == NEW_TOKENS - 1
    assert grown["fptq_request_queue_time_seconds_count"] == 1
    times = grown["fptq_time_to_first_token_seconds_sum"] + grown["fptq_inter_token_latency_seconds_sum"]
    assert 0.0 < times < seconds
    assert (after["fptq_num_requests_running"], after["fptq_num_requests_waiting"]) == (0, 0)


def test_buckets_are_cumulative(server: TritonServer) -> None:
    """Each bound counts what the bounds below count, the last everything: Prometheus takes quantiles of them."""
    found = page(server)
    buckets = {
        float(match[1]): value
        for name, value in found.items()
        if (match := re.fullmatch(r'fptq_time_to_first_token_seconds_bucket\{le="([^"]+)"\}', name))
    }
    counts = [buckets[bound] for bound in sorted(buckets)]
    assert len(counts) > 5
    assert counts == sorted(counts)
    assert counts[-1] == found["fptq_time_to_first_token_seconds_count"]
