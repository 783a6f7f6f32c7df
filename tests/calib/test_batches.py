"""Windows of tokens: what is asked for is what comes, and what cannot be given is said."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from calib.batches import (
    AUTO_BATCH_TOKENS,
    CalibrationOptions,
    TextOptions,
    auto_batch_size,
    evaluation_batches,
    held_out_windows,
    token_batches,
)
from calib.text import calibration_text, held_out_text
from fptq_export.errors import UserError

VOCABULARY = 512


def options(dataset: object = "builtin", size: int = 4, seq: int = 16, seed: int = 0) -> CalibrationOptions:
    return CalibrationOptions(dataset=str(dataset), size=size, seq=seq, seed=seed)


def paragraphs(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")}


class BosTokenizer:
    """Puts token 7 before every text, as LLaMA's and Gemma's do."""

    bos_token_id = 7

    def encode(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> list[int]:
        """One token a letter."""
        return [7] * add_special_tokens + [100 + ord(letter) % 26 for letter in text]


def test_halves_of_the_text_share_no_paragraph() -> None:
    """Nothing that verification reads was calibrated on, and each half holds every paragraph once."""
    calibration, held_out = calibration_text(), held_out_text()
    assert paragraphs(calibration) & paragraphs(held_out) == set()
    assert len(calibration.split("\n\n")) == len(paragraphs(calibration))
    assert len(held_out.split("\n\n")) == len(paragraphs(held_out))


def test_held_out_half_is_about_a_fifth() -> None:
    """Both halves stay useful on any Python: the split goes by length, not by number of topics."""
    held_out, calibration = len(held_out_text()), len(calibration_text())
    assert 0.15 < held_out / (held_out + calibration) < 0.25
    assert calibration > 200_000


def test_windows_come_from_the_text_in_order_and_do_not_overlap(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """All windows of the text, put together again, are the text; a blank line ends a document."""
    whole = token_batches(options(size=10**6), tiny_tokenizer, VOCABULARY)
    expected = tiny_tokenizer.encode(f"{calibration_text()}\n\n", add_special_tokens=False)
    assert whole.tokens.dtype == np.int64
    assert whole.tokens.reshape(-1).tolist() == expected[: whole.count]


def test_seed_draws_windows_without_repeating_one(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A seed gives the same windows twice, another seed others; none comes twice; the hash tells them apart."""
    first, again, other = (token_batches(options(size=32, seed=seed), tiny_tokenizer, VOCABULARY) for seed in (0, 0, 1))
    assert first.tokens.shape == (32, 16)
    assert np.array_equal(first.tokens, again.tokens)
    assert first.sha256 == again.sha256 != other.sha256
    assert len(np.unique(first.tokens, axis=0)) == 32
    assert "drawn from" in first.description


def test_held_out_windows_are_the_held_out_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Verification reads the other half, from its beginning."""
    windows = held_out_windows(tiny_tokenizer, 3, 16)
    assert windows.shape == (3, 16)
    assert windows.dtype == np.int64
    expected = tiny_tokenizer.encode(held_out_text(), add_special_tokens=False)
    assert windows.reshape(-1).tolist() == expected[:48]


def test_every_window_starts_as_the_tokenizer_starts_a_text() -> None:
    """Where the tokenizer puts a start token, each window has one and the text fills the rest."""
    tokenizer: Any = BosTokenizer()
    batches = token_batches(options(size=10**6), tokenizer, VOCABULARY)
    assert (batches.tokens[:, 0] == 7).all()
    assert not (batches.tokens[:, 1:] == 7).any()
    assert (
        batches.tokens[:, 1:].reshape(-1).tolist()
        == tokenizer.encode(f"{calibration_text()}\n\n", add_special_tokens=False)[: batches.tokens[:, 1:].size]
    )
    assert (held_out_windows(tokenizer, 5, 16)[:, 0] == 7).all()


def test_random_tokens_cover_the_vocabulary_and_need_no_tokenizer() -> None:
    """Data-free calibration draws from the whole vocabulary, the same for the same seed."""
    batches = token_batches(options("random", size=64, seq=128), None, 100)
    assert set(np.unique(batches.tokens)) == set(range(100))
    assert batches.sha256 == token_batches(options("random", size=64, seq=128), None, 100).sha256
    assert batches.sha256 != token_batches(options("random", size=64, seq=128, seed=1), None, 100).sha256


def test_text_file_is_cut_into_windows(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A text file with fewer windows than asked for gives all it has, and says so; nothing is repeated."""
    (tmp_path / "text.txt").write_text("The quick brown fox. " * 20)
    batches = token_batches(options(tmp_path / "text.txt", size=1000), tiny_tokenizer, VOCABULARY)
    stream = tiny_tokenizer.encode("The quick brown fox. " * 20 + "\n\n", add_special_tokens=False)
    assert batches.tokens.reshape(-1).tolist() == stream[: len(stream) // 16 * 16]
    assert "all there is (1000 windows were asked for)" in batches.description


@pytest.mark.parametrize("field", ["text", "content", "prompt"])
def test_jsonl_documents_are_read_by_field(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, field: str) -> None:
    """Each of the usual fields is text; other fields and blank lines are left alone."""
    records = [json.dumps({"id": index, field: f"document {index} with words"}) for index in range(20)]
    (tmp_path / "data.jsonl").write_text("\n\n".join(records))
    batches = token_batches(options(tmp_path / "data.jsonl"), tiny_tokenizer, VOCABULARY)
    (tmp_path / "data.txt").write_text("\n\n".join(f"document {index} with words" for index in range(20)))
    same = token_batches(options(tmp_path / "data.txt"), tiny_tokenizer, VOCABULARY)
    assert batches.sha256 == same.sha256


@pytest.mark.parametrize(("shape", "expected"), [((100,), 6), ((3, 33), 6)])
def test_npz_rows_are_cut_on_their_own(tmp_path: Path, shape: tuple[int, ...], expected: int) -> None:
    """Token ids are used as they are: one stream, or rows whose ends are left out rather than mixed."""
    ids = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    np.savez(tmp_path / "ids.npz", input_ids=ids)
    batches = token_batches(options(tmp_path / "ids.npz", size=100), None, VOCABULARY)
    assert batches.tokens.shape == (expected, 16)
    assert (np.diff(batches.tokens, axis=1) == 1).all()
    assert batches.tokens[2, 0] == (33 if len(shape) == 2 else 32)


class FakeDataset:
    """Streams endless documents, as `datasets` does."""

    def __init__(self) -> None:
        self.read = 0

    def shuffle(self, seed: int, buffer_size: int) -> Iterator[dict[str, str]]:
        """Give documents without end."""
        while True:
            self.read += 1
            yield {"text": f"seed {seed} buffer {buffer_size} document {self.read}"}


def test_data_set_is_read_until_there_is_enough(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set without an end is streamed, shuffled with the seed, and left when the windows are full."""
    dataset, asked = FakeDataset(), []

    def load_dataset(*args: object, **options: object) -> FakeDataset:
        asked.append((args, options))
        return dataset

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    batches = token_batches(options("org/name:config@validation", seed=3), tiny_tokenizer, VOCABULARY)
    assert batches.tokens.shape == (4, 16)
    assert asked == [(("org/name", "config"), {"split": "validation", "streaming": True})]
    assert dataset.read < 64
    assert "seed 3" in tiny_tokenizer.decode(batches.tokens.reshape(-1))


def test_data_set_that_cannot_be_opened_is_a_user_error(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A data set that is not found or not reachable names itself and the other choices."""

    def load_dataset(*_: object, **__: object) -> None:
        raise FileNotFoundError("no such data set")

    library = types.ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(UserError, match="cannot be opened") as error:
        token_batches(options("org/none"), tiny_tokenizer, VOCABULARY)
    assert "builtin" in error.value.hint


def test_data_set_without_the_library_names_the_choices(
    tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `datasets` is not installed, a word that is no file gives the list of sources."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError) as error:
        token_batches(options("pile"), tiny_tokenizer, VOCABULARY)
    assert all(word in error.value.hint for word in ("builtin", "random", ".txt", ".jsonl", ".npz"))


@pytest.mark.parametrize("text", ["", "short"])
def test_text_below_one_window_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, text: str) -> None:
    """Empty and too short text is refused, not padded."""
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(UserError, match="not even one window of 16 tokens"):
        token_batches(options(tmp_path / "text.txt"), tiny_tokenizer, VOCABULARY)


def test_built_in_text_shorter_than_a_window_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """A window longer than the whole text cannot be filled."""
    with pytest.raises(UserError, match="not even one window"):
        token_batches(options(seq=10**7), tiny_tokenizer, VOCABULARY)
    with pytest.raises(UserError, match="ask for fewer windows"):
        held_out_windows(tiny_tokenizer, 10**6, 512)


def test_text_without_a_tokenizer_is_refused() -> None:
    """Text needs a tokenizer; the error offers the sources that do not."""
    with pytest.raises(UserError, match="text needs a tokenizer") as error:
        token_batches(options(), None, VOCABULARY)
    assert "random" in error.value.hint


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "no such file"),
        ("none.jsonl", None, "no such file"),
        ("none.npz", None, "no such file"),
        ("data.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("data.jsonl", b'{"text": "a"}\nnot json\n', r"data\.jsonl:2: not JSON"),
        ("data.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"data\.jsonl:2: no text in it \(found: body\)"),
        ("data.jsonl", b'{"text": 3}\n', "no text in it"),
        ("data.jsonl", b'["a"]\n', "no text in it"),
        ("data.npz", b"PK\x03\x04 not a zip", "not a readable .npz"),
        ("data.npz", b"", "not a readable .npz"),
        ("data.csv", b"a,b", "not a source of text"),
        ("a folder", None, "not a source of text"),
    ],
)
def test_unreadable_source_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    """Each kind of bad file gives one error with the place and the cause."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        token_batches(options(tmp_path / name), tiny_tokenizer, VOCABULARY)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"ids": np.zeros(64, np.int64)}, "no array named input_ids"),
        ({"input_ids": np.zeros(64, np.float32)}, "input_ids is float32"),
        ({"input_ids": np.zeros((1, 4, 16), np.int64)}, "with 3 axes"),
        ({"input_ids": np.zeros((4, 15), np.int64)}, "no row has 16 tokens"),
        ({"input_ids": np.zeros((0, 64), np.int64)}, "no row has 16 tokens"),
        ({"input_ids": np.full(64, VOCABULARY)}, "token ids run from 512 to 512"),
        ({"input_ids": np.full(64, -1)}, "token ids run from -1"),
        ({"input_ids": np.array([{"a": 1}] * 64)}, "not a readable"),
    ],
    ids=["name", "float", "axes", "short rows", "no rows", "too large", "negative", "pickled"],
)
def test_unusable_npz_is_refused(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    """Ids of the wrong name, type, shape or range are refused, and a pickled array is not opened."""
    np.savez(tmp_path / "ids.npz", **arrays)
    with pytest.raises(UserError, match=words):
        token_batches(options(tmp_path / "ids.npz"), None, VOCABULARY)


def test_tokenizer_of_another_model_is_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Ids beyond the embedding are found before the model runs."""
    with pytest.raises(UserError, match="use the tokenizer that belongs to the model"):
        token_batches(options(), tiny_tokenizer, 100)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"size": 0}, "--calib-size"),
        ({"seq": 1}, "--calib-seq"),
        ({"batch_size": -1}, "--batch-size"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_impossible_sizes_are_refused(values: dict[str, int], where: str) -> None:
    """Each option is checked by its own name."""
    with pytest.raises(UserError) as error:
        CalibrationOptions(**values)  # type: ignore[arg-type]
    assert error.value.where == where


def test_automatic_batch_fills_the_token_budget() -> None:
    """Short windows are batched, a window beyond the budget runs alone."""
    assert auto_batch_size(512) == 4
    assert auto_batch_size(AUTO_BATCH_TOKENS * 4) == 1


def test_evaluation_reads_what_verification_reads(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    """Without a text of their own both measure the same windows of the half that calibration never sees."""
    batches = evaluation_batches(TextOptions(windows=3, seq=16), tiny_tokenizer, VOCABULARY)
    assert np.array_equal(batches.tokens, held_out_windows(tiny_tokenizer, 3, 16))


def test_evaluation_takes_windows_in_order(tmp_path: Path) -> None:
    """The first windows of a text come first, whatever the seed; 0 takes all, and too few are said."""
    path = tmp_path / "text.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz", encoding="utf-8")
    tokenizer: Any = BosTokenizer()
    few, every, more = (
        evaluation_batches(TextOptions(str(path), windows, seq=5, seed=9), tokenizer, VOCABULARY)
        for windows in (2, 0, 100)
    )
    assert few.tokens[:, 0].tolist() == [7, 7]
    assert np.array_equal(few.tokens, every.tokens[:2])
    assert np.array_equal(every.tokens, more.tokens)
    assert len(every.tokens) == 7  # 26 letters and the blank line, four a window after the first token
    assert every.description.endswith("all there is")
    assert "100 windows were asked for" in more.description


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "random"}, "no model predicts random tokens"),
        ({"seq": 1}, "--eval-seq: must be at least 2"),
        ({"windows": -1}, "--eval-windows: must be at least 0"),
        ({"seed": -1}, "--seed: must be at least 0"),
    ],
)
def test_text_that_says_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    """Random tokens and sizes that predict nothing are errors and not figures."""
    with pytest.raises(UserError, match=message):
        TextOptions(**changes)


def test_errors_of_evaluation_name_its_own_options(tmp_path: Path) -> None:
    """A short text is about --text and --eval-seq, not about calibration."""
    path = tmp_path / "text.txt"
    path.write_text("a", encoding="utf-8")
    tokenizer: Any = BosTokenizer()
    with pytest.raises(UserError, match=r"--text .*too short(.|\n)*--eval-seq"):
        evaluation_batches(TextOptions(str(path)), tokenizer, VOCABULARY)
    with pytest.raises(UserError, match="--text builtin: text needs a tokenizer"):
        evaluation_batches(TextOptions(), None, VOCABULARY)
