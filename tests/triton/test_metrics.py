"""The server's page for Prometheus has what the text model counts."""

from __future__ import annotations

import re
import time
import urllib.request
from pathlib import Path
from typing import Literal

import pytest

from fptq_export.policy import read_policy
from fptq_export.runtime import Sampling, Session
from fptq_export.triton.options import TritonOptions, Variant
from fptq_export.triton.run import run_triton
from tests.support.triton_server import TritonServer
from tests.triton.engine_runs import engine_run, stand_in

NEW_TOKENS = 5
PROMPT = "An assignment"
SECONDS = 10.0
"""For counts to arrive: they are handed over once a second."""


def page(server: TritonServer, model: str = "tiny") -> dict[str, float]:
    """Series with its labels, those of one model -> value."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.metrics_port}/metrics", timeout=SECONDS) as reply:
        text = reply.read().decode()
    found = {}
    for line in text.splitlines():
        match = re.fullmatch(r"(fptq_\w+)\{(.*)\} (\S+)", line)
        if match and f'model_name="{model}"' in match[2]:
            pairs = re.findall(r'(\w+)=("[^"]*")', match[2])
            labels = sorted(f"{name}={value}" for name, value in pairs if name not in ("model_name", "version"))
            found[match[1] + (f"{{{','.join(labels)}}}" if labels else "")] = float(match[3])
    return found


def test_every_token_and_outcome_is_counted(server: TritonServer) -> None:
    """A text of five tokens adds just that, and its times add up to less than the request took."""
    before = page(server)
    started = time.monotonic()
    body = {"text_input": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}
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


@pytest.fixture(params=["cpu", "stateless"])
def ranged(
    request: pytest.FixtureRequest, server: TritonServer, repository: Path, finished_run: Path, tmp_path: Path
) -> tuple[str, Path]:
    """A text model whose graph, or engine, says what it clips; and the run it is of."""
    variant: Variant = request.param
    name = f"ranged-{variant}"
    run = engine_run(finished_run, tmp_path / "run", "static", "--emit-range-outputs")
    run_triton(TritonOptions(source=run, repository=repository, name=name, variant=variant, threads=1), "fptq-export")
    if variant == "stateless":
        stand_in(repository / f"{name}-plan", run)
        assert server.load(f"{name}-plan").status == 200, server.log_text()[-3000:]
    assert server.load(name).status == 200, server.log_text()[-3000:]
    return name, run


def test_what_static_layers_clip_is_counted(server: TritonServer, ranged: tuple[str, Path]) -> None:
    """Every value that the layers quantized; and the text is still the session's, though an output has no batch."""
    name, run = ranged
    body = {"text_input": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    kernels: Literal["auto", "stock"] = "auto" if name.endswith("cpu") else "stock"
    with Session.open(run, backend="onnxruntime", kernels=kernels, threads=1) as session:
        expected = session.generate(PROMPT, Sampling(max_tokens=NEW_TOKENS, ignore_eos=True))
    path = "model.layers.1.self_attn.o_proj"
    values = (expected.prompt_tokens + NEW_TOKENS - 1) * read_policy(run / "policy.json").layers[path].in_features
    reply = server.post(f"/v2/models/{name}/generate", body)
    assert reply.status == 200, f"{reply.text}\n{server.log_text()[-3000:]}"
    assert reply.document["token_ids"] == list(expected.token_ids)
    series = f'fptq_static_activation_values_total{{layers="{path}"}}'
    end = time.monotonic() + SECONDS
    while page(server, name)[series] != values:
        assert time.monotonic() < end, page(server, name)
        time.sleep(0.1)


def test_run_without_the_output_has_no_such_metric(server: TritonServer) -> None:
    """It is absent and not 0."""
    assert not [series for series in page(server) if "static" in series]
