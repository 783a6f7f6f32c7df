"""What the model gains with one layer in float: every layer of every block, in one pass over the blocks.

A layer in float changes nothing before its block. So its variant of the graph starts there, from the hidden states of
the quantized graph, and goes through the blocks behind as one of a batch with the variants of all layers before. Each
block is opened once, and hidden states are all that is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fptq_export.debug.report import LeaveOneOut
from fptq_export.debug.sessions import SegmentSessions
from fptq_export.verify.perplexity import Perplexity, PerplexityFigures

__all__ = ["Prediction", "Variants", "gain", "log_probabilities", "prediction"]

_TOKENS = 1024
"""Of a forward pass."""


@dataclass(frozen=True)
class Prediction:
    """How well logits predict a text, token by token, float64 [tokens]."""

    nll: NDArray[np.float64]
    """-log p(token | tokens before it), nats."""
    kl: NDArray[np.float64]
    """KL divergence of the prediction from the float model's, nats."""

    def perplexity(self) -> PerplexityFigures | None:
        """None where the logits were not finite."""
        if not np.isfinite(self.nll).all():
            return None
        total = Perplexity()
        total.add(float(self.nll.sum()), len(self.nll))
        return total.figures()

    def mean_kl(self) -> float | None:
        """None where the logits were not finite."""
        return _finite(float(self.kl.mean()))


def log_probabilities(logits: NDArray[Any]) -> torch.Tensor:
    """Of the next token: logits [B, S, V] -> float32 [B, S - 1, V].

    log-softmax in float32 is off by a few 2^-24 of the largest logit: some 1e-6 nats.
    """
    return torch.log_softmax(torch.from_numpy(logits[:, :-1].astype(np.float32)), dim=-1)


def prediction(found: torch.Tensor, tokens: NDArray[np.int64], wanted: torch.Tensor) -> Prediction:
    """Compare log probabilities with the tokens, int64 [B, S], and with those of the float model."""
    targets = torch.from_numpy(tokens[:, 1:, None])
    nll = -found.gather(-1, targets).reshape(-1)
    kl = (wanted.exp() * (wanted - found)).sum(dim=-1).reshape(-1)
    return Prediction(nll.to(torch.float64).numpy(), kl.to(torch.float64).numpy())


def gain(quantized: Prediction, kept: Prediction) -> LeaveOneOut:
    """What a layer in float brings."""
    gains = quantized.nll - kept.nll
    figures = kept.perplexity()
    spread = float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return LeaveOneOut(
        perplexity=None if figures is None else figures.perplexity,
        nll_gain=_finite(float(gains.mean())),
        nll_gain_stderr=_finite(spread),
        kl_gain=_finite(float((quantized.kl - kept.kl).mean())),
    )


def _finite(number: float) -> float | None:
    return number if np.isfinite(number) else None


class Variants:
    """Hidden states of the graph with one layer in float, for every layer so far.

    Args:
        tokens: int64 [windows, seq].
    """

    def __init__(self, tokens: NDArray[np.int64]) -> None:
        self._tokens = tokens
        self._hidden: dict[str, NDArray[Any]] = {}

    def pass_segment(self, sessions: SegmentSessions) -> None:
        """Every variant goes through a segment in which all is quantized."""
        for paths in self._batches():
            hidden = np.concatenate([self._hidden[path] for path in paths])
            ids = np.tile(self._tokens, (len(paths), 1))
            ends = np.split(sessions.run(ids, hidden), len(paths))
            self._hidden.update(zip(paths, ends, strict=True))

    def add(self, path: str, hidden: NDArray[Any]) -> None:
        """The variant of a layer in the segment that was passed: its hidden states behind it, [windows, seq, H]."""
        self._hidden[path] = hidden

    def logits(self, sessions: SegmentSessions) -> Iterator[tuple[str, NDArray[Any]]]:
        """Path and logits [windows, seq, V] of every variant; one is in memory at a time."""
        for path, hidden in self._hidden.items():
            yield path, sessions.run(self._tokens, hidden)

    def _batches(self) -> Iterator[list[str]]:
        paths = list(self._hidden)
        size = max(1, _TOKENS // self._tokens.size)
        for start in range(0, len(paths), size):
            yield paths[start : start + size]
