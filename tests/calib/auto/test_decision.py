"""`--policy auto`: the choice keeps its budget, is explained, and gives way to the paper's policy if that is better."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from calib.auto import AutoOptions, Measured, decide_auto
from calib.auto.decision import AutoDecision
from calib.check_policy import policy_problems
from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions
from calib.load import Checkpoint
from calib.observe import observe
from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites
from tests.calib.auto.models import TOKENS, load_llama

RULE = PolicyOptions(v0=1.0, v1=2.5, group_size=64)
"""Thresholds at which the tiny LLaMA has more than one tier."""


@pytest.fixture(scope="module")
def measured(llama: Checkpoint, sites: Sites) -> Measured:
    linears = [linear.path for linear in sites.linears if linear.path != "lm_head"]
    stats = observe(load_llama(llama), TOKENS, linears, NoProgress())
    return Measured(sites, stats, llama, None)


def decide(measured: Measured, rule: PolicyOptions = RULE, **limits: Any) -> AutoDecision:
    return decide_auto(measured, rule, AutoOptions(**limits), TOKENS.tokens, NoProgress())


@pytest.mark.parametrize("bits", [4.25, 4.35, 4.5])
def test_budget_of_bits_is_kept(measured: Measured, bits: float) -> None:
    """Averaged over all quantized weights, scales included."""
    layers = decide(measured, effective_bits=bits).policy.quantized().values()
    sizes = [layer.in_features * layer.out_features for layer in layers]
    spent = sum((layer.bits_per_weight or 0) * size for layer, size in zip(layers, sizes, strict=True))
    assert spent <= bits * sum(sizes)


def test_limit_of_dynamic_layers_is_kept(measured: Measured) -> None:
    """Though token by token is always the more accurate tier."""
    quantized = decide(measured, max_dynamic_layers=1).policy.quantized().values()
    assert sum(layer.activation == "per_token" for layer in quantized) <= 1


def test_choice_can_be_replayed(measured: Measured) -> None:
    """Nothing in the policy contradicts itself: tiers of one tensor agree, scales fit their tier."""
    decision = decide(measured, effective_bits=4.4)
    assert list(policy_problems(decision.policy, measured.sites, measured.stats.channel_absmax)) == []


def test_every_loser_is_on_record(measured: Measured) -> None:
    """Each layer lists all it could run, with figures, and runs one of them."""
    policy = decide(measured).policy
    for path, layer in policy.quantized().items():
        runs = [(it.precision, it.activation, it.group_size) for it in layer.candidates]
        tiers = 3 if measured.sites.linear(path).site is not None else 2
        weights = 4 if layer.in_features % 128 == 0 else 3  # group sizes, and INT8
        assert len(set(runs)) == len(runs) == tiers * weights
        assert (layer.precision, layer.activation, layer.group_size) in runs
        assert "the rule says: max|x|" in layer.reason


def test_default_budget_is_that_of_the_paper(measured: Measured) -> None:
    """Without limits, the comparison is at equal size, and the choice predicts no worse."""
    report = decide(measured).report
    assert report.effective_bits == report.paper.effective_bits
    assert report.auto.effective_bits <= report.paper.effective_bits
    assert report.auto.predicted_kl <= report.paper.predicted_kl


def test_paper_is_kept_where_it_measures_better(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction that was wrong costs nothing: the policy is the paper's, and the report says so."""
    monkeypatch.setattr("calib.auto.decision.measured_kl", lambda *args: float(args[3].rule.name == "auto"))
    decision = decide(measured)
    assert decision.report.kept == "paper"
    assert decision.policy.rule.name == "paper"
    assert decision.report.auto.measured_kl == 1.0


def test_paper_is_not_kept_above_the_budget(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """However well it measures."""
    monkeypatch.setattr("calib.auto.decision.measured_kl", lambda *args: float(args[3].rule.name == "auto"))
    rule = replace(RULE, group_size=32)
    assert decide(measured, rule, effective_bits=4.3).report.kept == "auto"


def test_frontier_goes_one_way(measured: Measured) -> None:
    """More bits, less predicted harm."""
    points = decide(measured).report.pareto
    assert len(points) > 2
    assert all(a.effective_bits < b.effective_bits for a, b in itertools.pairwise(points))
    assert all(a.predicted_kl > b.predicted_kl for a, b in itertools.pairwise(points))


def test_arrays_are_those_of_the_policy(measured: Measured) -> None:
    """Codes and scales have the shapes that the chosen group sizes ask for."""
    decision = decide(measured, effective_bits=4.4)
    arrays = decision.arrays.read_all()
    for path, layer in decision.policy.quantized().items():
        groups = () if layer.group_size is None else (layer.in_features // layer.group_size,)
        assert arrays[f"{path}.weight_scales"].shape == (layer.out_features, *groups)
    sizes = {layer.group_size for layer in decision.policy.quantized().values()}
    assert len(sizes) > 1


def test_many_bits_bring_int8_weights(measured: Measured) -> None:
    """Between 4.5 and 8 bits a weight, some linears have INT8 weights and others INT4."""
    quantized = decide(measured, effective_bits=6.0).policy.quantized().values()
    assert {layer.precision for layer in quantized} == {"w4a8", "w8a8"}


def test_equalizer_that_the_user_chose_stays(measured: Measured) -> None:
    """Its table holds for every candidate: no tier equalizes otherwise, and scales follow the table."""
    rule = replace(RULE, equalization=EqualizerOptions("lae"))
    decision = decide(measured, rule, effective_bits=4.4)
    assert decision.policy.equalization
    quantized = decision.policy.quantized().values()
    assert all(candidate.activation != "lae_static" for layer in quantized for candidate in layer.candidates)
    assert list(policy_problems(decision.policy, measured.sites, measured.stats.channel_absmax)) == []
    arrays = decision.arrays.read_all()
    assert all(f"{site}.equalization" in arrays for site in decision.policy.equalization)


def test_precision_that_the_user_chose_stays(measured: Measured) -> None:
    """`--precision` comes first: such a linear has one candidate."""
    rule = replace(RULE, precision=("o_proj=w4a16",))
    policy = decide(measured, rule, effective_bits=7.0).policy
    chosen = {path: layer for path, layer in policy.layers.items() if path.endswith("o_proj")}
    assert {layer.precision for layer in chosen.values()} == {"w4a16"}
    assert all(len(layer.candidates) == 1 for layer in chosen.values())


@pytest.mark.parametrize("limits", [{"effective_bits": 4.0}, {"effective_bits": 4.2, "max_kl": 1e-12}])
def test_impossible_budget_says_what_is_possible(measured: Measured, limits: dict[str, Any]) -> None:
    """The error gives the range of bits and the least prediction."""
    with pytest.raises(UserError, match=r"bits go from .* to .*, and the least predicted KL is"):
        decide(measured, **limits)


def test_incomplete_cost_table_is_refused(measured: Measured, tmp_path: Path) -> None:
    """The first missing time is named, so that it can be measured."""
    table = tmp_path / "cost.json"
    entry = {"precision": "w4a8", "activation": "static", "group_size": 64, "in_features": 64, "out_features": 64}
    table.write_text(json.dumps({"device": "x", "entries": [{**entry, "microseconds": 2.0}]}))
    with pytest.raises(UserError, match=r"times are missing, the first for w4a8"):
        decide(measured, cost_table=table)


def test_measured_times_replace_the_model(measured: Measured, tmp_path: Path) -> None:
    """Where per-token is said to cost nothing and static a fortune, time-bound choices are per-token."""
    shapes = {(linear.in_features, linear.out_features) for linear in measured.sites.linears}
    keys = ("precision", "activation", "group_size", "in_features", "out_features", "microseconds")
    entries = [
        dict(zip(keys, (precision, tier, size, *shape, microseconds), strict=True))
        for shape in shapes
        for precision, size in (("w4a8", 128), ("w4a8", 64), ("w4a8", 32), ("w8a8", None))
        for tier, microseconds in (("static", 1000.0), ("per_token", 1.0))
    ]
    table = tmp_path / "cost.json"
    table.write_text(json.dumps({"device": "x", "entries": entries}))
    quantized = decide(measured, cost_table=table, max_kl=10.0).policy.quantized().values()
    assert {layer.activation for layer in quantized} == {"per_token"}


def test_layer_without_sensitivity_is_refused(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """A linear that the probed text never reaches has no figures, so nothing is guessed."""
    monkeypatch.setattr("calib.auto.decision.probe_linears", lambda *_args: {})
    with pytest.raises(UserError, match="never ran on the probed text"):
        decide(measured)


def test_given_codes_leave_nothing_to_choose(measured: Measured, llama: Checkpoint) -> None:
    """A checkpoint that came quantized keeps its codes."""
    given: Any = type("Given", (), {"format": "gptq"})()
    with pytest.raises(UserError, match="nothing to choose"):
        decide(replace(measured, checkpoint=replace(llama, given=given)))
