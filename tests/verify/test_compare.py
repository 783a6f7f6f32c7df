from __future__ import annotations

import dataclasses
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.verify.compare import DECODE_STEPS, compare_sessions
from fptq_export.verify.decode import CacheBound
from fptq_export.verify.perplexity import log_softmax, nll_from_logits
from fptq_export.verify.sessions import OnnxCausalSession

FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: two float64 programs that add up at most a thousand terms each."""
FP16_LOGIT_ERROR = 8 * 2.0**-10 * 2**3
"""Largest error of an FP16 logit: up to 2^-10 at some 64 places, adding up as sqrt(64), logits below 2^3."""
EXACT = CacheBound("fp32", layers=1)


def test_identical_sessions_agree_in_everything(toy: Any, windows: NDArray[np.int64]) -> None:
    """A model against itself: ratio 1, cosine 1, KL 0, agreement 1, no divergence, exactly."""
    report = compare_sessions(toy, toy, windows, cache_bound=EXACT)
    assert report.perplexity_increase == 0.0
    assert report.reference_perplexity == report.candidate_perplexity
    assert (report.logits.cosine_mean, report.logits.cosine_min) == (1.0, 1.0)
    assert (report.logits.kl_mean, report.logits.top1_agreement) == (0.0, 1.0)
    assert report.decode.kl == (0.0,) * (DECODE_STEPS + 1)
    assert report.decode.first_divergence is None
    assert report.decode.candidate_tokens == report.decode.reference_tokens
    assert report.cache.within_bound


def test_counts_and_shapes_are_reported(toy: Any, windows: NDArray[np.int64]) -> None:
    """Three windows of twenty tokens predict nineteen each and compare twenty each."""
    report = compare_sessions(toy, toy, windows, decode_steps=5, cache_bound=EXACT)
    assert (report.windows, report.window_tokens, report.vocabulary) == (3, 20, 16)
    assert report.reference_perplexity.tokens == 3 * 19
    assert report.logits.tokens == 3 * 20
    assert (report.decode.prompt_tokens, report.decode.steps, len(report.decode.kl)) == (20, 5, 6)


def test_figures_equal_their_formulas(make_toy: Any, windows: NDArray[np.int64]) -> None:
    """Perplexity, cosine, KL and agreement of two models equal the formulas over all logits at once."""
    reference, candidate = make_toy("r", seed=0), make_toy("c", seed=1)
    report = compare_sessions(reference, candidate, windows, cache_bound=EXACT)
    r, c = (session.prefill(windows)[0].astype(np.float64) for session in (reference, candidate))
    for figures, logits in ((report.reference_perplexity, r), (report.candidate_perplexity, c)):
        nll, tokens = nll_from_logits(logits, windows)
        assert figures.perplexity == pytest.approx(math.exp(nll / tokens), rel=FLOAT64_TOLERANCE, abs=0.0)
    cosine = (r * c).sum(-1) / np.linalg.norm(r, axis=-1) / np.linalg.norm(c, axis=-1)
    p_r, p_c = np.exp(log_softmax(r)), np.exp(log_softmax(c))
    expected = {
        "cosine_mean": cosine.mean(),
        "cosine_min": cosine.min(),
        "kl_mean": (p_r * np.log(p_r / p_c)).sum(-1).mean(),
        "top1_agreement": (r.argmax(-1) == c.argmax(-1)).mean(),
    }
    measured = report.logits.model_dump(exclude={"tokens"})
    assert measured == pytest.approx(expected, rel=FLOAT64_TOLERANCE, abs=FLOAT64_TOLERANCE)
    increase = report.candidate_perplexity.perplexity / report.reference_perplexity.perplexity - 1.0
    assert report.perplexity_increase == increase


def test_swapped_vocabulary_columns_are_seen(toy: Any, windows: NDArray[np.int64]) -> None:
    """Two columns of the head in the wrong place: exactly the tokens that had one of them on top disagree."""
    order = np.arange(16)
    order[[2, 3]] = [3, 2]
    swapped = dataclasses.replace(toy, name="swapped", own=toy.own[:, order], context=toy.context[:, order])
    logits, _ = toy.prefill(windows)
    on_top = np.isin(logits.argmax(-1), [2, 3])
    assert on_top.any()
    assert not on_top.all()
    report = compare_sessions(toy, swapped, windows, cache_bound=EXACT)
    assert report.logits.top1_agreement == pytest.approx(1.0 - on_top.mean(), rel=FLOAT64_TOLERANCE, abs=0.0)
    assert report.logits.cosine_min < 1.0
    assert report.logits.kl_mean > 0.0
    # The candidate's cache is its own matter, and in order.
    assert report.cache.within_bound


def test_broken_cache_is_caught(make_toy: Any, windows: NDArray[np.int64]) -> None:
    """A candidate whose decode forgets the past has perfect prefill figures and fails the cache proof."""
    report = compare_sessions(make_toy("r"), make_toy("c", forgets=True), windows, cache_bound=EXACT)
    assert report.perplexity_increase == 0.0
    assert report.logits.cosine_min == 1.0
    assert not report.cache.within_bound
    assert report.cache.max_abs_diff > report.cache.bound
    assert report.decode.first_divergence is not None
    assert report.decode.first_divergence > 0


def test_onnx_graphs_are_compared(tiny_llama: Any) -> None:
    """FP16 against FP32 of one LLaMA: nearly the same perplexity, and a cache within the FP16 bound."""
    reference = OnnxCausalSession(tiny_llama.fp32, threads=1)
    candidate = OnnxCausalSession(tiny_llama.fp16, threads=1)
    report = compare_sessions(
        reference, candidate, tiny_llama.ids, cache_bound=CacheBound("fp16", layers=candidate.layers)
    )
    # Logits off by at most e move each log p by 2e, KL by e^2 / 2, and the cosine by e^2 (the rms logit is above 1).
    assert abs(math.log1p(report.perplexity_increase)) <= 2 * FP16_LOGIT_ERROR
    assert 0.0 < report.logits.kl_mean <= FP16_LOGIT_ERROR**2 / 2
    assert 1.0 - FP16_LOGIT_ERROR**2 <= report.logits.cosine_min < 1.0
    assert report.cache.within_bound
    assert report.cache.bound < report.cache.logit_absmax / 100


def test_one_window_of_logits_is_in_memory(make_toy: Any) -> None:
    """Eight windows need no more memory than one: logits of both sessions, and what computing them takes."""
    vocabulary, length = 2048, 64
    rng = np.random.default_rng(0)
    windows = rng.integers(0, vocabulary, (8, length))
    session = make_toy(vocabulary=vocabulary)
    peaks = []
    for count in (1, 8):
        tracemalloc.start()
        compare_sessions(session, session, windows[:count], decode_steps=1, cache_bound=EXACT)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    window_bytes = 4 * length * vocabulary
    assert peaks[0] > 2 * window_bytes
    assert peaks[1] < peaks[0] + window_bytes / 2


class _Spoiled:
    """A session that spoils one window."""

    name = "spoiled.onnx"

    def __init__(self, session: Any, window: int, value: float) -> None:
        self._session, self._window, self._value, self._calls = session, window, value, 0

    def prefill(self, input_ids: NDArray[np.int64]) -> Any:
        logits, cache = self._session.prefill(input_ids)
        if self._calls == self._window:
            logits[0, 7, 5] = self._value
        self._calls += 1
        return logits, cache

    def decode(self, input_ids: NDArray[np.int64], cache: Any) -> Any:
        return self._session.decode(input_ids, cache)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_name_session_and_window(toy: Any, windows: NDArray[np.int64], value: float) -> None:
    """One NaN or infinity among the logits of window 2 is an error that says where, and never a figure."""
    with pytest.raises(UserError, match=r"spoiled\.onnx, window 2: .* 1 of 20 tokens, first at token 7"):
        compare_sessions(toy, _Spoiled(toy, 2, value), windows, cache_bound=EXACT)


def test_nan_in_the_reference_is_not_the_candidates_fault(toy: Any, windows: NDArray[np.int64]) -> None:
    """The error names the session that gave the NaN."""
    with pytest.raises(UserError, match=r"spoiled\.onnx, window 0"):
        compare_sessions(_Spoiled(toy, 0, math.nan), toy, windows, cache_bound=EXACT)


def test_vocabularies_that_differ_are_refused(make_toy: Any, windows: NDArray[np.int64]) -> None:
    """Sixteen and eighteen tokens cannot be compared; both sizes and sessions are named."""
    with pytest.raises(UserError, match=r"r, c: vocabularies of 16 and 18"):
        compare_sessions(make_toy("r"), make_toy("c", vocabulary=18), windows, cache_bound=EXACT)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 1), "predicts nothing"), ((0, 20), "no window"), ((20,), "no window"), ((3, 0), "nothing")],
)
def test_windows_that_predict_nothing_are_refused(toy: Any, shape: tuple[int, ...], message: str) -> None:
    """No window, or a window of fewer than two tokens, is an error and not a perplexity."""
    with pytest.raises(UserError, match=message):
        compare_sessions(toy, toy, np.zeros(shape, np.int64), cache_bound=EXACT)


def test_negative_tokens_are_refused(toy: Any) -> None:
    """-1 would silently index the last row of an embedding."""
    with pytest.raises(UserError, match="token id -1"):
        compare_sessions(toy, toy, np.array([[3, -1, 4]]), cache_bound=EXACT)


def test_no_decode_steps_are_refused(toy: Any, windows: NDArray[np.int64]) -> None:
    """Zero steps prove nothing about a cache."""
    with pytest.raises(UserError, match="prove nothing"):
        compare_sessions(toy, toy, windows, decode_steps=0, cache_bound=EXACT)


def test_logits_of_another_shape_are_refused(toy: Any, windows: NDArray[np.int64]) -> None:
    """A session that gives logits of the last token only is told which shape was expected."""

    class LastOnly(_Spoiled):
        def prefill(self, input_ids: NDArray[np.int64]) -> Any:
            logits, cache = self._session.prefill(input_ids)
            return logits[:, -1:], cache

    with pytest.raises(UserError, match=r"shape \(1, 1, 16\), not \(1, 20, vocabulary\)"):
        compare_sessions(toy, LastOnly(toy, 0, 0.0), windows, cache_bound=EXACT)


def test_two_tokens_are_enough(toy: Any) -> None:
    """The shortest window that predicts anything is accepted."""
    report = compare_sessions(toy, toy, np.array([[3, 4]]), cache_bound=EXACT)
    assert report.reference_perplexity.tokens == 1
