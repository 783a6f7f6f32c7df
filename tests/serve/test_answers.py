"""What OpenAI's own client reads is what the session writes, however it is asked for and whoever else asks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fptq_export.runtime import Completion, Limits, Sampling, Session
from tests.serve.serving import NAME, Served, serving

PROMPT = "An assignment statement evaluates"
CHAT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a name?"}]
GREEDY: dict[str, Any] = {"model": NAME, "max_tokens": 12, "temperature": 0.0}
CONCURRENT = 32


def expected(session: Session, prompt: str | list[int] = PROMPT, **sampling: Any) -> Completion:
    return session.generate(prompt, Sampling(**{"max_tokens": 12, **sampling}))


def chat_tokens(session: Session, messages: list[Any]) -> list[int]:
    assert session.tokenizer is not None
    return session.tokenizer.encode_chat(messages)


def test_completion_is_what_the_session_writes(served: Served, session: Session) -> None:
    """Text, reason and token counts are those of `Session.generate`."""
    answer = served.openai.completions.create(prompt=PROMPT, **GREEDY)
    own = expected(session)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (own.text, own.finish_reason)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (own.prompt_tokens, len(own.token_ids))
    assert answer.usage.total_tokens == own.prompt_tokens + len(own.token_ids)


def test_chat_is_what_the_session_writes(served: Served, session: Session) -> None:
    """The chat template makes the prompt, without a second set of special tokens."""
    answer = served.openai.chat.completions.create(messages=CHAT, **GREEDY)
    own = expected(session, chat_tokens(session, CHAT))
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (own.text, own.finish_reason)
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == own.prompt_tokens


def test_chat_takes_parts_answers_and_the_developer(served: Served, session: Session) -> None:
    """Parts of text are lines of one message, the developer is the system, and an answer of the client goes back in."""
    first = served.openai.chat.completions.create(messages=CHAT, **GREEDY).choices[0].message
    parts = [{"type": "text", "text": "And"}, {"type": "text", "text": "then?"}]
    asked: list[Any] = [{"role": "developer", "content": "Be brief."}, CHAT[1], first.model_dump()]
    asked.append({"role": "user", "content": parts})
    answer = served.openai.chat.completions.create(messages=asked, **GREEDY)
    said = {"role": "assistant", "content": first.content}
    own = expected(session, chat_tokens(session, [*CHAT, said, {"role": "user", "content": "And\nthen?"}]))
    assert answer.choices[0].message.content == own.text


def test_chat_without_a_length_goes_on_to_the_end(session: Session) -> None:
    """Where the request sets no end, the model or the cache does, and not a default that cuts answers off."""
    prompt = chat_tokens(session, CHAT)
    places = len(prompt) + 20
    with serving(Session(session.model, session.tokenizer, Limits(max_kv_len=places))) as small:
        answer = small.openai.chat.completions.create(model=NAME, messages=CHAT, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.total_tokens == places + 1, "the last token is not run, and needs no place"


def test_completion_without_a_length_has_sixteen_tokens(served: Served) -> None:
    """OpenAI's default of `/v1/completions`."""
    answer = served.openai.completions.create(model=NAME, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5}])
def test_seed_gives_the_text_of_the_session(served: Served, session: Session, options: dict[str, Any]) -> None:
    """Temperature, top p, top k and seed reach the sampling; the temperature is 1 unless given."""
    body: dict[str, Any] = {"model": NAME, "max_tokens": 12, "seed": 7, "extra_body": options}
    answer = served.openai.completions.create(prompt=PROMPT, **body)
    own = expected(session, **{"temperature": 1.0, "seed": 7, **options})
    assert own.token_ids != expected(session).token_ids, "the seed draws what is most likely: take another one"
    assert answer.choices[0].text == own.text


@pytest.mark.parametrize("stop", ["list", "text"])
def test_text_ends_before_a_stop_string(served: Served, session: Session, stop: str) -> None:
    """One stop string or several; the reason is `stop`, and the string is not in the text."""
    whole = expected(session).text
    word = whole[3:5]
    answer = served.openai.completions.create(prompt=PROMPT, stop=[word, "\0"] if stop == "list" else word, **GREEDY)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == (whole[: whole.index(word)], "stop")


def test_several_prompts_give_several_texts(served: Served, session: Session) -> None:
    """Each choice is the answer of its prompt alone, and the tokens are those of all."""
    prompts = [PROMPT, "The target list", "yield"]
    answer = served.openai.completions.create(prompt=prompts, **GREEDY)
    own = [expected(session, prompt) for prompt in prompts]
    assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(text.text for text in own))
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(text.prompt_tokens for text in own)


def test_prompts_of_tokens(served: Served, session: Session) -> None:
    """One list of token ids, or several."""
    tokens = session.tokens(PROMPT)
    one = served.openai.completions.create(prompt=tokens, **GREEDY)
    two = served.openai.completions.create(prompt=[tokens, tokens[:3]], **GREEDY)
    texts = [expected(session, prompt).text for prompt in (tokens, tokens[:3])]
    assert [choice.text for choice in (*one.choices, *two.choices)] == [texts[0], *texts]


@pytest.mark.parametrize("as_tokens", [False, True], ids=["text", "tokens"])
def test_echo_begins_with_the_prompt(served: Served, session: Session, as_tokens: bool) -> None:
    """Whole and streamed alike."""
    prompt: Any = session.tokens(PROMPT) if as_tokens else PROMPT
    whole = served.openai.completions.create(prompt=prompt, echo=True, **GREEDY)
    stream = served.openai.completions.create(prompt=prompt, echo=True, stream=True, **GREEDY)
    streamed = "".join(chunk.choices[0].text for chunk in stream)
    assert whole.choices[0].text == streamed == PROMPT + expected(session).text


def test_streamed_completion_is_the_whole_one(served: Served, session: Session) -> None:
    """Several chunks, one id, the reason in the last, and no usage unless asked for."""
    chunks = list(served.openai.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    own = expected(session)
    assert "".join(chunk.choices[0].text for chunk in chunks) == own.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [own.finish_reason]
    assert len(chunks) > 2
    assert len({chunk.id for chunk in chunks}) == 1
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


def test_streamed_chat_is_the_whole_one(served: Served, session: Session) -> None:
    """First who speaks, then the text, then the reason; the tokens are counted in a chunk of their own."""
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = served.openai.chat.completions.create(messages=CHAT, **options, **GREEDY)
    own = expected(session, chat_tokens(session, CHAT))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == own.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [own.finish_reason]
    assert [chunk.usage for chunk in chunks] == [None] * len(chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (own.prompt_tokens, len(own.token_ids))


def test_streamed_prompts_are_not_mixed_up(served: Served, session: Session) -> None:
    """The chunks of several texts in one stream are told apart by their index."""
    prompts = [PROMPT, "The target list", "yield"]
    texts = [""] * 3
    for chunk in served.openai.completions.create(prompt=prompts, stream=True, **GREEDY):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [expected(session, prompt).text for prompt in prompts]


def test_stream_ends_as_openai_ends_it(served: Served) -> None:
    """Server-sent events, each a line of data, the last one `[DONE]`; no proxy may hold them back."""
    answer = served.post("/v1/completions", prompt=PROMPT, max_tokens=2, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    events = answer.text.split("\n\n")
    assert all(event.startswith("data: {") for event in events[:-2])
    assert events[-2:] == ["data: [DONE]", ""]


def test_concurrent_requests_are_not_mixed_up(served: Served, session: Session) -> None:
    """Chats and completions, streamed and whole, greedy and drawn, at once: each has its own answer."""
    words = PROMPT.split()

    def options(number: int) -> dict[str, Any]:
        return {"max_tokens": 3 + number % 7, "temperature": float(number % 2), "seed": number}

    def ask(number: int) -> str:
        body = {"model": NAME, **options(number)}
        prompt = f"{words[number % 4]} {number}"
        if number % 4 < 2:
            stream = served.openai.completions.create(prompt=prompt, stream=True, **body)
            return "".join(chunk.choices[0].text for chunk in stream)
        answer = served.openai.chat.completions.create(messages=[{"role": "user", "content": prompt}], **body)
        return answer.choices[0].message.content or ""

    def own(number: int) -> str:
        prompt = f"{words[number % 4]} {number}"
        chat = [{"role": "user", "content": prompt}]
        return expected(session, prompt if number % 4 < 2 else chat_tokens(session, chat), **options(number)).text

    with ThreadPoolExecutor(CONCURRENT) as pool:
        answers = list(pool.map(ask, range(CONCURRENT)))
    assert answers == [own(number) for number in range(CONCURRENT)]


def test_models_are_listed_by_their_name(served: Served, session: Session) -> None:
    """One model, found by its name, with the length of its cache."""
    (model,) = served.openai.models.list().data
    assert (model.id, model.object) == (NAME, "model")
    assert served.openai.models.retrieve(NAME) == model
    assert served.http.get(f"/v1/models/{NAME}").json()["max_model_len"] == session.limits.max_kv_len
