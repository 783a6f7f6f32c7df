"""What other budgets of bits would give: the best predicted KL for each."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from calib.auto.choose import Budget, LinearChoice, choose, totals_of
from calib.auto.report import ParetoPoint

__all__ = ["BUDGETS", "pareto_points"]

BUDGETS = 12
"""Points between the fewest bits and those of the best prediction."""


def pareto_points(choices: Mapping[str, LinearChoice], dynamic_layers: int | None) -> tuple[ParetoPoint, ...]:
    """Solve for evenly spaced budgets; choices that an earlier budget gave already are left out.

    Args:
        choices: What there is to choose.
        dynamic_layers: The limit on per-token linears, which holds for every point.
    """
    total = sum(choice.weights for choice in choices.values())
    fewest = sum(
        min(figures.bits_per_weight for figures in choice.candidates) * choice.weights for choice in choices.values()
    )
    most = totals_of(choices, choose(choices, Budget(dynamic_layers=dynamic_layers))).bits
    points: dict[float, ParetoPoint] = {}
    for bits in np.linspace(fewest / total, most, BUDGETS):
        budget = Budget(effective_bits=math.nextafter(float(bits), math.inf), dynamic_layers=dynamic_layers)
        totals = totals_of(choices, choose(choices, budget))
        points.setdefault(
            totals.kl,
            ParetoPoint(
                effective_bits=totals.bits,
                decode_us=totals.decode_us,
                predicted_kl=totals.kl,
                predicted_perplexity_ratio=math.exp(totals.kl),
            ),
        )
    return tuple(points.values())
