"""Text that comes token by token: nothing may be lost, doubled, or shown too early."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from fptq_export.errors import UserError
from fptq_export.runtime import TextTokenizer
from fptq_export.runtime.text import tokenizer_from_directory

CHATML = (
    "{% for message in messages %}\n    {% if not message['content'] %}{{ raise_exception('empty') }}{% endif %}\n"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": " Grüße, 世界! "}, {"role": "assistant", "content": '{"a": 1}'}]


def bytes_tokenizer() -> TextTokenizer:
    """A token a byte: every character beyond ASCII is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return TextTokenizer(tokenizer, [], None, {}, "bytes")


BYTES = bytes_tokenizer()


def streamed(ids: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
    """What each token gives, and what the end gives."""
    stream = BYTES.stream(stop)
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(text=st.text(max_size=40))
def test_pieces_are_the_text(text: str) -> None:
    """Joined, the pieces are what the tokens mean, whatever characters the tokens split."""
    assert "".join(streamed(BYTES.encode(text))) == text


@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_pieces_of_broken_bytes_are_what_the_tokenizer_makes_of_them(ids: list[int]) -> None:
    """Tokens that make no whole characters lose nothing either."""
    assert "".join(streamed(ids)) == BYTES.decode(ids)


def test_a_character_is_not_shown_in_halves() -> None:
    """A piece comes with the last byte of its character."""
    assert streamed(BYTES.encode("a🙂b")) == ["a", "", "", "", "🙂", "b", ""]


@given(
    text=st.text(alphabet="abé", max_size=30),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    """The pieces are the text up to where the first stop string begins, to the letter."""
    places = [place for word in stop if (place := text.find(word)) >= 0]
    # Tokens come one by one, so the stop string that is complete first ends the text.
    complete = [(place + len(word), place) for word in stop if (place := text.find(word)) >= 0]
    first_end = min(complete)[0] if complete else 0
    ended = [place for end, place in complete if end == first_end]
    assert "".join(streamed(BYTES.encode(text), stop)) == (text[: min(ended)] if places else text)


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    """What may be a stop string is shown only when it is none."""
    assert streamed(BYTES.encode("xEND"), ["END"]) == ["x", "", "", "", ""]
    assert streamed(BYTES.encode("xENx"), ["END"]) == ["x", "", "", "ENx", ""]
    assert streamed(BYTES.encode("xEN"), ["END"]) == ["x", "", "", "EN"]


def test_nothing_comes_behind_a_stop_string() -> None:
    """More tokens give no more text."""
    stream = BYTES.stream(["b"])
    assert [stream.push(token) for token in BYTES.encode("abc")] == ["a", "", ""]
    assert (stream.stopped, stream.finish()) == (True, "")


@pytest.fixture
def chat_directory(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny LLaMA's tokenizer with a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(tiny_llama_dir / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return tmp_path


def opened(directory: Path) -> TextTokenizer:
    """The tokenizer, which is there."""
    tokenizer = tokenizer_from_directory(directory)
    assert tokenizer is not None
    return tokenizer


def test_chat_is_what_transformers_makes_of_it(chat_directory: Path) -> None:
    """Text and tokens of a chat are those of `apply_chat_template`."""
    reference = AutoTokenizer.from_pretrained(chat_directory)
    tokenizer = opened(chat_directory)
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert tokenizer.chat(MESSAGES) == expected
    ids = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(MESSAGES) == ids


def test_template_in_the_tokenizer_config_is_read(chat_directory: Path) -> None:
    """Older checkpoints keep the template there."""
    (chat_directory / "chat_template.jinja").unlink()
    path = chat_directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages[0].content }}"}))
    assert opened(chat_directory).chat(MESSAGES) == MESSAGES[0]["content"]


def test_refusal_of_a_template_is_an_error_of_the_user(chat_directory: Path) -> None:
    """What the template raises reaches the one who sent the messages."""
    with pytest.raises(UserError, match=r"refuses these messages \(empty\)"):
        opened(chat_directory).chat([{"role": "user", "content": ""}])


def test_template_has_no_way_into_python(chat_directory: Path) -> None:
    """A template comes with a model, and is not trusted."""
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (chat_directory / "chat_template.jinja").write_text(escape, encoding="utf-8")
    with pytest.raises(UserError, match="refuses these messages"):
        opened(chat_directory).chat(MESSAGES)


def test_model_without_a_template_says_so(tiny_llama_dir: Path) -> None:
    """A base model has no chat."""
    tokenizer = opened(tiny_llama_dir)
    assert not tokenizer.has_chat
    with pytest.raises(UserError, match="no chat template"):
        tokenizer.chat(MESSAGES)


@pytest.mark.parametrize(
    ("named", "expected"), [(7, {7, 1}), ([5, 6], {5, 6, 1}), (None, {1})], ids=["one", "several", "none"]
)
def test_every_token_that_ends_a_text_is_known(chat_directory: Path, named: object, expected: set[int]) -> None:
    """The generation config may name several; the tokenizer's own is 1."""
    (chat_directory / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    assert opened(chat_directory).eos_ids == expected


def test_special_tokens_are_not_text(tiny_llama_dir: Path) -> None:
    """The token that ends a text is not shown."""
    assert opened(tiny_llama_dir).decode([*opened(tiny_llama_dir).encode("hi"), 1]) == "hi"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_broken_file_is_named(chat_directory: Path, name: str) -> None:
    """The error names the file."""
    (chat_directory / name).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=name):
        tokenizer_from_directory(chat_directory)


def test_vocabulary_reaches_to_the_last_token() -> None:
    """Some tokenizers leave out numbers; a token behind the hole is one, the number behind the last is none."""
    tokenizer = TextTokenizer(Tokenizer(models.BPE(vocab={"a": 0, "b": 7}, merges=[])), [], None, {}, "holes")
    assert tokenizer.encode("ab") == [0, 7]
    assert tokenizer.vocabulary == 8


def test_directory_without_tokenizer_has_none(tmp_path: Path) -> None:
    """Which is no error: token ids may be all that is wanted."""
    assert tokenizer_from_directory(tmp_path) is None
