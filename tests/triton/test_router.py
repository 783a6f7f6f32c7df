"""The router in the real server: the right model's answer, whole, and a log that says what happened."""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_export.cli import main
from fptq_export.runtime import Sampling, Session
from fptq_export.triton.serving.comparison_log import Comparison
from fptq_export.triton.serving.routing import ROUTE_HEADER
from tests.support.triton_server import TritonServer

PROMPT = "An assignment"
NEW_TOKENS = 6
SECONDS = 60.0
BODY = {"text_input": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True}


@pytest.fixture(scope="module")
def log(repository: Path) -> Path:
    """The comparison log of the router."""
    return repository.parent / "comparison.jsonl"


@pytest.fixture(scope="module")
def routed(repository: Path, finished_run: Path, server: TritonServer, log: Path) -> Iterator[TritonServer]:
    """The server with `tiny`, `tiny-float`, and `chat`, which divides requests; `tiny-float` is also the shadow."""
    words = ["--repository", str(repository)]
    float_words = ["--variant", "cpu", "--graph", "float", "--name", "tiny-float", "--threads", "1"]
    assert main(["triton", str(finished_run / "run"), *words, *float_words]) == 0
    router_words = ["--router", "chat", "--route", "tiny=1", "--route", "tiny-float=1", "--shadow", "tiny-float"]
    assert main(["triton", *words, *router_words, "--comparison-log", str(log), "--log-texts"]) == 0
    for name in ("tiny-float", "chat"):
        assert server.load(name).status == 200, server.log_text()[-2000:]
    yield server
    for name in ("chat", "tiny-float"):
        server.unload(name)


@pytest.fixture(scope="module")
def answers(finished_run: Path) -> dict[str, list[int]]:
    """Model -> the tokens it gives by itself."""
    graphs = {"tiny": "model.w4a8.onnx", "tiny-float": "model.onnx"}
    sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)
    return {
        name: list(Session.open(finished_run / "run" / graph, threads=1).generate(PROMPT, sampling).token_ids)
        for name, graph in graphs.items()
    }


def post(server: TritonServer, **values: Any) -> Any:
    """Ask the router."""
    return server.post("/v2/models/chat/generate", {**BODY, **values})


def line_of(log: Path, request_id: str) -> Comparison:
    """The log's one line of a request: written when the shadow has answered, which the client does not wait for."""
    end = time.monotonic() + SECONDS
    while not (found := [line for line in lines_of(log) if line.request_id == request_id]):
        assert time.monotonic() < end, f"no line of {request_id}"
        time.sleep(0.05)
    assert len(found) == 1
    return found[0]


def lines_of(log: Path) -> list[Comparison]:
    """The whole lines of the log."""
    texts = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    return [Comparison.model_validate_json(text) for text in texts if text.endswith("\n")]


def test_models_differ(answers: dict[str, list[int]]) -> None:
    """Else the tests below could not tell them apart."""
    assert answers["tiny"] != answers["tiny-float"]


@pytest.mark.parametrize("model", ["tiny", "tiny-float"])
def test_asked_model_answers(routed: TritonServer, answers: dict[str, list[int]], model: str) -> None:
    """Token for token."""
    reply = post(routed, route=model)
    assert reply.status == 200, reply.text
    assert (reply.document["token_ids"], reply.document["finish_reason"]) == (answers[model], "length")


@pytest.mark.parametrize("model", ["tiny", "tiny-float"])
def test_metadata_names_the_model(routed: TritonServer, answers: dict[str, list[int]], model: str) -> None:
    """For proxies, which do not look into requests."""
    import tritonclient.grpc as grpc

    values = {"text_input": np.array([PROMPT.encode()], np.object_), "max_tokens": np.array([NEW_TOKENS], np.int32)}
    values |= {"ignore_eos": np.array([True])}
    inputs = []
    for (name, value), kind in zip(values.items(), ("BYTES", "INT32", "BOOL"), strict=True):
        inputs.append(grpc.InferInput(name, [1], kind))
        inputs[-1].set_data_from_numpy(value)
    replies: queue.Queue[Any] = queue.Queue()
    with grpc.InferenceServerClient(routed.grpc_address) as client:
        client.start_stream(lambda result, error: replies.put(error or result), headers={ROUTE_HEADER: model})
        client.async_stream_infer("chat", inputs)
        assert replies.get(timeout=SECONDS).as_numpy("token_ids").tolist() == answers[model]
        client.stop_stream()


def test_stream_is_handed_on_token_by_token(routed: TritonServer, answers: dict[str, list[int]]) -> None:
    """An event for each token of the model that was asked."""
    reply = routed.post("/v2/models/chat/generate_stream", {**BODY, "stream": True, "route": "tiny"})
    assert [event["token_ids"] for event in reply.events] == answers["tiny"]


def test_one_id_goes_one_way_and_ids_go_both(routed: TritonServer, answers: dict[str, list[int]]) -> None:
    """The answer tells which model it was."""
    ways = {number: [post(routed, id=str(number)).document["token_ids"] for _ in range(2)] for number in range(6)}
    assert all(first == second for first, second in ways.values())
    assert {tuple(first) for first, _ in ways.values()} == {tuple(ids) for ids in answers.values()}


def test_log_says_who_answered_and_what_the_shadow_said(
    routed: TritonServer, answers: dict[str, list[int]], log: Path
) -> None:
    """One line: model, tokens, times, and how far both agree."""
    reply = post(routed, id="compared", route="tiny").document
    line = line_of(log, "compared")
    common = next(at for at, pair in enumerate(zip(*answers.values(), strict=True)) if pair[0] != pair[1])
    assert line.shadow is not None
    assert (line.answer.model, line.reason, line.answer.tokens) == ("tiny", "asked", NEW_TOKENS)
    assert (line.shadow.model, line.shadow.tokens, line.common_tokens, line.same) == (
        "tiny-float",
        NEW_TOKENS,
        common,
        False,
    )
    assert line.answer.first_token_seconds is not None
    assert 0.0 < line.answer.first_token_seconds <= line.answer.seconds
    assert (line.prompt, line.answer.text) == (PROMPT, reply["text_output"])


def test_unknown_route_is_refused(routed: TritonServer) -> None:
    """By name, and nobody else answers."""
    reply = post(routed, route="nobody")
    assert reply.status == 400
    assert "there is none to 'nobody'" in reply.text


def test_error_of_the_model_reaches_the_client(routed: TritonServer) -> None:
    """A prompt that is too long, as without the router."""
    reply = post(routed, route="tiny", text_input="word " * 4000)
    assert reply.status == 400
    assert "the model takes" in reply.text


def test_router_outlives_a_model(routed: TritonServer, answers: dict[str, list[int]]) -> None:
    """With one model gone its requests get an error that names it; the other answers as before."""
    assert routed.unload("tiny-float").status == 200
    try:
        reply = post(routed, route="tiny-float")
        assert reply.status == 400, reply.text  # the server's HTTP form of every error of a model
        assert "'tiny-float' is not ready" in reply.text
        assert post(routed, route="tiny").document["token_ids"] == answers["tiny"]
    finally:
        assert routed.load("tiny-float").status == 200


def test_full_router_refuses(repository: Path, server: TritonServer) -> None:
    """One on its way, one behind it: of a dozen at once some are told to come again, the others are answered whole."""
    words = ["--repository", str(repository), "--router", "small", "--route", "tiny=1"]
    assert main(["triton", *words, "--max-active", "1", "--max-queue", "1"]) == 0
    assert server.load("small").status == 200, server.log_text()[-2000:]
    body = {**BODY, "max_tokens": 40}
    try:
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: server.post("/v2/models/small/generate", body), range(12)))
        refused = [reply for reply in replies if reply.status != 200]
        assert all("as many requests wait already as may" in reply.text for reply in refused), refused
        assert 1 <= len(refused) <= 10
        assert {len(reply.document["token_ids"]) for reply in replies if reply.status == 200} == {40}
        assert server.post("/v2/models/small/generate", BODY).status == 200
    finally:
        server.unload("small")


def test_run_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a router, what is missing is the run directory."""
    assert main(["triton", "--repository", str(tmp_path)]) == 1
    assert "DIR: is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--route", "missing=1"], "has no model missing"),
        (["--route", "tiny"], "not of the form MODEL=SHARE"),
        (["--route", "tiny=-1"], "greater than 0"),
        (["--route", "tiny=1", "--shadow", "tiny"], "comparison log"),
        (["--route", "tiny=1", "--variant", "cpu"], "is no option of a router"),
        ([], "--route"),
    ],
    ids=["model", "form", "share", "shadow", "option", "none"],
)
def test_wrong_options_are_refused(
    repository: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it is said, and nothing is written."""
    before = json.dumps(sorted(map(str, repository.rglob("*"))))
    assert main(["triton", "--repository", str(repository), "--router", "other", *words]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
    assert json.dumps(sorted(map(str, repository.rglob("*")))) == before
