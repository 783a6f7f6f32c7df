"""Which token comes next: the most likely one, or one drawn from the most likely ones."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

__all__ = ["Sampling", "chosen_token"]


class Sampling(BaseModel):
    """How a text goes on. The defaults are greedy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: PositiveInt = 128
    """New tokens at most; fewer where the KV cache ends."""
    temperature: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: NonNegativeInt = 0
    """Draw from so many of the most likely tokens; 0 for all."""
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    """Draw from the fewest most likely tokens that have this probability together."""
    seed: NonNegativeInt | None = None
    """Of the draws; None draws differently each time."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=(), max_length=16)
    """The text ends before the first of these."""
    ignore_eos: bool = False
    """Go on behind the token that ends a text."""

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0.0

    def generator(self) -> np.random.Generator:
        """The source of the draws of one text."""
        return np.random.default_rng(self.seed)


def chosen_token(logits: NDArray[np.float32], sampling: Sampling, generator: np.random.Generator) -> int:
    """The next token.

    Tokens are ordered by their logits, equal ones by their number. The first `top_k` are kept; of these the first that
    reach `top_p` together, the one that crosses it included. One of them is drawn by its probability: the first whose
    cumulative probability exceeds u, uniform in [0, 1).

    Args:
        logits: float32 [V], finite.
        sampling: Temperature, top k and top p.
        generator: Gives u, one a token.
    """
    if sampling.is_greedy:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")[: sampling.top_k or None]
    weights = np.exp(scaled[order] - scaled[order[0]])
    cumulative = np.cumsum(weights / weights.sum())
    kept = min(int(np.searchsorted(cumulative, sampling.top_p)) + 1, len(cumulative))
    u = generator.random() * cumulative[kept - 1]
    return int(order[min(int(np.searchsorted(cumulative[:kept], u, side="right")), kept - 1)])
