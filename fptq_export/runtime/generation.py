"""One text, token by token."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fptq_export.errors import UserError
from fptq_export.runtime.limits import Limits
from fptq_export.runtime.refusals import PromptTooLongError
from fptq_export.runtime.sampling import Sampling, chosen_token
from fptq_export.runtime.text import TextTokenizer
from fptq_export.verify.sessions import CausalSession

__all__ = ["Completion", "FinishReason", "Generation", "Piece", "completion_from_pieces"]

FinishReason = Literal["stop", "length"]
"""The model or a stop string ended the text; or `max_tokens` or the KV cache did."""


@dataclass(frozen=True)
class Piece:
    """What one step gave."""

    token_id: int
    text: str
    """Text that is certain since this token; empty inside a character, and where it may be a stop string."""
    finish_reason: FinishReason | None = None
    """Set in the last piece."""


@dataclass(frozen=True)
class Completion:
    """A whole answer."""

    text: str
    token_ids: tuple[int, ...]
    """Every token that was chosen, the one that ended the text included."""
    finish_reason: FinishReason
    prompt_tokens: int
    first_token_seconds: float
    """From the first step to the first token."""
    seconds: float
    """From the first step to the last token."""


class Generation:
    """One text. A step takes the next token, so that several texts can take turns on one model.

    Args:
        model: The model.
        prompt: Its tokens, at least one.
        sampling: How it goes on.
        tokenizer: Without one, pieces have no text, and nothing but `max_tokens` ends them.
        limits: Of the model.

    Raises:
        UserError: The prompt is empty, too long, or holds what is no token; or there are stop strings and no tokenizer.
    """

    def __init__(
        self,
        model: CausalSession,
        prompt: Sequence[int],
        sampling: Sampling,
        tokenizer: TextTokenizer | None,
        limits: Limits,
    ) -> None:
        check_prompt(prompt, limits, None if tokenizer is None else tokenizer.vocabulary)
        if sampling.stop and tokenizer is None:
            raise UserError("stop", "there is no tokenizer to find it with", "give token ids in, and cut the ids out")
        self.prompt_tokens = len(prompt)
        self.is_done = False
        self._model = model
        self._prompt = np.array([prompt], np.int64)
        self._sampling = sampling
        self._text = None if tokenizer is None else tokenizer.stream(sampling.stop)
        self._eos = frozenset() if tokenizer is None or sampling.ignore_eos else tokenizer.eos_ids
        self._room = sampling.max_tokens
        if limits.max_kv_len is not None:
            # The last token is never run, so it needs no place in the cache.
            self._room = min(self._room, limits.max_kv_len - len(prompt) + 1)
        self._generator = sampling.generator()
        self._cache: Any = None
        self._last = 0
        self._count = 0

    def step(self) -> Piece:
        """The next token. Not to be called when `is_done`.

        Raises:
            UserError: The model cannot run, or gives logits that are no numbers.
        """
        if self._cache is None:
            logits, self._cache = self._model.prefill(self._prompt)
        else:
            logits, self._cache = self._model.decode(np.array([[self._last]], np.int64), self._cache)
        row = logits[0, -1]
        if not np.isfinite(row).all():
            cause = f"its logits behind {self.prompt_tokens + self._count} tokens are not finite"
            raise UserError(self._model.name, cause, "find the layer: fptq-export debug RUN")
        self._last = chosen_token(row, self._sampling, self._generator)
        self._count += 1
        return self._piece()

    def _piece(self) -> Piece:
        token = self._last
        if token in self._eos:
            return self._ended(self._text.finish() if self._text else "", "stop")
        text = self._text.push(token) if self._text else ""
        if self._text and self._text.stopped:
            return self._ended(text, "stop")
        if self._count == self._room:
            rest = self._text.finish() if self._text else ""
            return self._ended(text + rest, "stop" if self._text and self._text.stopped else "length")
        return Piece(token, text)

    def _ended(self, text: str, reason: FinishReason) -> Piece:
        self.is_done = True
        self._cache = None
        return Piece(self._last, text, reason)


def check_prompt(prompt: Sequence[int], limits: Limits, vocabulary: int | None) -> None:
    """Refuse what a model could not read.

    Args:
        prompt: Tokens.
        limits: Of the model.
        vocabulary: Number of tokens there are, where it is known: an engine would read beyond its embeddings.

    Raises:
        PromptTooLongError: The prompt is too long.
        UserError: The prompt is empty, or holds what is no token.
    """
    if not prompt:
        raise UserError("prompt", "is empty", "give at least one token")
    for token in (min(prompt), max(prompt)):
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            raise UserError("prompt", f"{token} is no token", "give ids of this model's tokenizer")
    for name, limit in (("--max-input-len", limits.max_input_len), ("--max-kv-len", limits.max_kv_len)):
        if limit is not None and len(prompt) > limit:
            cause = f"has {len(prompt)} tokens, the model takes {limit}"
            raise PromptTooLongError("prompt", cause, f"shorten it, or export the model with a larger {name}")


def completion_from_pieces(pieces: Sequence[tuple[Piece, float]], prompt_tokens: int, started: float) -> Completion:
    """A whole answer of its pieces, each with the time it came at."""
    last, end = pieces[-1]
    if last.finish_reason is None:
        raise AssertionError("the last piece says why it is the last")
    return Completion(
        text="".join(piece.text for piece, _ in pieces),
        token_ids=tuple(piece.token_id for piece, _ in pieces),
        finish_reason=last.finish_reason,
        prompt_tokens=prompt_tokens,
        first_token_seconds=pieces[0][1] - started,
        seconds=end - started,
    )


def now() -> float:
    """Seconds of a clock that never goes back."""
    return time.perf_counter()
