"""Perplexity over windows that do not overlap.

    perplexity = exp(sum of -log p(token | tokens before it in its window) / number of such tokens)

The first token of a window has nothing before it and is not counted. Everything is float64: a sum of V = 2^18 terms
in float64 is off by at most V x 2^-53 = 3e-11 relative, so log-softmax adds nothing visible to the float32 logits.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CHUNK_TOKENS",
    "Perplexity",
    "PerplexityFigures",
    "log_softmax",
    "nll_from_log_probs",
    "nll_from_logits",
    "windows_from_ids",
]

CHUNK_TOKENS = 16
"""Tokens in float64 at a time: 16 x 49152 x 8 bytes = 6 MB an array."""


class PerplexityFigures(BaseModel):
    """How well a model predicts a text."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    nll_sum: float = Field(ge=0.0)
    """Sum of -log p(token | tokens before it), in nats."""
    tokens: int = Field(ge=1)
    """Tokens predicted: windows x (window length - 1)."""
    perplexity: float = Field(ge=1.0)
    """exp(nll_sum / tokens); infinite above the float64 range (709 nats a token)."""


class Perplexity:
    """Adds windows up."""

    def __init__(self) -> None:
        self._nll_sum = 0.0
        self._tokens = 0

    def add(self, nll_sum: float, tokens: int) -> None:
        """Add a window: its summed negative log likelihood in nats, and how many tokens it predicts."""
        self._nll_sum += nll_sum
        self._tokens += tokens

    def figures(self) -> PerplexityFigures:
        """What has been added so far. Raises ValueError when that is nothing."""
        if self._tokens == 0:
            raise ValueError("perplexity of no tokens")
        mean = self._nll_sum / self._tokens
        return PerplexityFigures(
            nll_sum=self._nll_sum, tokens=self._tokens, perplexity=math.exp(mean) if mean < _MAX_NLL else math.inf
        )


_MAX_NLL = math.log(np.finfo(np.float64).max)


def windows_from_ids(ids: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Cut token ids [N] into windows [N // length, length]; the rest at the end is left out."""
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Logarithm of softmax, [..., V] -> float64 [..., V]; the largest logit is subtracted, so exp cannot overflow."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def nll_from_log_probs(log_probs: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """Sum of -log p(target): log_probs [T, V], targets [T] -> nats."""
    return float(-np.take_along_axis(log_probs, targets[:, None], axis=-1).sum())


def nll_from_logits(logits: NDArray[np.floating], ids: NDArray[np.int64]) -> tuple[float, int]:
    """Negative log likelihood of one batch of windows.

    Args:
        logits: [B, S, V]; position t predicts token t + 1.
        ids: int64 [B, S], each in [0, V).

    Returns:
        Sum in nats (float64), and the number of tokens predicted, B x (S - 1).

    Raises:
        ValueError: Shapes disagree, S < 2, or an id is outside the vocabulary.
    """
    if logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        raise ValueError(f"logits {logits.shape} do not belong to ids {ids.shape}, or there is nothing to predict")
    if ids.min() < 0 or ids.max() >= logits.shape[2]:
        raise ValueError(f"token ids up to {ids.max()} in a vocabulary of {logits.shape[2]}")
    total = 0.0
    for window_logits, window in zip(logits, ids, strict=True):
        for start in range(0, len(window) - 1, CHUNK_TOKENS):
            targets = window[start + 1 : start + 1 + CHUNK_TOKENS]
            total += nll_from_log_probs(log_softmax(window_logits[start : start + len(targets)]), targets)
    return total, ids.shape[0] * (ids.shape[1] - 1)
