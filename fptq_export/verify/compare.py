"""A candidate session against its reference on the same text: perplexity, logits, decoding, cache."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.progress import NoProgress, Progress
from fptq_export.verify.decode import CacheBound, checked_logits, compare_decode, kl_from_log_probs, same_vocabulary
from fptq_export.verify.perplexity import CHUNK_TOKENS, Perplexity, log_softmax, nll_from_log_probs
from fptq_export.verify.report import LogitFigures, VerifyReport
from fptq_export.verify.sessions import CausalSession

__all__ = ["DECODE_STEPS", "PROMPT_TOKENS", "LogitTotals", "SessionsOfWindow", "compare_sessions", "compare_windows"]

DECODE_STEPS = 16
PROMPT_TOKENS = 64
"""Tokens of the first window that decoding starts from: enough context for the cache to matter, little to compute."""
_TOP = 5


SessionsOfWindow = Callable[[int], tuple[CausalSession, CausalSession]]
"""Index of a window -> reference and candidate that run it. Their names are the same for all windows."""


def compare_sessions(
    reference: CausalSession,
    candidate: CausalSession,
    windows: NDArray[np.int64],
    decode_steps: int = DECODE_STEPS,
    progress: Progress | None = None,
    *,
    cache_bound: CacheBound,
) -> VerifyReport:
    """Measure how far a candidate is from its reference; as `compare_windows`, with two sessions for all windows."""
    return compare_windows(
        lambda _index: (reference, candidate), windows, decode_steps, progress, cache_bound=cache_bound
    )


def compare_windows(
    sessions: SessionsOfWindow,
    windows: NDArray[np.int64],
    decode_steps: int = DECODE_STEPS,
    progress: Progress | None = None,
    *,
    cache_bound: CacheBound,
) -> VerifyReport:
    """Measure how far candidates are from their references.

    Both run every window at batch 1; the logits of one window (4 x S x V bytes for each session) are in memory at a
    time. Then the reference decodes greedily from the head of the first window and the candidate is fed its tokens.

    Args:
        sessions: The model to be reproduced and the one to be judged; a decoder is another session for each window,
            behind what its encoder gave for it.
        windows: int64 [n, S], S >= 2: token ids, without overlap or padding.
        decode_steps: Greedy decode steps, at least 1.
        progress: Where to report.
        cache_bound: How far the candidate's decode steps may lie from its own prefill.

    Returns:
        The report, without Polygraphy's part.

    Raises:
        UserError: The windows are unusable, the vocabularies differ, or logits are NaN or infinite.
    """
    _check_windows(windows, decode_steps)
    progress = NoProgress() if progress is None else progress
    totals = LogitTotals()
    with progress.task("Comparing logits", total=windows.size, unit="tokens") as task:
        for index, window in enumerate(windows):
            _compare_window(*sessions(index), window, f"window {index}", totals)
            task.advance(window.size)
    with progress.task("Decoding", total=2 * decode_steps, unit="tokens") as task:
        reference, candidate = sessions(0)
        prompt = windows[0, :PROMPT_TOKENS]
        decode, cache = compare_decode(reference, candidate, prompt, decode_steps, cache_bound, task)
    perplexity_r, perplexity_c = totals.reference.figures(), totals.candidate.figures()
    if not math.isfinite(perplexity_r.perplexity):
        raise UserError(reference.name, "its perplexity is infinite, so nothing compares with it", "check the model")
    return VerifyReport(
        reference=reference.name,
        candidate=candidate.name,
        windows=windows.shape[0],
        window_tokens=windows.shape[1],
        vocabulary=totals.vocabulary,
        reference_perplexity=perplexity_r,
        candidate_perplexity=perplexity_c,
        perplexity_increase=perplexity_c.perplexity / perplexity_r.perplexity - 1.0,
        logits=totals.logits(),
        decode=decode,
        cache=cache,
    )


class LogitTotals:
    """What the compared tokens add up to."""

    def __init__(self) -> None:
        self.reference = Perplexity()
        self.candidate = Perplexity()
        self.vocabulary = 0
        self.tokens = 0
        self._cosine_sum = 0.0
        self._cosine_min = math.inf
        self._kl_sum = 0.0
        self._top1 = 0
        self._top5 = 0

    def add(self, logits_r: NDArray[np.float32], logits_c: NDArray[np.float32], targets: NDArray[np.int64]) -> None:
        """Add tokens in a row, [T, V] and [T, V], a few in float64 at a time.

        Args:
            logits_r: Of the reference.
            logits_c: Of the candidate.
            targets: int64 [T], or [T - 1] where nothing is known to follow the last one: the token after each.
        """
        self.vocabulary = logits_r.shape[-1]
        for start in range(0, len(logits_r), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            self._add_chunk(logits_r[chunk], logits_c[chunk], targets[chunk])

    def _add_chunk(
        self, logits_r: NDArray[np.float32], logits_c: NDArray[np.float32], targets: NDArray[np.int64]
    ) -> None:
        log_r, log_c = log_softmax(logits_r), log_softmax(logits_c)
        self.reference.add(nll_from_log_probs(log_r[: len(targets)], targets), len(targets))
        self.candidate.add(nll_from_log_probs(log_c[: len(targets)], targets), len(targets))
        cosine = _cosine(logits_r, logits_c)
        self.tokens += len(logits_r)
        self._cosine_sum += float(cosine.sum())
        self._cosine_min = min(self._cosine_min, float(cosine.min()))
        self._kl_sum += float(kl_from_log_probs(log_r, log_c).sum())
        first = logits_r.argmax(axis=-1)
        self._top1 += int((first == logits_c.argmax(axis=-1)).sum())
        self._top5 += int(_is_in_top(logits_c, first, _TOP).sum())

    def logits(self) -> LogitFigures:
        """Means over the tokens so far."""
        return LogitFigures(
            tokens=self.tokens,
            cosine_mean=self._cosine_sum / self.tokens,
            cosine_min=self._cosine_min,
            kl_mean=self._kl_sum / self.tokens,
            top1_agreement=self._top1 / self.tokens,
        )

    def top5_agreement(self) -> float:
        """Share of tokens where the candidate has the reference's first token among its first five."""
        return self._top5 / self.tokens


def _check_windows(windows: NDArray[np.int64], decode_steps: int) -> None:
    where = "verification text"
    if windows.ndim != 2 or windows.shape[0] == 0:
        raise UserError(where, f"no window of tokens (shape {windows.shape})", "give a longer text or a shorter window")
    if windows.shape[1] < 2:
        raise UserError(where, f"a window of {windows.shape[1]} token(s) predicts nothing", "use at least 2 tokens")
    if windows.min() < 0:
        raise UserError(where, f"token id {windows.min()}", "token ids start at 0")
    if decode_steps < 1:
        raise UserError("decode steps", f"{decode_steps} steps prove nothing", "use at least 1")


def _compare_window(
    reference: CausalSession, candidate: CausalSession, window: NDArray[np.int64], place: str, totals: LogitTotals
) -> None:
    logits_r = checked_logits(reference, place, reference.prefill(window[None])[0], len(window))
    logits_c = checked_logits(candidate, place, candidate.prefill(window[None])[0], len(window))
    same_vocabulary(reference, candidate, logits_r.shape[-1], logits_c.shape[-1])
    if window.max() >= logits_r.shape[-1]:
        cause = f"token id {window.max()} in a vocabulary of {logits_r.shape[-1]}"
        raise UserError(f"{reference.name}, {place}", cause, "tokenize the text with this model's tokenizer")
    totals.add(logits_r, logits_c, window[1:])


def _is_in_top(logits: NDArray[np.float32], tokens: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Whether fewer than `count` logits of a row lie above that of its token: [T, V] and [T] -> [T]."""
    own = np.take_along_axis(logits, tokens[:, None], axis=-1)
    return np.asarray((logits > own).sum(axis=-1) < count)


def _cosine(logits_r: NDArray[np.float32], logits_c: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosine similarity of each token, [T, V] and [T, V] -> [T]; 1 for two zero vectors, 0 for one."""
    r, c = logits_r.astype(np.float64), logits_c.astype(np.float64)
    norms = np.sqrt(np.einsum("tv,tv->t", r, r) * np.einsum("tv,tv->t", c, c))
    products = np.einsum("tv,tv->t", r, c)
    both_zero = ~r.any(axis=-1) & ~c.any(axis=-1)
    return np.where(both_zero, 1.0, products / np.where(norms == 0.0, 1.0, norms))
