"""Sampling: the wrong token must never be possible, and the right ones as often as their probability says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from fptq_export.runtime import Sampling
from fptq_export.runtime.sampling import chosen_token

DRAWS = 4000
FREQUENCY_DEVIATIONS = 5.0
"""Standard deviations of a binomial frequency: beyond five in one of a few thousand tests; the seed is fixed."""

logits_arrays = st.lists(st.floats(-8.0, 8.0, width=32), min_size=1, max_size=40).map(
    lambda values: np.array(values, np.float32)
)


class FixedDraw(np.random.Generator):
    """Gives one number for ever."""

    def __init__(self, value: float) -> None:
        super().__init__(np.random.PCG64(0))
        self._value = value

    def random(self, *_: object, **__: object) -> float:  # type: ignore[override]  # of NumPy's seven signatures, one
        """The number."""
        return self._value


def allowed_by_transformers(logits: NDArray[np.float32], sampling: Sampling) -> set[int]:
    """Tokens that transformers would draw from: the independent reference."""
    scores = torch.from_numpy(logits)[None].double()
    ids = torch.zeros((1, 1), dtype=torch.long)
    for warper in (
        TemperatureLogitsWarper(sampling.temperature),
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        TopPLogitsWarper(sampling.top_p),
    ):
        scores = warper(ids, scores)
    return set(torch.nonzero(torch.isfinite(scores[0])).flatten().tolist())


@given(logits=logits_arrays)
def test_greedy_takes_the_first_of_the_largest(logits: NDArray[np.float32]) -> None:
    """Ties go to the smaller token, as everywhere."""
    token = chosen_token(logits, Sampling(), np.random.default_rng(0))
    assert token == logits.tolist().index(logits.max())


@given(
    logits=logits_arrays.filter(lambda values: len(set(values.tolist())) == len(values)),
    temperature=st.floats(0.2, 4.0),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.05, 0.95),
    u=st.floats(0.0, 1.0, exclude_max=True),
)
def test_no_token_beyond_the_limits_is_drawn(
    logits: NDArray[np.float32], temperature: float, top_k: int, top_p: float, u: float
) -> None:
    """Whatever u is, the token is among those that transformers' own filters leave."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    assert chosen_token(logits, sampling, FixedDraw(u)) in allowed_by_transformers(logits, sampling)


def test_every_token_within_the_limits_can_be_drawn() -> None:
    """Top k and top p leave exactly the tokens that transformers leaves."""
    logits = np.array([1.0, 3.0, 2.5, -1.0, 2.0], np.float32)
    sampling = Sampling(temperature=0.8, top_k=4, top_p=0.9)
    drawn = {chosen_token(logits, sampling, FixedDraw(u)) for u in np.linspace(0.0, 1.0, 1001)[:-1]}
    assert drawn == allowed_by_transformers(logits, sampling)


def test_tokens_come_as_often_as_their_probability_says() -> None:
    """The frequencies of many draws are those of the softmax."""
    logits = np.array([0.0, 1.0, -1.0, 2.0], np.float32)
    sampling = Sampling(temperature=1.5, seed=0)
    generator = sampling.generator()
    counts = np.bincount([chosen_token(logits, sampling, generator) for _ in range(DRAWS)], minlength=4)
    expected = torch.softmax(torch.from_numpy(logits).double() / 1.5, 0).numpy()
    for count, probability in zip(counts, expected, strict=True):
        deviation = math.sqrt(probability * (1.0 - probability) / DRAWS)
        assert abs(count / DRAWS - probability) < FREQUENCY_DEVIATIONS * deviation


def test_one_candidate_is_greedy() -> None:
    """Top k of 1 draws nothing."""
    logits = np.array([0.5, 0.25, 0.75], np.float32)
    assert chosen_token(logits, Sampling(temperature=2.0, top_k=1), FixedDraw(0.999)) == 2


def test_a_seed_repeats_the_draws() -> None:
    """Two generators of one seed choose alike; of another, otherwise."""
    logits = np.zeros(50, np.float32)

    def draws(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.0, seed=seed)
        generator = sampling.generator()
        return [chosen_token(logits, sampling, generator) for _ in range(20)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)


def test_high_temperature_does_not_overflow() -> None:
    """Large logits at a small temperature are still a distribution."""
    logits = np.array([3e4, 3e4, -3e4], np.float32)
    sampling = Sampling(temperature=1e-3)
    assert {chosen_token(logits, sampling, FixedDraw(u)) for u in (0.0, 0.25, 0.75, 0.999)} == {0, 1}


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"seed": -1},
        {"stop": ("",)},
        {"beams": 2},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    """No setting is bent into another."""
    with pytest.raises(ValidationError):
        Sampling.model_validate(wrong)
