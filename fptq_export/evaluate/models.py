"""What evaluation asks of a model, and perplexity through it."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.progress import Progress
from fptq_export.verify.decode import checked_logits
from fptq_export.verify.perplexity import Perplexity, PerplexityFigures, nll_from_logits
from fptq_export.verify.sessions import CausalSession

__all__ = ["LogitsModel", "SessionModel", "perplexity_from_windows"]


class LogitsModel(Protocol):
    """A causal language model, reduced to its one function."""

    @property
    def name(self) -> str:
        """What progress and errors call it."""

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token ids int64 [S], S >= 1 -> logits float32 [S, V]; row t predicts token t + 1."""


class SessionModel:
    """A session that verification could compare, as a `LogitsModel`: one prefill a call, at batch 1.

    Args:
        session: Its cache is not used.
        vocab_size: Rows of the embedding; ids beyond them are refused before a runtime sees them.
    """

    def __init__(self, session: CausalSession, vocab_size: int) -> None:
        self._session = session
        self._vocab_size = vocab_size

    @property
    def name(self) -> str:
        """That of the session."""
        return self._session.name

    def logits(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token ids int64 [S] -> logits float32 [S, V].

        Raises:
            UserError: An id lies outside the vocabulary, or logits are NaN or infinite.
        """
        if len(ids) == 0 or ids.min() < 0 or ids.max() >= self._vocab_size:
            cause = f"token ids {ids.min()} to {ids.max()}" if len(ids) else "no tokens"
            hint = "use the tokenizer that belongs to the model"
            raise UserError(self.name, f"{cause}, with a vocabulary of {self._vocab_size}", hint)
        logits, _ = self._session.prefill(ids[None])
        return checked_logits(self._session, f"{len(ids)} tokens", logits, len(ids))


def perplexity_from_windows(
    model: LogitsModel, windows: NDArray[np.int64], text: str, progress: Progress
) -> PerplexityFigures:
    """Perplexity of windows, each on its own: int64 [n, S], S >= 2.

    Args:
        model: Runs one window at a time; its logits (4 x S x V bytes) are in memory.
        windows: Token ids.
        text: What the progress bar calls them.
        progress: Where to report.
    """
    totals = Perplexity()
    with progress.task(f"{model.name}: perplexity of {text}", total=windows.size, unit="tokens") as task:
        for window in windows:
            totals.add(*nll_from_logits(model.logits(window)[None], window[None]))
            task.advance(window.size)
    return totals.figures()
