"""One text: where it ends, and what it refuses to begin with."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.runtime import Completion, Limits, Sampling, Session
from tests.runtime.scripted import VOCABULARY, ScriptedModel, letters


def alphabet(limits: Limits | None = None) -> Session:
    """Goes on with the alphabet, and ends behind z."""
    return Session(ScriptedModel(), letters(), limits)


def shown(completion: Completion) -> tuple[str, str]:
    """Text, and why it ends."""
    return completion.text, completion.finish_reason


def test_text_ends_with_the_model() -> None:
    """The last token ends the text and is not part of it, but is counted."""
    completion = alphabet().generate("wx")
    assert shown(completion) == ("yz", "stop")
    assert (completion.token_ids, completion.prompt_tokens) == ((24, 25, 26), 2)


def test_text_ends_at_max_tokens() -> None:
    """So many tokens, and not one more call of the model."""
    model = ScriptedModel()
    assert shown(Session(model, letters()).generate("a", Sampling(max_tokens=3))) == ("bcd", "length")
    assert [len(ids) for ids in model.calls] == [1, 2, 3]


def test_text_ends_with_the_cache() -> None:
    """Four places hold the prompt and all new tokens but the last, which is never run."""
    model = ScriptedModel()
    completion = Session(model, letters(), Limits(max_kv_len=4)).generate("ab", Sampling(max_tokens=9))
    assert shown(completion) == ("cde", "length")
    assert max(len(ids) for ids in model.calls) == 4


def test_text_ends_before_a_stop_string() -> None:
    """The tokens of the stop string were chosen; its text is not shown."""
    completion = alphabet().generate("a", Sampling(stop=("de",)))
    assert shown(completion) == ("bc", "stop")
    assert completion.token_ids == (1, 2, 3, 4)


def test_stop_string_in_the_last_token_is_a_stop() -> None:
    """It is found, though `max_tokens` ends the text at the same token."""
    assert shown(alphabet().generate("a", Sampling(stop=("d",), max_tokens=3))) == ("bc", "stop")


def test_held_back_text_is_given_at_the_end() -> None:
    """What could have been a stop string is text when nothing more comes."""
    assert shown(alphabet().generate("a", Sampling(stop=("dx",), max_tokens=3))) == ("bcd", "length")


def test_end_of_text_can_be_ignored() -> None:
    """For measurements: as many tokens as were asked for."""
    model = ScriptedModel(lambda ids: 26)
    completion = Session(model, letters()).generate("a", Sampling(ignore_eos=True, max_tokens=3))
    assert (completion.token_ids, completion.finish_reason) == ((26, 26, 26), "length")


def test_stream_is_the_same_text() -> None:
    """Pieces joined, and one reason, in the last piece."""
    pieces = list(alphabet().stream("w"))
    assert "".join(piece.text for piece in pieces) == "xyz"
    assert [piece.finish_reason for piece in pieces] == [None, None, None, "stop"]


def test_ids_need_no_tokenizer() -> None:
    """Token ids in, token ids out, with no text."""
    completion = Session(ScriptedModel()).generate([3], Sampling(max_tokens=2))
    assert (completion.token_ids, completion.text) == ((4, 5), "")


@pytest.mark.parametrize(
    ("prompt", "cause"),
    [
        ([], "is empty"),
        ("", "is empty"),
        ([1, -1], "-1 is no token"),
        ([1, VOCABULARY], f"{VOCABULARY} is no token"),
        ([1] * 6, "has 6 tokens, the model takes 5"),
    ],
    ids=["no ids", "no text", "negative", "beyond", "long"],
)
def test_prompt_that_cannot_be_read_is_refused(prompt: list[int] | str, cause: str) -> None:
    """Before the model is called."""
    model = ScriptedModel()
    with pytest.raises(UserError, match=cause):
        Session(model, letters(), Limits(max_input_len=5)).stream(prompt)
    assert model.calls == []


def test_prompt_longer_than_the_cache_is_refused() -> None:
    """The option that makes room is named."""
    with pytest.raises(UserError, match="--max-kv-len"):
        alphabet(Limits(max_kv_len=2)).generate("abc")


def test_prompt_as_long_as_the_limits_is_read() -> None:
    """A full cache still gives one token."""
    assert alphabet(Limits(max_input_len=3, max_kv_len=3)).generate("abc").token_ids == (3,)


@pytest.mark.parametrize("prompt", ["a", [0]], ids=["text", "ids"])
def test_what_needs_a_tokenizer_says_so(prompt: str | list[int]) -> None:
    """A text as prompt, or a stop string."""
    with pytest.raises(UserError, match="no tokenizer"):
        Session(ScriptedModel()).generate(prompt, Sampling(stop=("x",)))


class _Overflowing(ScriptedModel):
    def _run(self, ids: tuple[int, ...]) -> tuple[NDArray[np.float32], object]:  # type: ignore[override]
        return np.full((1, 1, VOCABULARY), np.nan, np.float32), object()


def test_logits_that_are_no_numbers_end_the_text() -> None:
    """An overflow must not look like token 0."""
    with pytest.raises(UserError, match="behind 1 tokens are not finite"):
        Session(_Overflowing(), letters()).generate("a")
