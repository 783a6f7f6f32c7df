"""Token windows for calibration, verification and evaluation."""

from __future__ import annotations

import hashlib
import itertools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.documents import SOURCES_HINT, documents_from_source, is_text_file
from calib.padding import PADDING
from calib.rows import rows_from_documents
from calib.text import calibration_text, held_out_sentences, held_out_text
from fptq_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CalibrationOptions",
    "TextOptions",
    "TokenBatches",
    "auto_batch_size",
    "evaluation_batches",
    "held_out_windows",
    "token_batches",
]

AUTO_BATCH_TOKENS = 2048
"""Tokens a batch when the user names no batch size. On two cores SmolLM2-135M gains nothing from larger ones."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What the model is shown.

    Raises:
        UserError: A size is not positive.
    """

    dataset: str = "builtin"
    """`builtin`, `random`, a `.txt`, `.jsonl`, `.fasta` or `.npz` file, or a data set id."""
    size: int = 64
    """Windows."""
    seq: int = 512
    """Tokens a window."""
    batch_size: int = 0
    """Windows a forward pass; 0 chooses."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("calib-size", self.size, 1),
            ("calib-seq", self.seq, 2),
            ("batch-size", self.batch_size, 0),
        ):
            if value < least:
                raise UserError(f"--{name}", f"must be at least {least}, got {value}", "give a larger number")
        if self.seed < 0:
            raise UserError("--seed", f"must not be negative, got {self.seed}", "give a number from 0 on")


@dataclass(frozen=True)
class TextOptions:
    """What a model is evaluated on.

    Raises:
        UserError: A size is too small, or the tokens are random: no model predicts them.
    """

    source: str = "builtin"
    """`builtin` (the held-out half), a `.txt`, `.jsonl`, `.fasta` or `.npz` file, or a data set id."""
    windows: int = 8
    """Windows from the beginning of the text; 0 takes all of it."""
    seq: int = 512
    """Tokens a window."""
    seed: int = 0
    """Order of a data set's documents; files are read in order."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("eval-windows", self.windows, 0),
            ("eval-seq", self.seq, 2),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise UserError(f"--{name}", f"must be at least {least}, got {value}", "give a larger number")
        if self.source == "random":
            raise UserError("--text random", "no model predicts random tokens", _EVALUATION.sources)


@dataclass(frozen=True)
class _Names:
    """What errors call the options that choose the text."""

    source: str
    seq: str
    sources: str
    """What else could be given."""


_CALIBRATION = _Names("--calib-dataset", "--calib-seq", "use --calib-dataset random or an .npz of token ids")
_EVALUATION = _Names("--text", "--eval-seq", "give builtin, a .txt, .jsonl or .npz file, or the id of a data set")
_ENCODER_EVALUATION = replace(_EVALUATION, source="--eval-text")


@dataclass(frozen=True)
class TokenBatches:
    """Windows of token ids."""

    tokens: NDArray[np.int64]
    """[size, seq]; an encoder's rows end with `PADDING` where they are shorter."""
    description: str
    """Where they come from, for people."""
    sha256: str
    """Of shape and ids, little-endian: tells two runs apart."""
    features: NDArray[np.float32] | None = None
    """[size, mel bins, frames], what an encoder of speech reads; its `tokens` are no ids then, but a place for each of
    its positions."""

    @property
    def count(self) -> int:
        """Tokens in all, without padding."""
        return int((self.tokens != PADDING).sum())


def auto_batch_size(seq: int) -> int:
    """Windows a forward pass when the user names no number."""
    return max(1, AUTO_BATCH_TOKENS // seq)


def token_batches(
    options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, *, encoder: bool = False
) -> TokenBatches:
    """Make the windows that calibration runs.

    Text is tokenized as one stream and cut into contiguous windows that do not overlap. When there are more than
    `options.size`, the seed draws among them; when there are fewer, all are used and the description says so. A window
    starts with the token that the tokenizer itself starts a text with, if it does. For an encoder every document is a
    row of its own (`rows_from_documents`), of at most as many tokens.

    Args:
        options: Source, sizes and seed.
        tokenizer: Needed for text; token ids and random tokens do without.
        vocab_size: Rows of the model's embedding.
        encoder: Whether the model reads whole texts between special tokens.

    Raises:
        UserError: The source is unknown or unreadable, holds less than one window, or ids lie outside the vocabulary.
    """
    if options.dataset == "random":
        tokens = np.random.default_rng(options.seed).integers(
            0, vocab_size, (options.size, options.seq), dtype=np.int64
        )
        what = f"uniform over a vocabulary of {vocab_size}, seed {options.seed}"
        return TokenBatches(tokens, f"random: {options.size} x {options.seq} tokens, {what}", _sha256(tokens))
    windows = _windows_from_source(
        options.dataset, options.seq, options.seed, options.size, tokenizer, vocab_size, _CALIBRATION, encoder=encoder
    )
    found = len(windows)
    description = f"{options.dataset}: {_extent(min(found, options.size), options.seq, encoder)}"
    if found > options.size:
        chosen = np.random.default_rng(options.seed).choice(found, options.size, replace=False)
        windows = windows[np.sort(chosen)]
        description += f", drawn from {found} windows with seed {options.seed}"
    elif found < options.size:
        description += f", all there is ({options.size} windows were asked for)"
    return TokenBatches(windows, description, _sha256(windows))


def evaluation_batches(
    options: TextOptions, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, *, encoder: bool = False
) -> TokenBatches:
    """The first windows of a text, in order: no draw, so that a longer evaluation holds a shorter one.

    Built-in text is the half that calibration never sees; its windows are those of `held_out_windows`, and for an
    encoder its sentences, each a row.

    Args:
        options: Source and sizes.
        tokenizer: Needed for text; token ids do without.
        vocab_size: Rows of the model's embedding.
        encoder: Whether the model reads whole texts between special tokens.

    Raises:
        UserError: The source is unknown or unreadable, holds less than one window, or ids lie outside the vocabulary.
    """
    limit = options.windows or None
    names = _ENCODER_EVALUATION if encoder else _EVALUATION
    windows = _windows_from_source(
        options.source, options.seq, options.seed, limit, tokenizer, vocab_size, names, encoder=encoder
    )[:limit]
    description = f"{options.source}: {_extent(len(windows), options.seq, encoder)}"
    if limit is None:
        description += ", all there is"
    elif len(windows) < limit:
        description += f", all there is ({limit} windows were asked for)"
    return TokenBatches(windows, description, _sha256(windows))


def _extent(count: int, seq: int, encoder: bool) -> str:
    return f"{count} texts of up to {seq} tokens" if encoder else f"{count} x {seq} tokens"


def held_out_windows(tokenizer: PreTrainedTokenizerBase, count: int, seq: int) -> NDArray[np.int64]:
    """The first windows of the built-in text that calibration never sees.

    Returns:
        int64 [count, seq].

    Raises:
        UserError: The held-out text has fewer windows of that length.
    """
    windows = _cut(iter(_text_tokens(tokenizer, held_out_text())), seq, _start_tokens(tokenizer), count)
    if len(windows) < count:
        raise UserError(
            "held-out text",
            f"holds {len(windows)} windows of {seq} tokens, fewer than {count}",
            "ask for fewer windows",
        )
    return windows


def _windows_from_source(
    source: str,
    seq: int,
    seed: int,
    limit: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    names: _Names,
    *,
    encoder: bool,
) -> NDArray[np.int64]:
    """Windows of a file (all), of the built-in text (all) or of a data set (at most `limit`): [n, seq]."""
    where = f"{names.source} {source}"
    if Path(source).suffix == ".npz":
        windows = _windows_from_npz(Path(source), seq, names)
    elif encoder:
        known = _required(tokenizer, source, names)
        windows = rows_from_documents(_documents(source, seed, names), known, seq, _limit(source, limit), where)
        _check_ids(windows[windows != PADDING], vocab_size, where)
        return windows
    else:
        windows = _windows_from_text(source, seq, seed, limit, _required(tokenizer, source, names), names)
    _check_ids(windows, vocab_size, where)
    return windows


def _documents(source: str, seed: int, names: _Names) -> Iterator[str]:
    """What an encoder reads, a text a row; the calibration half of the built-in text is one long document."""
    builtin = [calibration_text()] if names is _CALIBRATION else held_out_sentences()
    return iter(builtin) if source == "builtin" else documents_from_source(source, seed)


def _limit(source: str, limit: int | None) -> int | None:
    """How much to read: a data set may have no end, and comes shuffled; files are read whole."""
    return None if source == "builtin" or is_text_file(source) else limit


def _required(tokenizer: PreTrainedTokenizerBase | None, source: str, names: _Names) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        hint = f"put the tokenizer's files beside config.json, or {names.sources}"
        raise UserError(f"{names.source} {source}", "text needs a tokenizer, and the model has none", hint)
    return tokenizer


def _windows_from_text(
    source: str, seq: int, seed: int, limit: int | None, tokenizer: PreTrainedTokenizerBase, names: _Names
) -> NDArray[np.int64]:
    if source == "builtin":
        # The held-out text is cut as `held_out_windows` cuts it.
        texts = iter([held_out_text() if names is _EVALUATION else f"{calibration_text()}\n\n"])
    else:
        texts = (f"{document}\n\n" for document in documents_from_source(source, seed))
    tokens = (token for text in texts for token in _text_tokens(tokenizer, text))
    windows = _cut(tokens, seq, _start_tokens(tokenizer), _limit(source, limit))
    if len(windows) == 0:
        cause = f"too short: not even one window of {seq} tokens"
        raise UserError(f"{names.source} {source}", cause, f"give more text or a smaller {names.seq}")
    return windows


def _text_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def _start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens a text starts with on its own account: models that were trained with one need it in every window."""
    bos: Any = tokenizer.bos_token_id
    ids: list[int] = tokenizer.encode("a", verbose=False)
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _cut(tokens: Iterator[int], seq: int, start: list[int], limit: int | None) -> NDArray[np.int64]:
    """Cut a stream into at most `limit` full windows: [n, seq]."""
    body = seq - len(start)
    stream = np.fromiter(itertools.islice(tokens, None if limit is None else limit * body), dtype=np.int64)
    count = len(stream) // body
    windows = stream[: count * body].reshape(count, body)
    return np.hstack([np.tile(np.asarray(start, dtype=np.int64), (count, 1)), windows])


def _windows_from_npz(path: Path, seq: int, names: _Names) -> NDArray[np.int64]:
    """Windows of array `input_ids`: [n] as one stream, or [rows, n] with each row cut on its own."""
    ids = np.atleast_2d(_read_input_ids(path))
    count = ids.shape[1] // seq
    if ids.shape[0] == 0 or count == 0:
        cause = f"input_ids is {list(ids.shape)}: no row has {seq} tokens"
        raise UserError(str(path), cause, f"give longer rows or a smaller {names.seq}")
    return np.ascontiguousarray(ids[:, : count * seq]).reshape(-1, seq).astype(np.int64)


def _read_input_ids(path: Path) -> NDArray[Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            ids: NDArray[Any] = arrays["input_ids"]
    except FileNotFoundError:
        raise UserError(str(path), "no such file", SOURCES_HINT) from None
    except KeyError:
        raise UserError(
            str(path), "holds no array named input_ids", "save it with np.savez(path, input_ids=ids)"
        ) from None
    except (zipfile.BadZipFile, ValueError, EOFError) as error:
        raise UserError(str(path), f"not a readable .npz file ({error})", "write it again with np.savez") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        cause = f"input_ids is {ids.dtype} with {ids.ndim} axes"
        raise UserError(str(path), cause, "token ids are integers with one or two axes")
    return ids


def _check_ids(windows: NDArray[np.int64], vocab_size: int, where: str) -> None:
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= vocab_size:
        cause = f"token ids run from {low} to {high}, but the model's vocabulary has {vocab_size}"
        raise UserError(where, cause, "use the tokenizer that belongs to the model")


def _sha256(tokens: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(repr(tokens.shape).encode())
    digest.update(tokens.astype("<i8").tobytes())
    return digest.hexdigest()
