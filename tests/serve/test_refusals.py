"""Every request that cannot be served gets OpenAI's form of an error with the right status, and the server lives."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest

from fptq_export.errors import UserError
from fptq_export.runtime import Session
from fptq_export.serve.body_limit import MAX_BODY_BYTES
from tests.serve.serving import NAME, Served, held_session, serving, until

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]
UNKNOWN, UNSUPPORTED = "unknown_parameter", "unsupported_parameter"


def error_of(answer: httpx2.Response, status: int) -> dict[str, Any]:
    """The error of an answer, which has all four fields."""
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("field", "value", "code", "words"),
    [
        ("prompt", "", None, "is empty"),
        ("prompt", [], None, "an empty list"),
        ("prompt", ["a", ""], None, "is empty"),
        ("prompt", {"text": "a"}, None, "list of token ids"),
        ("prompt", [1, "a"], None, "list of token ids"),
        ("prompt", [-1], None, "-1 is no token"),
        ("prompt", [5, 512], None, "512 is no token"),
        ("prompt", "a " * 2000, "context_length_exceeded", "the model takes"),
        ("prompt", "\ud800", None, "valid Unicode"),
        ("prompt", ["a"] * 257, None, "more than may wait"),
        ("max_tokens", 0, None, "greater than 0"),
        ("max_tokens", "5", None, "valid integer"),
        ("temperature", -0.1, None, "greater than or equal to 0"),
        ("temperature", 2.1, None, "less than or equal to 2"),
        ("top_p", 0, None, "greater than 0"),
        ("top_k", -1, None, "greater than or equal to 0"),
        ("seed", -1, None, "greater than or equal to 0"),
        ("n", 2, None, "should be 1"),
        ("stop", "", None, "none of them empty"),
        ("stop", ["a"] * 17, None, "up to 16"),
        ("stream", "yes", None, "valid boolean"),
        ("stream_options", {"include_usage": True}, None, "stream: true"),
        ("logprobs", 1, UNSUPPORTED, "not supported"),
        ("logprobs", 0, UNSUPPORTED, "not supported"),
        ("best_of", 2, UNSUPPORTED, "not supported"),
        ("suffix", "end", UNSUPPORTED, "not supported"),
        ("frequency_penalty", 0.5, UNSUPPORTED, "not supported"),
        ("presence_penalty", -1, UNSUPPORTED, "not supported"),
        ("logit_bias", {"50": 1}, UNSUPPORTED, "not supported"),
        ("min_tokens", 3, UNKNOWN, "not a field"),
        ("suffix", "\ud800", UNSUPPORTED, "not supported"),
        ("stop", ["\ud800"], None, "valid Unicode"),
        ("messages", HELLO, UNKNOWN, "not a field"),
    ],
)
def test_bad_field_of_a_completion_is_refused(
    served: Served, field: str, value: object, code: str | None, words: str
) -> None:
    """Status 400 names the field; what would change the answer and is not obeyed is refused, not ignored."""
    body = json.dumps({"model": NAME, "prompt": "a", field: value})  # json writes a lone surrogate, httpx does not
    answer = served.http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    error = error_of(answer, 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", field, code)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "code", "words"),
    [
        ("messages", [], None, "at least 1 item"),
        ("messages", "hello", None, "valid list"),
        ("messages", [{"role": "user", "content": "\ud800"}], None, "valid Unicode"),
        ("messages", [{"role": "user"}], None, "Field required"),
        ("messages", [{"role": "tool", "content": "4"}], None, "'developer', 'system', 'user' or 'assistant'"),
        ("messages", [{"role": "user", "content": [{"type": "image_url"}]}], None, "parts of type text"),
        ("messages", [{"role": "assistant", "content": "a"}], None, "the first message must not be an answer"),
        ("messages", [{"role": "user", "content": "a " * 2000}], "context_length_exceeded", "the model takes"),
        ("messages", [{**HELLO[0], "tool_calls": [{"id": "1"}]}], UNSUPPORTED, "not supported"),
        ("max_completion_tokens", 0, None, "greater than 0"),
        ("logprobs", True, UNSUPPORTED, "not supported"),
        ("tools", [{"type": "function"}], UNSUPPORTED, "not supported"),
        ("tool_choice", "required", UNSUPPORTED, "not supported"),
        ("response_format", {"type": "json_object"}, UNSUPPORTED, "not supported"),
        ("modalities", ["text", "audio"], UNSUPPORTED, "not supported"),
        ("reasoning_effort", "high", UNSUPPORTED, "not supported"),
        ("prompt", "a", UNKNOWN, "not a field"),
    ],
)
def test_bad_field_of_a_chat_is_refused(
    served: Served, field: str, value: object, code: str | None, words: str
) -> None:
    """As of a completion; the chat template may refuse the messages too."""
    body = json.dumps({"model": NAME, "messages": HELLO, field: value})
    answer = served.http.post(CHATS, content=body, headers={"Content-Type": "application/json"})
    error = error_of(answer, 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", field, code)
    assert words in error["message"]


def test_two_lengths_are_refused(served: Served) -> None:
    """The old and the new name of the same field must not say different things."""
    body = {"messages": HELLO, "max_tokens": 2}
    assert error_of(served.post(CHATS, max_completion_tokens=3, **body), 400)["param"] == "max_tokens"
    assert served.post(CHATS, max_completion_tokens=2, **body).status_code == 200


def test_fields_that_change_nothing_are_taken(served: Served) -> None:
    """Clients send many fields with the value that means nothing, and some that are not about the answer."""
    common = {"max_tokens": 1, "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "user": "me"}
    nothing = {"seed": None, "stop": None, "stream": None, "stream_options": None, "temperature": None, "top_p": None}
    completion = {"prompt": "a", "best_of": 1, "logprobs": None, "suffix": None, "echo": None}
    chat = {"messages": HELLO, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "store": False}
    more = {"logprobs": False, "metadata": {"a": "b"}, "service_tier": "auto", "parallel_tool_calls": True}
    assert served.post(COMPLETIONS, **common, **nothing, **completion).status_code == 200
    assert served.post(CHATS, **common, **nothing, **chat, **more).status_code == 200


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"model": "tiny", "prompt": "\xff"}', "not UTF-8"),
        (b'{"model": "tiny", "prompt": ', "not JSON"),
        (b"[]", "no JSON object"),
        (b'{"prompt": "a"}', "model: Field required"),
        (b'{"model": "\\ud800", "prompt": "a"}', "not valid Unicode"),
        (b'{"model": "tiny", "prompt": "a", "\\udfff": 1}', "as a unicode string"),
    ],
)
def test_body_that_is_no_request_is_refused(served: Served, body: bytes, words: str) -> None:
    """Invalid UTF-8, half a document, no object, no model."""
    answer = served.http.post(COMPLETIONS, content=body, headers={"Content-Type": "application/json"})
    assert words in error_of(answer, 400)["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_body_that_fills_the_memory_is_refused(served: Served, chunked: bool) -> None:
    """Whether its length is announced or not."""
    part = b" " * (1 << 20)
    count = (MAX_BODY_BYTES >> 20) + 1
    headers = {"Content-Type": "application/json"}
    content: Any = (part for _ in range(count)) if chunked else part * count
    error = error_of(served.http.post(COMPLETIONS, content=content, headers=headers), 413)
    assert "more than 16 MiB" in error["message"]


def test_unknown_model_is_refused_by_name(served: Served) -> None:
    """Status 404 for each endpoint that names a model, and says which one is here."""
    for answer in (
        served.http.post(COMPLETIONS, json={"model": "gpt", "prompt": "a"}),
        served.http.post(CHATS, json={"model": "gpt", "messages": HELLO}),
        served.http.get("/v1/models/gpt"),
    ):
        error = error_of(answer, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert NAME in error["message"]


def test_unknown_address_is_refused_in_the_same_form(served: Served) -> None:
    """Also what the router refuses reads as an error of OpenAI."""
    assert error_of(served.http.get("/v1/embeddings"), 404)["message"] == "Not Found"
    assert error_of(served.http.delete("/v1/models"), 405)["message"] == "Method Not Allowed"


def test_client_raises_its_own_errors(served: Served) -> None:
    """OpenAI's client finds message, code and parameter where it looks for them."""
    with pytest.raises(openai.BadRequestError, match="is empty") as caught:
        served.openai.completions.create(model=NAME, prompt="")
    assert caught.value.param == "prompt"
    with pytest.raises(openai.NotFoundError) as missing:
        served.openai.completions.create(model="gpt", prompt="a")
    assert missing.value.code == "model_not_found"


def test_key_is_asked_for(session: Session) -> None:
    """Without one of the keys there is no model; probes and scrapes need none, and every key works."""
    with serving(session, keys=("first", "second")) as locked:
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            answer = locked.http.get("/v1/models", headers=headers)
            assert error_of(answer, 401)["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert locked.openai.models.list().data[0].id == NAME
        assert locked.openai.with_options(api_key="second").models.list().data[0].id == NAME
        assert [locked.http.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200] * 3
        with pytest.raises(openai.AuthenticationError):
            locked.openai.with_options(api_key="third").completions.create(model=NAME, prompt="a")


def test_full_queue_asks_to_come_back(session: Session) -> None:
    """Status 429 and when to try again; of several texts in one request all are refused."""
    slow, held = held_session(session)
    with serving(slow, max_active=1, max_queue=1) as busy:
        streams = []
        for calls, waiting in ((1, 0.0), (1, 1.0)):
            streams.append(busy.openai.completions.create(model=NAME, prompt="a", max_tokens=1, stream=True))
            until(lambda calls=calls: held.calls == calls)  # type: ignore[misc]  # mypy does not infer such lambdas
            until(lambda waiting=waiting: busy.metric("fptq_num_requests_waiting") == waiting)  # type: ignore[misc]
        answer = busy.post(COMPLETIONS, prompt="a")
        error = error_of(answer, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert answer.headers["retry-after"] == "1"
        with pytest.raises(openai.RateLimitError):
            busy.openai.completions.create(model=NAME, prompt="a")
        held.free.set()
        assert [len(list(stream)) for stream in streams] == [1, 1]
        answer = busy.post(COMPLETIONS, prompt="a", max_tokens=1, ignore_eos=True)
        assert answer.json()["choices"][0]["finish_reason"] == "length"


def test_request_with_more_texts_than_fit_takes_no_place(session: Session) -> None:
    """The first texts of a request that is refused leave the queue again."""
    slow, held = held_session(session)
    with serving(slow, max_active=1, max_queue=2) as busy:
        stream = busy.openai.completions.create(model=NAME, prompt="a", max_tokens=1, stream=True)
        until(lambda: held.calls == 1)
        waiting = busy.openai.completions.create(model=NAME, prompt="a", max_tokens=1, stream=True)
        error_of(busy.post(COMPLETIONS, prompt=["a", "b"]), 429)
        assert busy.metric("fptq_num_requests_waiting") == 1.0
        held.free.set()
        assert len(list(stream)) == len(list(waiting)) == 1


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (UserError("model.w4a8.onnx", "its logits are not finite"), "model.w4a8.onnx: its logits are not finite"),
        (RuntimeError("secret"), "the model failed; the server's log says why"),
    ],
)
def test_model_that_fails_is_an_error_of_the_server(
    session: Session, caplog: pytest.LogCaptureFixture, cause: Exception, words: str
) -> None:
    """Whole and streamed; what a bug says goes to the log and not to the client; the next request is served."""
    broken, held = held_session(session)
    held.free.set()
    with serving(broken) as server:
        held.error = cause
        error = error_of(server.post(COMPLETIONS, prompt="a"), 500)
        assert (error["type"], error["code"], error["message"]) == ("server_error", "internal_error", words)
        stream = server.openai.completions.create(model=NAME, prompt="a", stream=True)
        with pytest.raises(openai.APIError, match=words.split(";")[0]):
            list(stream)
        held.error = None
        assert server.post(COMPLETIONS, prompt="a", max_tokens=1).status_code == 200
    assert ("secret" in caplog.text) is isinstance(cause, RuntimeError)


def test_schema_of_the_interface_is_there(served: Served) -> None:
    """Every endpoint, with the form of its errors, for people who generate clients."""
    schema = served.http.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        *(COMPLETIONS, CHATS, "/v1/models", "/v1/models/{name}"),
        *("/health", "/ready", "/metrics"),
    }
    answers = schema["paths"][CHATS]["post"]["responses"]
    assert answers["429"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
