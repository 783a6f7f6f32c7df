"""The CPU variant in the real server: what a client gets is what the session gives."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_export.runtime import Completion, Sampling, Session
from tests.support.triton_server import TritonServer

PROMPT = "An assignment"
NEW_TOKENS = 8
GENERATE, STREAM = "/v2/models/tiny/generate", "/v2/models/tiny/generate_stream"
SECONDS = 60.0
SAMPLED: Mapping[str, Any] = {"temperature": 0.75, "top_k": 40, "top_p": 0.5, "seed": 3}
"""Floats that FP32 holds exactly, so that the server samples with the same numbers."""
TYPES: dict[str, tuple[str, Any]] = {
    "temperature": ("FP32", np.float32),
    "top_k": ("INT32", np.int32),
    "top_p": ("FP32", np.float32),
}
TYPES |= {"seed": ("INT64", np.int64), "max_tokens": ("INT32", np.int32), "stream": ("BOOL", np.bool_)}
TYPES |= {"ignore_eos": ("BOOL", np.bool_)}


@pytest.fixture(scope="module")
def session(finished_run: Path) -> Session:
    """The same model in this process."""
    return Session.open(finished_run / "run", backend="onnxruntime", threads=1)


def completion(session: Session, **values: Any) -> Completion:
    """What the session gives."""
    return session.generate(PROMPT, Sampling(max_tokens=NEW_TOKENS, ignore_eos=True, **values))


def grpc_inputs(**values: Any) -> list[Any]:
    """Inputs of a request to the text model."""
    import tritonclient.grpc as grpc

    inputs = [grpc.InferInput("text_input", [1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array([PROMPT.encode()], np.object_))
    for name, value in values.items():
        kind, dtype = TYPES[name]
        inputs.append(grpc.InferInput(name, [1], kind))
        inputs[-1].set_data_from_numpy(np.array([value], dtype))
    return inputs


def streamed(server: TritonServer, inputs: list[Any]) -> tuple[str, list[int], str]:
    """Text, tokens and finish reason of a gRPC stream, and that each token came by itself."""
    import tritonclient.grpc as grpc

    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    text, tokens, reason = "", [], ""
    with grpc.InferenceServerClient(server.grpc_address) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        client.async_stream_infer("tiny", inputs)
        while not reason:
            result, error = responses.get(timeout=SECONDS)
            assert error is None, error
            ids = result.as_numpy("token_ids")
            assert len(ids) == 1
            tokens += ids.tolist()
            text += result.as_numpy("text_output")[0].decode()
            reason = result.as_numpy("finish_reason")[0].decode()
        client.stop_stream()
    return text, tokens, reason


@pytest.mark.parametrize("values", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_grpc_stream_is_what_the_session_gives(server: TritonServer, session: Session, values: dict[str, Any]) -> None:
    """Token by token over one gRPC stream; greedy, and sampled with a seed."""
    inputs = grpc_inputs(max_tokens=NEW_TOKENS, ignore_eos=True, stream=True, **values)
    expected = completion(session, **values)
    assert streamed(server, inputs) == (expected.text, list(expected.token_ids), expected.finish_reason)


def test_generate_gives_the_whole_text(server: TritonServer, session: Session) -> None:
    """One response over HTTP."""
    reply = server.post(GENERATE, {"text_input": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True})
    expected = completion(session)
    assert reply.status == 200, reply.text
    assert reply.document["text_output"] == expected.text
    assert reply.document["token_ids"] == list(expected.token_ids)
    assert reply.document["finish_reason"] == "length"


def test_generate_stream_gives_an_event_a_token(server: TritonServer, session: Session) -> None:
    """Server-sent events; sampling options may stand under `parameters`, as for Triton's other language models."""
    body = {"text_input": PROMPT, "stream": True, "parameters": {"max_tokens": NEW_TOKENS, "ignore_eos": True}}
    reply = server.post(STREAM, body)
    expected = completion(session)
    assert [event["token_ids"] for event in reply.events] == list(expected.token_ids)
    assert "".join(event["text_output"] for event in reply.events) == expected.text
    assert [event["finish_reason"] for event in reply.events] == ["", *[""] * (NEW_TOKENS - 2), "length"]


def test_stop_string_ends_the_text(server: TritonServer, session: Session) -> None:
    """Cut before the string, with the reason."""
    whole = completion(session).text
    stop = whole[len(whole) // 2 :][:3]
    body = {"text_input": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True, "stop": [stop]}
    reply = server.post(GENERATE, body).document
    assert (reply["text_output"], reply["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_texts_at_once_are_not_mixed_up(server: TritonServer, session: Session) -> None:
    """Each of several streams on one connection gets its own answer."""
    import tritonclient.grpc as grpc

    count = 12
    answers: dict[str, str] = {}
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc_address) as client:
        client.start_stream(lambda result, error: responses.put((result, error)))
        for seed in range(count):
            inputs = grpc_inputs(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=1.0, seed=seed)
            client.async_stream_infer("tiny", inputs, request_id=str(seed))
        while len(answers) < count:
            result, error = responses.get(timeout=SECONDS)
            assert error is None, error
            answers[result.get_response().id] = result.as_numpy("text_output")[0].decode()
        client.stop_stream()
    expected = {str(seed): completion(session, temperature=1.0, seed=seed).text for seed in range(count)}
    assert answers == expected
    assert len(set(expected.values())) > 1
