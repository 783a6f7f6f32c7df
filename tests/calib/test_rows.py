"""Texts become rows of their own, with special tokens and padding; built-in sentences are sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.batches import CalibrationOptions, TextOptions, evaluation_batches, token_batches
from calib.documents import documents_from_source
from calib.padding import PADDING, model_inputs, real_tokens
from calib.rows import rows_from_documents
from calib.text import calibration_text, held_out_sentences
from fptq_export.errors import UserError

CLS, SEP, UNKNOWN = 101, 102, 7


class Letters:
    """A tokenizer of letters A to Z between two special tokens; anything else is unknown."""

    unk_token_id = UNKNOWN

    def encode(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> list[int]:
        """A token a letter."""
        ids = [ord(letter) if letter.isupper() else UNKNOWN for letter in text]
        return [CLS, *ids, SEP] if add_special_tokens else ids


def rows(*documents: str, seq: int = 6, limit: int | None = None) -> list[list[int]]:
    tokenizer: Any = Letters()
    result: list[list[int]] = rows_from_documents(documents, tokenizer, seq, limit, "--calib-dataset x").tolist()
    return result


def test_each_text_is_a_row_and_a_long_one_is_several() -> None:
    """Special tokens stand around every part; shorter rows are padded, none is joined to another."""
    a, b = ord("A"), ord("B")
    assert rows("A", "BBBBBB") == [
        [CLS, a, SEP, PADDING, PADDING, PADDING],
        [CLS, b, b, b, b, SEP],
        [CLS, b, b, SEP, PADDING, PADDING],
    ]


def test_reading_stops_at_the_limit() -> None:
    """A data set may have no end."""
    assert len(rows(*("A" * 50), limit=3)) == 3


@pytest.mark.parametrize(
    ("documents", "seq", "words"),
    [((), 6, "holds no text"), (("AB",), 2, "no room"), (("ABc", "not proteins"), 6, "unknown to the tokenizer")],
    ids=["no text", "no room", "another language"],
)
def test_text_that_is_no_use_is_refused(documents: tuple[str, ...], seq: int, words: str) -> None:
    """Most of all text of another kind than the model's: a protein model would calibrate on unknown tokens."""
    with pytest.raises(UserError, match=words):
        rows(*documents, seq=seq)


def test_some_unknown_tokens_are_left_alone() -> None:
    """Rare letters are not another language."""
    assert len(rows("ABCx")) == 1


def test_calibration_counts_tokens_and_not_padding(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Documents of a file stay apart; the number that second moments are divided by is that of real tokens."""
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in ("one", "one longer text", "2")))
    batches = token_batches(CalibrationOptions(str(file), seq=32), tiny_tokenizer, 512, encoder=True)
    assert len(batches.tokens) == 3
    assert batches.count == (batches.tokens != PADDING).sum() < batches.tokens.size


def test_fasta_records_are_texts(tmp_path: Path) -> None:
    """A header starts a sequence, line breaks are no part of it, an empty record is left out."""
    file = tmp_path / "proteins.fasta"
    file.write_text(">one\nMKT\nAYI\n\n>empty\n>two | x\nGG\n")
    assert list(documents_from_source(str(file), 0)) == ["MKTAYI", "GG"]


@pytest.mark.parametrize("text", ["MKT\n>one\nAYI\n", "", "MKT"], ids=["before a header", "empty", "no header"])
def test_what_is_not_fasta_is_refused(tmp_path: Path, text: str) -> None:
    """A sequence that belongs to no record is not dropped in silence."""
    file = tmp_path / "proteins.fa"
    file.write_text(text)
    with pytest.raises(UserError, match="not FASTA"):
        list(documents_from_source(str(file), 0))


def test_random_tokens_and_built_in_text_fill_their_rows(tiny_tokenizer: Any) -> None:
    """Nothing is padded where there is enough."""
    for dataset in ("random", "builtin"):
        batches = token_batches(CalibrationOptions(dataset, size=4, seq=16), tiny_tokenizer, 512, encoder=True)
        assert batches.tokens.shape == (4, 16)
        assert batches.count == 64


def test_200_built_in_sentences_are_held_out(tiny_tokenizer: Any) -> None:
    """They are distinct sentences, calibration never sees them, and more of them start with the same ones."""
    sentences = held_out_sentences()
    assert len(set(sentences)) == len(sentences) >= 200
    assert all(sentence[0].isupper() and sentence[-1] in ".!?" for sentence in sentences)
    seen = " ".join(calibration_text().split())
    assert [sentence for sentence in sentences[:200] if sentence in seen] == []
    few, many = (
        evaluation_batches(TextOptions(windows=count, seq=300), tiny_tokenizer, 512, encoder=True).tokens
        for count in (2, 200)
    )
    assert (len(few), len(many)) == (2, 200)
    assert np.array_equal(few[0][few[0] != PADDING], many[0][many[0] != PADDING])


def test_errors_name_the_option_of_the_road() -> None:
    """Encoders are compared by `fptq-export`, not by its verb `eval`, whose option is another one."""
    with pytest.raises(UserError, match="--eval-text"):
        evaluation_batches(TextOptions("proteins.fasta"), None, 512, encoder=True)


def test_padding_becomes_the_padding_token_and_a_mask() -> None:
    """No id is negative when the model sees it; without padding there is no mask at all."""

    class Config:
        pad_token_id = 5

    config: Any = Config()
    tokens = torch.tensor([[3, 4], [6, PADDING]])
    inputs = model_inputs(tokens, config)
    assert inputs["input_ids"].tolist() == [[3, 4], [6, 5]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert model_inputs(tokens[:1], config).keys() == {"input_ids"}
    assert real_tokens(tokens[:1]) is None
