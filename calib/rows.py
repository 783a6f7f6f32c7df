"""Rows of tokens for encoders: each text on its own, between the special tokens that its tokenizer puts there."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calib.padding import PADDING
from fptq_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["rows_from_documents"]

_MAX_UNKNOWN = 0.5
"""Share of unknown tokens from which a text is not in the model's language: English for a protein model is."""


def rows_from_documents(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, seq: int, limit: int | None, where: str
) -> NDArray[np.int64]:
    """Tokenize documents, a row each; a document that is longer than a row fills several.

    Args:
        documents: Texts.
        tokenizer: Says which special tokens stand before and behind a text.
        seq: Most tokens in a row, special ones included.
        limit: Stop after so many rows; None takes all documents.
        where: What errors name.

    Returns:
        int64 [rows, longest row], `PADDING` behind shorter ones.

    Raises:
        UserError: There is no text, no room between the special tokens, or the tokenizer does not know the text.
    """
    before, behind = _special_tokens(tokenizer)
    room = seq - len(before) - len(behind)
    if room < 1:
        cause = f"{seq} tokens a row leave no room between {len(before) + len(behind)} special tokens"
        raise UserError(where, cause, "allow more tokens in a row")
    rows = [[*before, *part, *behind] for part in itertools.islice(_parts(documents, tokenizer, room), limit)]
    if not rows:
        raise UserError(where, "holds no text", "give at least one text")
    _check_known(rows, tokenizer, where)
    width = max(map(len, rows))
    return np.array([row + [PADDING] * (width - len(row)) for row in rows], dtype=np.int64)


def _parts(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, room: int) -> Iterator[list[int]]:
    for document in documents:
        ids: list[int] = tokenizer.encode(document, add_special_tokens=False, verbose=False)
        for start in range(0, len(ids), room):
            yield ids[start : start + room]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    bare = tokenizer.encode("a", add_special_tokens=False, verbose=False)
    whole = tokenizer.encode("a", verbose=False)
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _check_known(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    tokens = list(itertools.chain.from_iterable(rows))
    unknown = tokens.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
    if unknown > _MAX_UNKNOWN * len(tokens):
        cause = f"{unknown / len(tokens):.0%} of its tokens are unknown to the tokenizer: not the model's language"
        raise UserError(where, cause, "give a file of what the model was trained on: .jsonl, .fasta")
