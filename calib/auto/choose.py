"""Choose one candidate for every linear: a multiple-choice knapsack, solved exactly by HiGHS.

    minimize    sum of predicted KL, with a little of the modelled time to break ties
    subject to  bits a weight <= budget,  per-token linears <= limit,
                one activation tier for all linears that read one tensor

With a bound on the KL instead of a budget of bits, the modelled time is minimized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from fptq_export.policy import CandidateFigures

__all__ = ["Budget", "InfeasibleError", "LinearChoice", "Totals", "choose", "totals_of"]

TIME_WEIGHT = 0.01
"""Time, as a share of that of all candidates, against KL, as a share of that of all candidates: decides near-ties."""
RELATIVE_GAP = 1e-4
"""Of the objective, at which the solver may stop."""
TIME_LIMIT_S = 60.0


class InfeasibleError(ValueError):
    """No choice meets the budget."""


@dataclass(frozen=True)
class Budget:
    """What a choice may cost; None is no limit."""

    effective_bits: float | None = None
    """Bits a weight, scales included, averaged over the linears that are chosen for."""
    kl: float | None = None
    """Predicted KL in nats a token."""
    dynamic_layers: int | None = None
    """Linears that are quantized token by token."""


@dataclass(frozen=True)
class LinearChoice:
    """What there is to choose for one linear."""

    candidates: Sequence[CandidateFigures]
    weights: int
    """Number of its weights."""
    input: str
    """The tensor it reads."""


@dataclass(frozen=True)
class Totals:
    """What a choice costs in all."""

    kl: float
    bits: float
    decode_us: float
    dynamic_layers: int


def totals_of(linears: Mapping[str, LinearChoice], chosen: Mapping[str, int]) -> Totals:
    """Add up a choice."""
    picked = {path: linears[path].candidates[index] for path, index in chosen.items()}
    weights = sum(linears[path].weights for path in picked)
    return Totals(
        kl=sum(figures.predicted_kl for figures in picked.values()),
        bits=sum(figures.bits_per_weight * linears[path].weights for path, figures in picked.items()) / weights,
        decode_us=sum(figures.decode_us for figures in picked.values()),
        dynamic_layers=sum(figures.activation == "per_token" for figures in picked.values()),
    )


def choose(linears: Mapping[str, LinearChoice], budget: Budget) -> dict[str, int]:
    """Give the index of the chosen candidate of every linear.

    Args:
        linears: What there is to choose from, each with at least one candidate.
        budget: What it may cost.

    Raises:
        InfeasibleError: No choice meets the budget.
    """
    table = _Table.from_linears(linears)
    solution = _solve(table, budget, len(linears))
    return {
        path: int(np.argmax(solution[start : start + len(linear.candidates)]))
        for (path, linear), start in zip(linears.items(), table.starts, strict=True)
    }


@dataclass(frozen=True)
class _Table:
    """Candidates of all linears, one after the other; tier variables of all tensors after them."""

    starts: tuple[int, ...]
    owner: NDArray[np.int64]
    """Candidate -> its linear."""
    kl: NDArray[np.float64]
    bits: NDArray[np.float64]
    """Share of the average that a candidate adds."""
    time: NDArray[np.float64]
    dynamic: NDArray[np.float64]
    tier: NDArray[np.int64]
    """Candidate -> the variable of its tensor's tier; -1 where the candidate does not care."""
    tiers_of_inputs: tuple[tuple[int, ...], ...]

    @classmethod
    def from_linears(cls, linears: Mapping[str, LinearChoice]) -> _Table:
        flat = [(index, figures) for index, linear in enumerate(linears.values()) for figures in linear.candidates]
        every = list(linears.values())
        total = sum(linear.weights for linear in every)
        counts = np.cumsum([0, *(len(linear.candidates) for linear in every)])
        variables: dict[tuple[str, str], int] = {}
        tier = [
            -1
            if figures.activation is None
            else variables.setdefault((every[index].input, figures.activation), len(flat) + len(variables))
            for index, figures in flat
        ]
        inputs = dict.fromkeys(name for name, _ in variables)
        return cls(
            starts=tuple(counts[:-1].tolist()),
            owner=np.array([index for index, _ in flat]),
            kl=np.array([figures.predicted_kl for _, figures in flat]),
            bits=np.array([figures.bits_per_weight * every[index].weights / total for index, figures in flat]),
            time=np.array([figures.decode_us for _, figures in flat]),
            dynamic=np.array([float(figures.activation == "per_token") for _, figures in flat]),
            tier=np.array(tier),
            tiers_of_inputs=tuple(
                tuple(number for (name, _), number in variables.items() if name == wanted) for wanted in inputs
            ),
        )

    @property
    def variables(self) -> int:
        return len(self.kl) + sum(map(len, self.tiers_of_inputs))


def _solve(table: _Table, budget: Budget, linears: int) -> NDArray[np.float64]:
    count, candidates = table.variables, len(table.kl)
    time = table.time / max(table.time.sum(), np.finfo(float).tiny)
    kl_scale = max(table.kl.sum(), np.finfo(float).tiny)
    cost = np.zeros(count)
    if budget.kl is None or budget.effective_bits is not None:
        cost[:candidates] = table.kl / kl_scale + TIME_WEIGHT * time
    else:
        cost[:candidates] = time + TIME_WEIGHT * table.kl / kl_scale
    one_each = _rows(table.owner, np.arange(candidates), linears, count)
    constraints = [LinearConstraint(one_each, 1.0, 1.0), *_tier_constraints(table, count)]
    for row, limit in (
        (table.bits, budget.effective_bits),
        (table.kl, budget.kl),
        (table.dynamic, budget.dynamic_layers),
    ):
        if limit is not None:
            padded = np.zeros(count)
            padded[:candidates] = row
            constraints.append(LinearConstraint(padded, -np.inf, float(limit)))
    result = milp(
        cost,
        constraints=constraints,
        integrality=np.ones(count, dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": TIME_LIMIT_S},
    )
    if result.x is None:
        raise InfeasibleError(result.message)
    solution: NDArray[np.float64] = result.x
    return solution


def _tier_constraints(table: _Table, count: int) -> list[LinearConstraint]:
    """A candidate needs its tier, and a tensor has at most one."""
    if not table.tiers_of_inputs:
        return []
    caring = np.flatnonzero(table.tier >= 0)
    rows = np.arange(len(caring))
    needs = _rows(rows, caring, len(caring), count) - _rows(rows, table.tier[caring], len(caring), count)
    owners = np.repeat(np.arange(len(table.tiers_of_inputs)), [len(tiers) for tiers in table.tiers_of_inputs])
    one = _rows(owners, np.concatenate(table.tiers_of_inputs), len(table.tiers_of_inputs), count)
    return [LinearConstraint(needs, -np.inf, 0.0), LinearConstraint(one, -np.inf, 1.0)]


def _rows(rows: NDArray[np.int64], columns: NDArray[np.int64], height: int, width: int) -> csr_array:
    return csr_array((np.ones(len(rows)), (rows, columns)), shape=(height, width))
