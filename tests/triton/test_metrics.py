"""The server's page for Prometheus has what the text model counts."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping
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

HANDOVERS_SECONDS = 2.5
"""Two of them come in this time."""
TIMES = ("fptq_time_to_first_token_seconds_sum", "fptq_inter_token_latency_seconds_sum")


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


def settled_page(server: TritonServer) -> dict[str, float]:
    """The page with all that was counted so far: what earlier tests did may still have to be handed over."""
    found, since = page(server), time.monotonic()
    end = since + SECONDS
    while time.monotonic() < since + HANDOVERS_SECONDS:
        assert time.monotonic() < end, f"the page does not come to rest: {found}"
        time.sleep(0.1)
        if (now := page(server)) != found:
            found, since = now, time.monotonic()
    return found


def grown_to(server: TritonServer, before: dict[str, float], expected: Mapping[str, float]) -> dict[str, float]:
    """What the page counts more than before, once that is what is expected.

    Series are handed over one after another: a page that is read meanwhile has the new values of some of them only.
    """
    end = time.monotonic() + SECONDS
    while True:
        grown = {name: value - before.get(name, 0.0) for name, value in page(server).items()}
        counts, sums = {name: grown[name] for name in expected}, [grown[name] for name in TIMES]
        if counts == expected and min(sums) > 0:
            return grown
        assert time.monotonic() < end, f"{counts}, {sums} in place of {expected}"
        time.sleep(0.1)


def test_every_token_and_outcome_is_counted(server: TritonServer) -> None:
    """A text of five tokens adds just that, and its times add up to less than the request took."""
    before = settled_page(server)
    started = time.monotonic()
    body = {"text_input": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}
    assert server.post("/v2/models/tiny/generate", body).status == 200
    seconds = time.monotonic() - started
    expected = {
        "fptq_generation_tokens_total": NEW_TOKENS,
        'fptq_requests_total{outcome="length"}': 1,
        'fptq_requests_total{outcome="error"}': 0,
        "fptq_time_to_first_token_seconds_count": 1,
        "fptq_inter_token_latency_seconds_count": NEW_TOKENS - 1,
        "fptq_request_queue_time_seconds_count": 1,
    }
    grown = grown_to(server, before, expected)
    assert sum(grown[name] for name in TIMES) < seconds
    after = settled_page(server)
    assert {name: after[name] - before[name] for name in expected} == expected
    assert (after["fptq_num_requests_running"], after["fptq_num_requests_waiting"]) == (0, 0)


def test_buckets_are_cumulative(server: TritonServer) -> None:
    """Each bound counts what the bounds below count, the last everything: Prometheus takes quantiles of them."""
    found = settled_page(server)
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
