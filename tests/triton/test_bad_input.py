"""What a client can get wrong: it is told what, and the server lives."""

from __future__ import annotations

import http.client
import json
import queue
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.triton_server import TritonServer

GENERATE = "/v2/models/tiny/generate"
BAD_REQUEST, SERVER_ERROR = 400, 500
SECONDS = 60.0
LONG: dict[str, Any] = {"text_input": "An assignment", "max_tokens": 1500, "ignore_eos": True, "stream": True}
"""Runs for seconds, so that it is still running when its client goes."""


@pytest.fixture(autouse=True)
def _server_lives(server: TritonServer) -> Iterator[None]:
    """After each test the model answers a good request."""
    yield
    reply = server.post(GENERATE, {"text_input": "x", "max_tokens": 1})
    assert reply.status == 200, reply.text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"text_input": ""}, "prompt: is empty"),
        ({"text_input": "x " * 2000}, "the model takes 1024"),
        ({"max_tokens": 3}, "text_input"),
        ({"text_input": ["a", "b"]}, "text_input"),
        ({"text_input": "x", "max_tokens": 0}, "max_tokens"),
        ({"text_input": "x", "temperature": -1.0}, "temperature"),
        ({"text_input": "x", "top_p": 2.0, "top_k": -1}, "top_k"),
        ({"text_input": "x", "seed": -5}, "seed"),
        ({"text_input": "x", "stop": ["", "a"]}, "stop"),
    ],
)
def test_http_client_is_told_what_is_wrong(server: TritonServer, body: dict[str, Any], message: str) -> None:
    """Status 400, and the input's name in the text."""
    reply = server.post(GENERATE, body)
    assert reply.status == BAD_REQUEST
    assert message in reply.document["error"]


def test_every_wrong_value_is_named(server: TritonServer) -> None:
    """One answer for all of them."""
    body = {"text_input": "x", "temperature": -1.0, "top_p": 2.0, "max_tokens": -1}
    error = server.post(GENERATE, body).document["error"]
    assert [name for name in ("temperature", "top_p", "max_tokens") if name not in error] == []


@pytest.mark.parametrize(
    "body", [b'{"text_input": "x', b'{"text_input": 3}', b'{"text_input": "x", "max_tokens": "many"}']
)
def test_json_that_is_none_or_of_other_types_is_refused(server: TritonServer, body: bytes) -> None:
    """By the server itself, which calls that its own error."""
    reply = server.post(GENERATE, body)
    assert reply.status == SERVER_ERROR
    assert "JSON" in reply.document["error"]


def tensor(name: str, shape: list[int], kind: str, values: Any) -> Any:
    """An input of a gRPC request."""
    import tritonclient.grpc as grpc

    item = grpc.InferInput(name, shape, kind)
    item.set_data_from_numpy(values)
    return item


def text(*prompts: bytes) -> Any:
    """The prompt as a gRPC client sends it."""
    return tensor("text_input", [len(prompts)], "BYTES", np.array(prompts, np.object_))


BAD_TENSORS: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "invalid UTF-8": (lambda: [text(b"ab\xff\xfe")], "is not UTF-8 (byte 2"),
    "wrong dtype": (
        lambda: [text(b"x"), tensor("max_tokens", [1], "FP32", np.ones(1, np.float32))],
        "data-type",
    ),
    "wrong shape": (lambda: [text(b"a", b"b")], "unexpected shape"),
    "wrong rank": (
        lambda: [text(b"x"), tensor("max_tokens", [1, 1], "INT32", np.ones((1, 1), np.int32))],
        "unexpected shape",
    ),
    "unknown input": (lambda: [text(b"x"), tensor("beam", [1], "INT32", np.ones(1, np.int32))], "beam"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_grpc_client_is_told_what_is_wrong(server: TritonServer, case: str) -> None:
    """Types, shapes and ranks by the server, bytes by the model."""
    import tritonclient.grpc as grpc

    make, message = BAD_TENSORS[case]
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpc.InferenceServerClient(server.grpc_address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("tiny", make())
        _, error = answers.get(timeout=SECONDS)
        client.stop_stream()
    assert message in str(error)


def test_cancelled_stream_stops_the_text(server: TritonServer) -> None:
    """The model notices, and takes the place for others; the client waits for nothing."""
    import tritonclient.grpc as grpc

    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    before = len(tokens_of_cancelled(server))
    with grpc.InferenceServerClient(server.grpc_address) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        inputs = [text(b"An assignment"), tensor("max_tokens", [1], "INT32", np.array([LONG["max_tokens"]], np.int32))]
        inputs += [tensor(name, [1], "BOOL", np.ones(1, np.bool_)) for name in ("stream", "ignore_eos")]
        client.async_stream_infer("tiny", inputs)
        result, error = answers.get(timeout=SECONDS)
        assert error is None
        assert len(result.as_numpy("token_ids")) == 1
        client.stop_stream(cancel_requests=True)
    assert_cancelled(server, before)


def test_client_that_is_gone_stops_the_text(server: TritonServer) -> None:
    """A closed connection in the middle of a stream of events."""
    before = len(tokens_of_cancelled(server))
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=SECONDS)
    connection.request("POST", "/v2/models/tiny/generate_stream", json.dumps(LONG))
    with connection.getresponse() as reply:
        assert reply.readline().startswith(b"data: ")
    connection.close()
    assert_cancelled(server, before)


def tokens_of_cancelled(server: TritonServer) -> list[int]:
    """How far each text had come that was cancelled, by the server's log."""
    return [int(tokens) for tokens in re.findall(r"cancelled after (\d+) tokens", server.log_text())]


def assert_cancelled(server: TritonServer, before: int) -> None:
    """One more text was cancelled, in its middle."""
    end = time.monotonic() + SECONDS
    while len(found := tokens_of_cancelled(server)) == before:
        assert time.monotonic() < end, server.log_text()[-2000:]
        time.sleep(0.05)
    assert 0 < found[-1] < LONG["max_tokens"]
