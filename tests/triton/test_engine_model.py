"""The text model that calls an engine, in the real server; ONNX Runtime stands in for the engine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fptq_export.runtime import Sampling, Session
from fptq_export.triton.options import TritonOptions, Variant
from fptq_export.triton.run import run_triton
from tests.support.triton_server import TritonServer
from tests.triton.engine_runs import LIMITS, engine_run, stand_in

PROMPT = "An assignment"
NEW_TOKENS = 8
SECONDS = 10.0
FORMS: list[tuple[str, Variant]] = [("concat", "stateless"), ("static", "stateless"), ("static", "stateful")]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def served(
    request: pytest.FixtureRequest, server: TritonServer, repository: Path, finished_run: Path, tmp_path_factory: Any
) -> tuple[str, Path]:
    """A loaded text model above a stand-in, and the run they are of."""
    kv_cache, variant = request.param
    name = f"{kv_cache}-{variant}"
    run = engine_run(finished_run, tmp_path_factory.mktemp(name) / "run", kv_cache)
    run_triton(TritonOptions(source=run, repository=repository, name=name, variant=variant), "fptq-export triton")
    stand_in(repository / f"{name}-plan", run)
    for model in (f"{name}-plan", name):
        reply = server.load(model)
        assert reply.status == 200, f"{reply.text}\n{server.log_text()[-3000:]}"
    return name, run


def generated(server: TritonServer, name: str, **body: Any) -> Any:
    """An answer."""
    reply = server.post(f"/v2/models/{name}/generate", {"text_input": PROMPT, "ignore_eos": True, **body})
    assert reply.status == 200, f"{reply.text}\n{server.log_text()[-3000:]}"
    return reply.document


def test_text_is_what_the_session_gives(server: TritonServer, served: tuple[str, Path]) -> None:
    """With the cache carried from call to call, in every form; once and once more, for what a text leaves behind."""
    name, run = served
    session = Session.open(run, backend="onnxruntime", kernels="stock", threads=1)
    for seed in (1, 2):
        sampling = Sampling(max_tokens=NEW_TOKENS, temperature=1.0, seed=seed, ignore_eos=True)
        expected = session.generate(PROMPT, sampling)
        answer = generated(server, name, max_tokens=NEW_TOKENS, temperature=1.0, seed=seed)
        assert answer["token_ids"] == list(expected.token_ids)
        assert answer["text_output"] == expected.text


def test_sequences_end_with_their_texts(server: TritonServer, served: tuple[str, Path]) -> None:
    """The server keeps no cache of a text that is written; where the text model carries it, it never keeps one."""
    name, _ = served
    generated(server, name, max_tokens=3)
    if "stateful" not in name:
        assert "sequences kept" not in server.log_text()
        return
    end = time.monotonic() + SECONDS
    while not server.log_text().rpartition("sequences kept: ")[2].startswith("0"):
        assert time.monotonic() < end, server.log_text()[-2000:]
        time.sleep(0.05)


def test_prompt_longer_than_the_profile_is_refused(server: TritonServer, served: tuple[str, Path]) -> None:
    """With its length and the limit, before the engine sees it."""
    name, _ = served
    body = {"text_input": PROMPT * LIMITS.max_input_len}
    reply = server.post(f"/v2/models/{name}/generate", body)
    assert reply.status == 400
    assert f"the model takes {LIMITS.max_input_len}" in reply.document["error"]


def test_text_ends_where_the_cache_does(server: TritonServer, served: tuple[str, Path]) -> None:
    """No call lies outside the profile: the text is cut, and its finish reason says so."""
    name, run = served
    prompt = len(Session.open(run, backend="onnxruntime", kernels="stock", threads=1).tokens(PROMPT))
    slots = LIMITS.max_kv_len + LIMITS.max_input_len if name.startswith("static") else LIMITS.max_kv_len + 1
    answer = generated(server, name, max_tokens=2 * slots)
    assert len(answer["token_ids"]) == slots - prompt + 1
    assert answer["finish_reason"] == "length"


def test_engine_that_is_not_loaded_is_an_answer(
    server: TritonServer, repository: Path, finished_run: Path, tmp_path: Path
) -> None:
    """The text model says which model it lacks, and the server lives."""
    run = engine_run(finished_run, tmp_path / "run", "concat")
    run_triton(TritonOptions(source=run, repository=repository, name="lonely"), "fptq-export triton")
    assert server.load("lonely").status == 200
    reply = server.post("/v2/models/lonely/generate", {"text_input": PROMPT})
    assert reply.status == 400
    assert "lonely-plan version 1: cannot run" in reply.document["error"]
    assert server.is_live()
