"""Figures of two sessions against their formulas, and what every system is fed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.diff.record import compared_with, course_from_windows, stored_logits
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from fptq_export.verify.compare import PROMPT_TOKENS
from tests.verify.conftest import ToySession

VOCABULARY = 16
STEPS = 5
FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: sums of at most a thousand terms in another order."""
FLOAT32_TOLERANCE = 1000 * 2.0**-23
"""Relative: Polygraphy adds in float32."""


def toy(seed: int, *, forgets: bool = False) -> ToySession:
    rng = np.random.default_rng(seed)
    own, context = rng.normal(size=(2, VOCABULARY, VOCABULARY)).astype(np.float32) * np.float32(3.0)
    return ToySession(f"toy {seed}", own, context, forgets)


@pytest.fixture
def windows() -> NDArray[np.int64]:
    """Two windows of 20 tokens."""
    return np.random.default_rng(1).integers(0, VOCABULARY, (2, 20))


def diffed(reference: Any, candidate: Any, windows: NDArray[np.int64], directory: Path) -> Any:
    course = course_from_windows(windows, STEPS)
    stored = stored_logits(reference, course, directory, NoProgress())
    return compared_with(stored, candidate, course, NoProgress())


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    return np.asarray(np.log(np.exp(exact) / np.exp(exact).sum(axis=-1, keepdims=True)))


def test_prefill_figures_are_their_formulas(windows: NDArray[np.int64], tmp_path: Path) -> None:
    """KL, cosine, agreement, perplexity and PSNR of all windows, written out once more in float64."""
    reference, candidate = toy(0), toy(1)
    found = diffed(reference, candidate, windows, tmp_path)
    r, c = (session.prefill(windows)[0] for session in (reference, candidate))
    log_r, log_c = log_probabilities(r), log_probabilities(c)
    first = r.argmax(axis=-1)
    five = np.argsort(-c, axis=-1)[..., :5]
    nll = -np.take_along_axis(log_c[:, :-1], windows[:, 1:, None], axis=-1)
    figures = found.prefill.logits()
    measured = {
        "kl": figures.kl_mean,
        "cosine": figures.cosine_mean,
        "top1": figures.top1_agreement,
        "top5": found.prefill.top5_agreement(),
        "perplexity": found.prefill.candidate.figures().perplexity,
    }
    r64, c64 = r.astype(np.float64), c.astype(np.float64)
    norms = np.linalg.norm(r64, axis=-1) * np.linalg.norm(c64, axis=-1)
    expected = {
        "kl": (np.exp(log_r) * (log_r - log_c)).sum(axis=-1).mean(),
        "cosine": ((r64 * c64).sum(axis=-1) / norms).mean(),
        "top1": (first == c.argmax(axis=-1)).mean(),
        "top5": (five == first[..., None]).any(axis=-1).mean(),
        "perplexity": np.exp(nll.mean()),
    }
    assert measured == pytest.approx(expected, rel=FLOAT64_TOLERANCE, abs=0.0)
    psnr = [20 * np.log10(a.max()) - 10 * np.log10(np.square(a - b).mean()) for a, b in zip(r64, c64, strict=True)]
    assert found.prefill_psnr == pytest.approx(np.mean(psnr), rel=FLOAT32_TOLERANCE, abs=0.0)


def test_decode_steps_are_fed_the_text(windows: NDArray[np.int64], tmp_path: Path) -> None:
    """The perplexity of decode steps is that of the same positions of a prefill: real tokens, real next tokens."""
    found = diffed(toy(0), toy(1), windows, tmp_path)
    head = course_from_windows(windows, STEPS).head
    logits, _ = toy(1).prefill(windows)
    places = slice(head, head + STEPS)
    nll = -np.take_along_axis(
        log_probabilities(logits[:, places]), windows[:, head + 1 : head + 1 + STEPS, None], axis=-1
    )
    measured = found.decode.candidate.figures()
    assert measured.tokens == 2 * STEPS
    # The toy adds its context in float32 in another order.
    assert measured.perplexity == pytest.approx(np.exp(nll.mean()), rel=FLOAT32_TOLERANCE, abs=0.0)


def test_lost_cache_shows_in_decode_alone(windows: NDArray[np.int64], tmp_path: Path) -> None:
    """A candidate that forgets its cache has a perfect prefill, and a decode part that says so."""
    found = diffed(toy(0), toy(0, forgets=True), windows, tmp_path)
    assert found.prefill.logits().kl_mean == 0.0
    assert found.prefill_psnr == np.inf
    assert found.decode.logits().kl_mean > 0.0


def test_free_running_tokens_are_each_systems_own(windows: NDArray[np.int64], tmp_path: Path) -> None:
    """The candidate's greedy text follows its own choices, and not those of the reference."""
    reference, candidate = toy(0), toy(1)
    found = diffed(reference, candidate, windows, tmp_path)
    head = windows[0, : course_from_windows(windows, STEPS).head].tolist()
    tokens: list[int] = []
    for _ in range(STEPS):
        logits, _cache = candidate.prefill(np.array([head + tokens]))
        tokens.append(int(logits[0, -1].argmax()))
    assert found.tokens == tuple(tokens)


def test_course_keeps_a_next_token_for_every_step() -> None:
    """Heads are as long as verification's where there is room, and the last step still has a token behind it."""
    windows = np.zeros((1, PROMPT_TOKENS + 10), np.int64)
    assert course_from_windows(windows, 9).head == PROMPT_TOKENS
    short = course_from_windows(windows, 12)
    assert len(short.targets(windows[0])) == 12
    with pytest.raises(UserError, match=f"at most {PROMPT_TOKENS + 8}"):
        course_from_windows(windows, PROMPT_TOKENS + 9)
