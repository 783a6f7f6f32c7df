"""Sessions as evaluation runs them, and perplexity through them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.evaluate.models import SessionModel, perplexity_from_windows
from fptq_export.progress import NoProgress
from fptq_export.verify.perplexity import nll_from_logits
from tests.evaluate.conftest import LetterModel, Tiny

FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: two float64 programs that add up at most a thousand terms each."""


class OneLogit:
    """A session whose logits are all one value."""

    name = "constant"

    def __init__(self, value: float) -> None:
        self._value = value

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], None]:
        """[B, S] -> [B, S, 5]."""
        return np.full((*input_ids.shape, 5), self._value, np.float32), None

    def decode(self, input_ids: NDArray[np.int64], cache: Any) -> tuple[NDArray[np.float32], None]:
        """Not reached."""
        raise AssertionError("evaluation does not decode")


def test_perplexity_is_that_of_all_windows_together() -> None:
    """Windows run one by one add up to what one batch of them gives, and each starts anew."""
    model, windows = LetterModel(), np.random.default_rng(1).integers(0, 28, (3, 20))
    figures = perplexity_from_windows(model, windows, "letters", NoProgress())
    logits = np.stack([LetterModel().logits(window) for window in windows])
    nll, tokens = nll_from_logits(logits, windows)
    assert figures.tokens == tokens == 57
    assert figures.nll_sum == pytest.approx(nll, rel=FLOAT64_TOLERANCE, abs=0.0)


def test_session_gives_the_logits_of_its_module(tiny: Tiny) -> None:
    """The interface adds and drops nothing: the same module on the same ids."""
    import torch

    ids = np.arange(12)
    with torch.inference_mode():
        expected = tiny.torch_model(torch.from_numpy(ids[None]), use_cache=True).logits[0].numpy()
    np.testing.assert_array_equal(tiny.model.logits(ids), expected)


@pytest.mark.parametrize(("ids", "cause"), [([0, 5], "0 to 5, with"), ([-1, 2], "-1 to 2"), ([], "no tokens")])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int], cause: str) -> None:
    """A tokenizer of another model is an error and not a number."""
    with pytest.raises(UserError, match=cause):
        SessionModel(OneLogit(0.0), 5).logits(np.asarray(ids, np.int64))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    """An overflow is said where it happens, not hidden in a mean."""
    with pytest.raises(UserError, match="NaN or infinite at 2 of 2 tokens"):
        SessionModel(OneLogit(value), 5).logits(np.array([0, 1]))
