"""The solver's choice is the best one there is, and keeps every limit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import pytest

from calib.auto.choose import RELATIVE_GAP, Budget, InfeasibleError, LinearChoice, choose, totals_of
from fptq_export.policy import Activation, CandidateFigures

TIERS: tuple[Activation | None, ...] = ("static", "per_token", None)


def figures(kl: float, bits: float, *, tier: Activation | None = "static", us: float = 1.0) -> CandidateFigures:
    return CandidateFigures(
        precision="w4a8",
        activation=tier,
        group_size=64,
        sqnr_db=20.0,
        predicted_kl=kl,
        bits_per_weight=bits,
        decode_us=us,
    )


def random_linears(seed: int) -> dict[str, LinearChoice]:
    """Four linears, of which two read one tensor; candidates differ in everything but time."""
    rng = np.random.default_rng(seed)
    return {
        f"linear{index}": LinearChoice(
            [
                figures(float(rng.uniform(0, 1)), float(rng.uniform(4, 9)), tier=tier)
                for tier in TIERS
                for _ in range(2)
            ],
            int(rng.integers(1, 9)) * 64,
            "shared" if index < 2 else f"input{index}",
        )
        for index in range(4)
    }


def every_choice(linears: Mapping[str, LinearChoice]) -> Iterator[dict[str, int]]:
    """All that keep one tier for each tensor."""
    for picks in itertools.product(*(range(len(linear.candidates)) for linear in linears.values())):
        chosen = dict(zip(linears, picks, strict=True))
        tiers = {(linears[path].input, linears[path].candidates[index].activation) for path, index in chosen.items()}
        caring = [name for name, tier in tiers if tier is not None]
        if len(caring) == len(set(caring)):
            yield chosen


def allowed(linears: Mapping[str, LinearChoice], chosen: dict[str, int], budget: Budget) -> bool:
    totals = totals_of(linears, chosen)
    limits = [(totals.bits, budget.effective_bits), (totals.dynamic_layers, budget.dynamic_layers)]
    return all(limit is None or value <= limit for value, limit in limits)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("budget", [Budget(5.5), Budget(6.5, dynamic_layers=1), Budget(dynamic_layers=0)])
def test_choice_is_the_best_of_all(seed: int, budget: Budget) -> None:
    """Brute force finds nothing better than the solver, beyond the gap at which it may stop."""
    linears = random_linears(seed)
    kls = [totals_of(linears, chosen).kl for chosen in every_choice(linears) if allowed(linears, chosen, budget)]
    if not kls:
        with pytest.raises(InfeasibleError):
            choose(linears, budget)
        return
    chosen = choose(linears, budget)
    assert allowed(linears, chosen, budget)
    assert chosen in list(every_choice(linears))
    # Times are equal, so the objective is the KL, up to a constant that the gap counts too.
    everything = sum(it.predicted_kl for linear in linears.values() for it in linear.candidates)
    assert totals_of(linears, chosen).kl <= min(kls) + RELATIVE_GAP * everything


def test_time_decides_between_equals() -> None:
    """Where prediction does not suffer, the faster candidate is taken."""
    linears = {"a": LinearChoice([figures(0.1, 4.25, us=2.0), figures(0.1, 4.25, us=1.0)], 64, "x")}
    assert choose(linears, Budget(5.0)) == {"a": 1}


def test_bound_on_the_prediction_minimizes_time() -> None:
    """With a bound on the KL alone, the fastest choice within it wins, not the most accurate."""
    linears = {
        "a": LinearChoice([figures(0.01, 8.0, us=3.0), figures(0.2, 4.0, us=1.0), figures(0.9, 4.0, us=0.5)], 64, "x")
    }
    assert choose(linears, Budget(kl=0.3)) == {"a": 1}


def test_linears_of_one_tensor_share_the_tier() -> None:
    """Each alone would take another tier; together they take the one that is better in sum."""
    linears = {
        "q": LinearChoice([figures(0.1, 4.0, tier="static"), figures(0.3, 4.0, tier="per_token")], 64, "x"),
        "k": LinearChoice([figures(0.9, 4.0, tier="static"), figures(0.2, 4.0, tier="per_token")], 64, "x"),
    }
    assert choose(linears, Budget(5.0)) == {"q": 1, "k": 1}


@pytest.mark.parametrize("budget", [Budget(3.9), Budget(kl=0.05), Budget(dynamic_layers=0)])
def test_impossible_budget_is_refused(budget: Budget) -> None:
    """No limit is bent."""
    linears = {"a": LinearChoice([figures(0.1, 4.0, tier="per_token")], 64, "x")}
    with pytest.raises(InfeasibleError):
        choose(linears, budget)
