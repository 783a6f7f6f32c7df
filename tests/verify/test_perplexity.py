from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fptq_export.files import read_json_model, write_json_model
from fptq_export.verify.perplexity import (
    CHUNK_TOKENS,
    Perplexity,
    PerplexityFigures,
    log_softmax,
    nll_from_logits,
    windows_from_ids,
)

FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: two float64 programs that add up at most a thousand terms each."""


def _nll_by_hand(logits: NDArray[np.floating], ids: NDArray[np.int64]) -> float:
    """The definition, one exactly rounded sum at a time."""
    terms = []
    for rows, window in zip(logits.tolist(), ids.tolist(), strict=True):
        for row, target in zip(rows[:-1], window[1:], strict=True):
            largest = max(row)
            terms.append(largest + math.log(math.fsum(math.exp(value - largest) for value in row)) - row[target])
    return math.fsum(terms)


@pytest.mark.parametrize("length", [2, CHUNK_TOKENS, CHUNK_TOKENS + 1, CHUNK_TOKENS + 2, 3 * CHUNK_TOKENS + 5])
def test_nll_equals_its_definition(length: int) -> None:
    """The sum is that of the definition at every place where a chunk may end, in a batch of two."""
    rng = np.random.default_rng(length)
    logits = (rng.normal(size=(2, length, 11)) * 5).astype(np.float32)
    ids = rng.integers(0, 11, (2, length))
    nll, tokens = nll_from_logits(logits, ids)
    assert tokens == 2 * (length - 1)
    assert nll == pytest.approx(_nll_by_hand(logits, ids), rel=FLOAT64_TOLERANCE, abs=0.0)


def test_perplexity_of_no_knowledge_is_the_vocabulary() -> None:
    """Equal logits predict one token in V."""
    totals = Perplexity()
    totals.add(*nll_from_logits(np.zeros((1, 30, 50), np.float32), np.arange(30)[None]))
    assert totals.figures().perplexity == pytest.approx(50.0, rel=FLOAT64_TOLERANCE, abs=0.0)


def test_perplexity_of_certainty_is_one() -> None:
    """A logit of 200 on each next token leaves nothing to guess."""
    ids = np.array([[3, 1, 4, 1, 5]])
    logits = np.zeros((1, 5, 6), np.float32)
    logits[0, np.arange(4), ids[0, 1:]] = 200.0
    totals = Perplexity()
    totals.add(*nll_from_logits(logits, ids))
    assert totals.figures().perplexity == 1.0


def test_the_last_logits_and_the_first_token_count_for_nothing() -> None:
    """Nothing predicts the first token, and nothing follows the last."""
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(1, 9, 7)), rng.integers(0, 7, (1, 9))
    expected = nll_from_logits(logits, ids)
    logits[0, -1], ids[0, 0] = 1e3, (ids[0, 0] + 1) % 7
    assert nll_from_logits(logits, ids) == expected


@given(st.floats(-60000.0, 60000.0))
def test_log_softmax_ignores_a_common_offset(offset: float) -> None:
    """An offset as large as FP16 goes neither overflows nor changes the result by more than its own rounding."""
    logits = np.array([0.0, 1.0, -3.0, 7.5])
    rounding = 4 * abs(offset) * 2.0**-52 + FLOAT64_TOLERANCE
    np.testing.assert_allclose(log_softmax(logits + offset), log_softmax(logits), rtol=0.0, atol=rounding)


def test_windows_add_up_to_one_text() -> None:
    """Two windows added up weigh each token alike, whatever their lengths."""
    totals = Perplexity()
    totals.add(10.0, 4)
    totals.add(2.0, 8)
    figures = totals.figures()
    assert (figures.nll_sum, figures.tokens, figures.perplexity) == (12.0, 12, math.e)


def test_windows_do_not_overlap_and_drop_the_rest() -> None:
    """Eleven tokens are two windows of four."""
    np.testing.assert_array_equal(windows_from_ids(np.arange(11), 4), [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert windows_from_ids(np.arange(3), 4).shape == (0, 4)


def test_no_tokens_have_no_perplexity() -> None:
    """An empty sum is an error and not a perfect score."""
    with pytest.raises(ValueError, match="no tokens"):
        Perplexity().figures()


def test_hopeless_perplexity_is_infinite_and_survives_the_file(tmp_path: Path) -> None:
    """Above the float64 range the figure is infinite, and JSON keeps it."""
    totals = Perplexity()
    totals.add(1e6, 1)
    figures = totals.figures()
    assert figures.perplexity == math.inf
    write_json_model(figures, tmp_path / "figures.json")
    assert read_json_model(tmp_path / "figures.json", PerplexityFigures) == figures


@pytest.mark.parametrize(
    ("shape", "ids", "message"),
    [
        ((1, 1, 5), [[0]], "nothing to predict"),
        ((1, 3, 5), [[0, 1]], "do not belong"),
        ((2, 2, 5), [[0, 1]], "do not belong"),
        ((1, 2, 5), [[0, 5]], "up to 5 in a vocabulary of 5"),
        ((1, 2, 5), [[-1, 2]], "vocabulary"),
    ],
)
def test_logits_that_do_not_fit_are_refused(shape: tuple[int, int, int], ids: list[list[int]], message: str) -> None:
    """Shapes that disagree, windows of one token and ids outside the vocabulary never give a number."""
    with pytest.raises(ValueError, match=message):
        nll_from_logits(np.zeros(shape, np.float32), np.array(ids))
