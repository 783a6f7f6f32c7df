"""Which model answers: shares that hold, retries that meet the same model, and no route to what is not there."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
from pydantic import ValidationError

from fptq_export.errors import UserError
from fptq_export.triton.serving.comparison_log import Answer, Comparison, ComparisonLog, utc_now
from fptq_export.triton.serving.routing import Route, Routes

REQUESTS = 4000
DEVIATIONS = 5.0
"""Standard deviations of a binomial share: once in a few million runs; ids and seed are fixed."""
ROUTES = Routes(routes=(Route(model="w4a8", share=3.0), Route(model="fp16", share=1.0)))


def share_of(model: str, ids: list[str]) -> float:
    """Part of the requests that a model answers."""
    return sum(ROUTES.choose(number, None).model == model for number in ids) / len(ids)


@pytest.mark.parametrize("with_ids", [True, False], ids=["by id", "drawn"])
def test_shares_hold(with_ids: bool) -> None:
    """Three quarters and one quarter, within what chance does."""
    random.seed(0)
    ids = [str(number) if with_ids else "" for number in range(REQUESTS)]
    bound = DEVIATIONS * math.sqrt(0.75 * 0.25 / REQUESTS)
    assert abs(share_of("w4a8", ids) - 0.75) < bound
    assert math.isclose(share_of("w4a8", ids) + share_of("fp16", ids), 1.0, abs_tol=2 * bound)


def test_a_retry_meets_the_same_model() -> None:
    """One id, one way; and both ways occur."""
    ways = [{ROUTES.choose(str(number), None).model for _ in range(3)} for number in range(50)]
    assert all(len(way) == 1 for way in ways)
    assert {model for way in ways for model in way} == {"w4a8", "fp16"}


def test_more_canary_keeps_the_canary() -> None:
    """A larger share of the first model takes requests from the others, and gives it none of its own away."""
    larger = Routes(routes=(Route(model="w4a8", share=9.0), Route(model="fp16", share=1.0)))
    ids = [str(number) for number in range(200)]
    before = {number for number in ids if ROUTES.choose(number, None).model == "w4a8"}
    assert before < {number for number in ids if larger.choose(number, None).model == "w4a8"}


def test_what_is_asked_for_is_taken() -> None:
    """And the log says that it was."""
    choice = ROUTES.choose("1", "fp16")
    assert (choice.model, choice.reason) == ("fp16", "asked")


def test_unknown_model_is_refused() -> None:
    """Not routed elsewhere; the error lists what there is."""
    with pytest.raises(UserError, match="'bf16'") as caught:
        ROUTES.choose("1", "bf16")
    assert "w4a8, fp16" in caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"routes": []},
        {"routes": [{"model": "a", "share": 0}]},
        {"routes": [{"model": "a", "share": "inf"}]},
        {"routes": [{"model": "../a", "share": 1}]},
        {"routes": [{"model": "a", "share": 1}, {"model": "a", "share": 2}]},
        {"routes": [{"model": "a", "share": 1}], "shadow": "b"},
    ],
    ids=["none", "no share", "endless share", "path", "twice", "shadow without a log"],
)
def test_impossible_routes_are_refused(wrong: dict[str, object]) -> None:
    """Before anything is written."""
    with pytest.raises(ValidationError):
        Routes.model_validate(wrong)


def test_log_has_a_line_for_each_request_and_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are JSON; old files go when there are five."""
    monkeypatch.setattr("fptq_export.triton.serving.comparison_log._FILE_BYTES", 2000)
    path = tmp_path / "deep" / "comparison.jsonl"
    log = ComparisonLog(path)
    answer = Answer(model="w4a8", outcome="stop", tokens=3, first_token_seconds=0.1, seconds=0.2)
    for number in range(100):
        log.write(Comparison(time=utc_now(), request_id=str(number), reason="share", answer=answer))
    log.close()
    files = sorted(path.parent.iterdir())
    assert len(files) == 5
    assert all(file.stat().st_size <= 2000 for file in files)
    last = Comparison.model_validate_json(path.read_text(encoding="utf-8").splitlines()[-1])
    assert (last.request_id, last.answer) == ("99", answer)
