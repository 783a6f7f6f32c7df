"""`--policy auto`: measure what every linear could run, choose under a budget, keep the choice only if it is better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.auto.choose import Budget, InfeasibleError, LinearChoice, choose, totals_of
from calib.auto.cost import MODELLED_DEVICE, DecodeCost, cost_from_device, cost_from_table
from calib.auto.judge import log_probs_from_windows, measured_kl
from calib.auto.measure import Measured, candidates_of, choices_from_probes, static_scale_of
from calib.auto.pareto import pareto_points
from calib.auto.probe import probe_linears
from calib.auto.report import AutoReport, PolicyTotals
from calib.decide import PolicyOptions, decide_policy
from calib.equalize import closed_form_scale
from calib.linears import LinearWeights
from calib.load import model_from_checkpoint
from calib.policy_arrays import policy_arrays
from calib.rule import AUTO_REASON_START
from calib.shared_inputs import stats_of_tensors
from calib.site_scales import SiteScales, scales_of_policy
from fptq_export.errors import UserError
from fptq_export.policy import ArrayStream, CandidateFigures, LayerPolicy, Policy
from fptq_export.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["AutoDecision", "AutoOptions", "decide_auto"]

PROBE_WINDOWS = 2
"""Calibration windows at the start that candidates are measured on; as many at the end judge the whole policy."""

Choices = Mapping[str, LinearChoice]


@dataclass(frozen=True)
class AutoOptions:
    """What the choice may cost; without any limit, it may have as many bits as the paper's policy."""

    effective_bits: float | None = None
    max_kl: float | None = None
    """Predicted KL in nats a token; without `effective_bits`, the time is minimized under it."""
    max_dynamic_layers: int | None = None
    cost_table: Path | None = None


@dataclass(frozen=True)
class AutoDecision:
    """What was chosen."""

    policy: Policy
    arrays: ArrayStream
    report: AutoReport


def decide_auto(
    measured: Measured, options: PolicyOptions, auto: AutoOptions, tokens: NDArray[np.int64], progress: Progress
) -> AutoDecision:
    """Choose precision, group size and activation tier of every linear.

    The model in float32 is in memory while this runs, and the INT4 codes of two policies.

    Args:
        measured: The model, and what calibration knows of it.
        options: Of the paper's policy, which the choice is compared with; its weight method, signed scales and
            exclusions hold for both.
        auto: The budget.
        tokens: Calibration windows, int64 [windows, seq].
        progress: Reports passes and layers.

    Raises:
        UserError: No choice meets the budget, the cost table is incomplete, the model came with INT4 codes, or what
            `decide_policy` raises.
    """
    if measured.checkpoint.given is not None:
        cause = f"the model came with INT4 codes ({measured.checkpoint.given.format}): there is nothing to choose"
        raise UserError("--policy auto", cause, "use --policy paper, or give the original float model")
    measured = replace(measured, stats=stats_of_tensors(measured.stats, measured.sites))
    paper, paper_arrays = decide_policy(
        measured.sites, measured.stats, measured.checkpoint, options, progress, measured.hessians
    )
    by_rule = paper_arrays.read_all()
    scales = _site_scales(paper, by_rule)
    cost = _cost(auto, measured, paper)
    model = model_from_checkpoint(measured.checkpoint, torch.float32)
    windows = torch.from_numpy(tokens)
    probes = probe_linears(model, windows[:PROBE_WINDOWS], list(paper.quantized()), progress)
    choices = choices_from_probes(measured, paper, scales, probes, options, cost, progress)
    budget = _budget(auto, choices, paper)
    static = {path: static_scale_of(measured, paper, scales, path) for path in choices}
    policy = _policy_from_choice(paper, choices, _chosen(choices, budget), static)
    stream = _arrays(policy, measured, scales, progress)
    judge = _Judge(model, windows[-PROBE_WINDOWS:], measured)
    ours = judge.judged(policy, choices, ArrayStream(stream.specs, stream.read_all().items()))
    rule = judge.judged(_with_candidates(paper, choices), choices, ArrayStream(paper_arrays.specs, by_rule.items()))
    return _better(ours, rule, budget, auto, choices)


def _site_scales(policy: Policy, arrays: Mapping[str, NDArray[Any]]) -> SiteScales:
    """Those of the equalization table, from the arrays of its policy."""
    rms = {site: arrays[name] for site in policy.equalization if (name := f"{site}.input_rms") in arrays}
    return SiteScales({site: arrays[f"{site}.equalization"] for site in policy.equalization}, rms)


def _arrays(policy: Policy, measured: Measured, table: SiteScales, progress: Progress) -> ArrayStream:
    """Arrays of a policy whose equalization table is that of the paper's, and whose `lae_static` sites are its own."""
    weights, maxima = LinearWeights.from_checkpoint(measured.checkpoint), measured.stats.channel_absmax
    scales = scales_of_policy(policy, measured.sites, maxima, weights.read, table.rms)
    return policy_arrays(policy, measured.sites, maxima, measured.checkpoint, progress, measured.hessians, scales)


@dataclass(frozen=True)
class _Judged:
    policy: Policy
    arrays: ArrayStream
    totals: PolicyTotals


class _Judge:
    """Measures whole policies on windows that no candidate was measured on."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor, measured: Measured) -> None:
        self._model = model
        self._windows = windows
        self._sites = measured.sites
        self._expected = log_probs_from_windows(model, windows)

    def judged(self, policy: Policy, choices: Choices, stream: ArrayStream) -> _Judged:
        arrays: dict[str, NDArray[Any]] = dict(stream.arrays)  # in memory already
        kl = measured_kl(self._model, self._windows, self._expected, policy, arrays, self._sites)
        totals = totals_of(choices, _indices(policy, choices))
        return _Judged(
            policy,
            stream,
            PolicyTotals(
                effective_bits=totals.bits,
                decode_us=totals.decode_us,
                dynamic_layers=totals.dynamic_layers,
                predicted_kl=totals.kl,
                measured_kl=kl,
            ),
        )


def _better(ours: _Judged, paper: _Judged, budget: Budget, auto: AutoOptions, choices: Choices) -> AutoDecision:
    """Take the choice, or the paper's policy where that meets the budget too and measures better."""
    keeps_paper = _meets(paper.totals, budget) and _kl(paper) < _kl(ours)
    kept = paper if keeps_paper else ours
    report = AutoReport(
        effective_bits=budget.effective_bits,
        max_kl=budget.kl,
        max_dynamic_layers=budget.dynamic_layers,
        cost=auto.cost_table.name if auto.cost_table is not None else f"modelled for {MODELLED_DEVICE}",
        kept="paper" if keeps_paper else "auto",
        auto=ours.totals,
        paper=paper.totals,
        pareto=pareto_points(choices, budget.dynamic_layers),
    )
    return AutoDecision(kept.policy, kept.arrays, report)


def _kl(judged: _Judged) -> float:
    assert judged.totals.measured_kl is not None
    return judged.totals.measured_kl


def _meets(totals: PolicyTotals, budget: Budget) -> bool:
    limits = (
        (totals.effective_bits, budget.effective_bits),
        (totals.predicted_kl, budget.kl),
        (totals.dynamic_layers, budget.dynamic_layers),
    )
    return all(limit is None or value <= limit for value, limit in limits)


def _cost(auto: AutoOptions, measured: Measured, paper: Policy) -> DecodeCost:
    if auto.cost_table is None:
        return cost_from_device()
    asked = [(measured.sites.linear(path), candidates_of(measured, paper, path)) for path in paper.quantized()]
    return cost_from_table(auto.cost_table, asked)


def _budget(auto: AutoOptions, choices: Choices, paper: Policy) -> Budget:
    bits = auto.effective_bits
    if bits is None and auto.max_kl is None:
        bits = totals_of(choices, _indices(paper, choices)).bits
    return Budget(bits, auto.max_kl, auto.max_dynamic_layers)


def _chosen(choices: Choices, budget: Budget) -> dict[str, int]:
    try:
        return choose(choices, budget)
    except InfeasibleError:
        least_bits = choose(choices, Budget(dynamic_layers=budget.dynamic_layers))
        best = totals_of(choices, least_bits)
        fewest = sum(
            min(figures.bits_per_weight for figures in choice.candidates) * choice.weights
            for choice in choices.values()
        ) / sum(choice.weights for choice in choices.values())
        cause = (
            f"no choice meets it: bits go from {fewest:.4g} to {best.bits:.4g} a weight, "
            f"and the least predicted KL is {best.kl:.3g} nats a token"
        )
        hint = "allow more with --effective-bits, --max-ppl-increase or --max-dynamic-layers"
        raise UserError("the budget of --policy auto", cause, hint) from None


def _indices(policy: Policy, choices: Choices) -> dict[str, int]:
    """Which candidate each linear of a policy runs."""
    return {path: _index(policy.layers[path], choice.candidates) for path, choice in choices.items()}


def _index(layer: LayerPolicy, candidates: Sequence[CandidateFigures]) -> int:
    runs = (layer.precision, layer.activation, layer.group_size)
    return [(it.precision, it.activation, it.group_size) for it in candidates].index(runs)


def _with_candidates(policy: Policy, choices: Choices) -> Policy:
    layers = {
        path: layer.model_copy(update={"candidates": tuple(choices[path].candidates)}) if path in choices else layer
        for path, layer in policy.layers.items()
    }
    return policy.model_copy(update={"layers": layers})


def _policy_from_choice(
    paper: Policy, choices: Choices, chosen: Mapping[str, int], static_scales: Mapping[str, float]
) -> Policy:
    policy = _with_candidates(paper, choices)
    layers = dict(policy.layers)
    for path, index in chosen.items():
        layers[path] = _layer_from_figures(layers[path], choices[path].candidates[index], static_scales[path])
    return policy.model_copy(update={"layers": layers, "rule": policy.rule.model_copy(update={"name": "auto"})})


def _layer_from_figures(layer: LayerPolicy, figures: CandidateFigures, static_scale: float) -> LayerPolicy:
    scale = None
    if figures.activation == "static":
        scale = static_scale
    elif figures.activation == "lae_static":
        scale = closed_form_scale(layer.input_absmax or 0.0, equalized=True)
    update: dict[str, Any] = {
        "precision": figures.precision,
        "activation": figures.activation,
        "group_size": figures.group_size,
        "activation_scale": scale,
    }
    if figures.precision == "w8a8":
        update |= {"weight_method": "rtn", "signed_scales": False}
    changed = layer.model_copy(update=update)
    exact = "exact, or not reached by the probed text"
    sqnr = exact if figures.sqnr_db is None else f"{figures.sqnr_db:.1f} dB"
    reason = f"{AUTO_REASON_START}{changed.runs}: predicted KL {figures.predicted_kl:.3g} nats a token, {sqnr}"
    return changed.model_copy(update={"reason": f"{reason}; the rule says: {layer.reason}"})
