"""A model that says what it is told to, and a tokenizer of letters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fptq_export.runtime import TextTokenizer

__all__ = ["EOS", "VOCABULARY", "ScriptedModel", "continue_alphabet", "letters"]

VOCABULARY = 27
EOS = 26
"""Token that ends a text; 0 to 25 are the letters a to z."""


@dataclass(frozen=True)
class _Cache:
    ids: tuple[int, ...]


def continue_alphabet(ids: Sequence[int]) -> int:
    """The letter behind the last one; the end behind z."""
    return ids[-1] + 1


class ScriptedModel:
    """A `CausalSession` whose most likely next token is a function of all tokens before.

    Args:
        script: Tokens so far -> the next one.
        gate: Every call waits for it, so that a test can hold the model.
    """

    name = "scripted"

    def __init__(
        self, script: Callable[[Sequence[int]], int] = continue_alphabet, gate: threading.Semaphore | None = None
    ) -> None:
        self._script = script
        self._gate = gate
        self.calls: list[tuple[int, ...]] = []
        """All tokens of the text that each call went on with."""
        self.called = threading.Event()

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], _Cache]:
        """A prompt: [1, S]."""
        return self._run(tuple(int(token) for token in input_ids[0]))

    def decode(self, input_ids: NDArray[np.int64], cache: _Cache) -> tuple[NDArray[np.float32], _Cache]:
        """One more token: [1, 1]."""
        return self._run((*cache.ids, int(input_ids[0, 0])))

    def _run(self, ids: tuple[int, ...]) -> tuple[NDArray[np.float32], _Cache]:
        self.calls.append(ids)
        self.called.set()
        if self._gate is not None:
            self._gate.acquire()
        logits = np.zeros((1, 1, VOCABULARY), np.float32)
        logits[0, 0, self._script(ids)] = 1.0
        return logits, _Cache(ids)


def letters() -> TextTokenizer:
    """A token a letter."""
    alphabet = {chr(ord("a") + number): number for number in range(26)}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "</s>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["</s>"])
    return TextTokenizer(tokenizer, [EOS], None, {}, "letters")
