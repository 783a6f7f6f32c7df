"""Each equalizer equalizes the sites it should, leaves the others alone, and the input scales follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions, decide_policy
from calib.fake_quant import apply_policy
from calib.load import Checkpoint, model_from_checkpoint
from calib.stats import Stats
from fptq_export import numerics
from fptq_export.errors import UserError
from fptq_export.policy import Policy
from fptq_export.progress import NoProgress
from fptq_export.sites import FoldSite, Producer, Sites
from tests.calib.test_fake_quant import assert_same_logits, logits
from tests.support.hessians import write_hessians

LAYER = "model.layers.0"
Q, OUT, DOWN = (f"{LAYER}.{name}_proj" for name in ("self_attn.q", "self_attn.o", "mlp.down"))
NORM = f"{LAYER}.input_layernorm"
SITES_READ_BY_QUANTIZED_LAYERS = 6
"""Two norms and one gated MLP in each of two layers; the last norm feeds the head, which stays float."""
RANGES = {"layers.0.self_attn.q_proj": 40.0, "layers.0.self_attn.o_proj": 40.0, "layers.0.mlp.down_proj": 500.0}
EVERYWHERE = ["lae", "smoothquant", "awq", "search"]

Decided = tuple[Policy, dict[str, NDArray[Any]]]
Decide = Callable[..., Decided]


@pytest.fixture(scope="module")
def stats(make_stats: Callable[[dict[str, float]], Stats]) -> Stats:
    return make_stats(RANGES)


@pytest.fixture(scope="module")
def decide(sites: Sites, stats: Stats, llama: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Decide:
    hessians = tmp_path_factory.mktemp("equalized") / "h.safetensors"
    write_hessians(hessians, sites)

    @cache
    def run(equalizer: str, *, alpha: float | None = 0.5, **options: Any) -> Decided:
        wanted = PolicyOptions(equalization=EqualizerOptions(equalizer, alpha), **{"group_size": 16, **options})  # type: ignore[arg-type]
        policy, arrays = decide_policy(sites, stats, llama, wanted, NoProgress(), hessians)
        return policy, arrays.read_all()

    return run


def test_paper_keeps_its_rule(decide: Decide) -> None:
    """The default writes no table: LAE stands where the thresholds say, and nowhere else."""
    policy, _ = decide("paper")
    assert policy.equalization == {}
    assert policy.equalized_sites() == (NORM,)
    assert {policy.layers[path].activation for path in (Q, OUT)} == {"lae_static", "per_token"}


def test_none_equalizes_nothing(decide: Decide) -> None:
    """What the rule would equalize is quantized token by token, and the reason says so."""
    policy, arrays = decide("none")
    assert policy.equalized_sites() == ()
    assert not [name for name in arrays if name.endswith(".equalization")]
    assert policy.layers[Q].activation == "per_token"
    assert "nothing is equalized" in policy.layers[Q].reason


@pytest.mark.parametrize("equalizer", EVERYWHERE)
def test_every_site_is_equalized_below_v0_and_above_v1_too(decide: Decide, equalizer: str) -> None:
    """Tiers say how an input is rounded, not whether it is equalized; a site that only the float head reads is left."""
    policy, arrays = decide(equalizer)
    assert len(policy.equalization) == SITES_READ_BY_QUANTIZED_LAYERS
    assert "model.norm" not in policy.equalization
    assert {policy.equalization[site].method for site in policy.equalization} == {equalizer}
    assert (policy.layers[Q].activation, policy.layers[DOWN].activation) == ("static", "per_token")
    assert policy.layers[OUT].activation == "per_token", "no fold site"
    stored = {name.removesuffix(".input_rms") for name in arrays if name.endswith(".input_rms")}
    assert stored == (set(policy.equalization) if equalizer in ("awq", "search") else set())


@pytest.mark.parametrize("equalizer", EVERYWHERE)
def test_static_scales_follow_the_equalized_maxima(decide: Decide, equalizer: str) -> None:
    """max_j(m_j / s_j) / 127 for layers that read the site; other layers keep v / 127."""
    policy, arrays = decide(equalizer)
    m, s = arrays[f"{Q}.input_absmax"].astype(np.float64), arrays[f"{NORM}.equalization"]
    largest = numerics.equalized_absmax(40.0) if equalizer == "lae" else float((m / s).max())
    assert policy.layers[Q].activation_scale == float(numerics.static_scale(largest))
    plain, _ = decide("none", v0=1000.0, v1=1000.0)
    assert plain.layers[Q].activation_scale == float(numerics.static_scale(40.0))


@pytest.mark.parametrize("equalizer", EVERYWHERE)
def test_folding_alone_leaves_the_logits(decide: Decide, sites: Sites, llama: Checkpoint, equalizer: str) -> None:
    """Every method's s cancels: with nothing quantized the logits stay within float32 rounding, though s was folded."""
    policy, arrays = decide(equalizer)
    model: Any = model_from_checkpoint(llama, torch.float32)
    before = logits(model)
    apply_policy(model, policy, arrays, sites, weights="float", quantize_activations=False)
    assert_same_logits(model, before)
    assert (logits(model) != before).any()


@pytest.fixture(scope="module")
def with_values(sites: Sites, llama: Checkpoint) -> Sites:
    """The sites, and the value projection of each layer as the producer of what o_proj reads: 4 heads on 2 values."""
    extensions = [
        FoldSite(
            id=path.replace("o_proj", "v_proj"), kind="attention_value", channels=64,
            producers=(Producer(initializer=path.replace("o_proj", "v_proj") + ".weight", axis=1),),
            producer_linear=path.replace("o_proj", "v_proj"), consumers=(path,), repeats=2, head_dim=16,
        )
        for path in (linear.path for linear in sites.linears) if path.endswith("o_proj")
    ]  # fmt: skip
    return sites.model_copy(update={"fold_sites": (*sites.fold_sites, *extensions)})


@pytest.mark.parametrize("equalizer", EVERYWHERE)
def test_values_are_equalized_with_heads_tied(
    with_values: Sites, stats: Stats, llama: Checkpoint, tmp_path: Path, equalizer: Any
) -> None:
    """Query heads 0, 1 and 2, 3 share s; folding alone leaves the logits; the rule's tiers do not move."""
    write_hessians(tmp_path / "h.safetensors", with_values)
    wanted = PolicyOptions(group_size=16, equalization=EqualizerOptions(equalizer))
    policy, stream = decide_policy(with_values, stats, llama, wanted, NoProgress(), tmp_path / "h.safetensors")
    arrays = stream.read_all()
    s = arrays[f"{LAYER}.self_attn.v_proj.equalization"].reshape(2, 2, 16)
    assert np.array_equal(s[:, 0], s[:, 1])
    assert len(np.unique(s)) > 1
    assert policy.layers[OUT].activation == "per_token"
    model: Any = model_from_checkpoint(llama, torch.float32)
    before = logits(model)
    apply_policy(model, policy, arrays, with_values, weights="float", quantize_activations=False)
    assert_same_logits(model, before)


def test_the_rule_does_not_use_extension_sites(
    with_values: Sites, sites: Sites, stats: Stats, llama: Checkpoint
) -> None:
    """With and without them the paper's policy is the same: o_proj between v0 and v1 stays per token."""
    policies = [decide_policy(s, stats, llama, PolicyOptions(), NoProgress())[0] for s in (sites, with_values)]
    assert policies[0] == policies[1]
    assert policies[1].layers[OUT].activation == "per_token"


@pytest.mark.parametrize("equalizer", ["awq", "search"])
def test_a_searched_choice_beats_none_and_says_by_how_much(decide: Decide, equalizer: str) -> None:
    """The entry holds its parameters and the part of the error that is left, below 1."""
    policy, _ = decide(equalizer)
    for entry in policy.equalization.values():
        left = float(entry.reason.partition(" leaves ")[2].split()[0])
        assert 0.0 < left < 1.0


def test_a_searched_alpha_is_stored(decide: Decide) -> None:
    """`auto` picks an alpha for each site: the policy says which."""
    policy, _ = decide("smoothquant", alpha=None)
    assert policy.equalization
    assert all(entry.alpha is not None and entry.reason for entry in policy.equalization.values())


def test_where_nothing_is_better_nothing_is_folded(sites: Sites, llama: Checkpoint, tmp_path: Path) -> None:
    """With white inputs of one magnitude every candidate is s = 1: no entry, no fold, no array."""
    from calib.hessians import hessian_writer, owners_from_sites

    owners = set(owners_from_sites(sites, [linear.path for linear in sites.linears]).values())
    sizes = {owner: sites.linear(owner).in_features for owner in owners}
    with hessian_writer(tmp_path / "white.safetensors", sizes) as write:
        for owner, size in sizes.items():
            write(owner, torch.eye(size))
    flat = Stats({linear.path: np.ones(linear.in_features, np.float32) for linear in sites.linears}, 1, "flat")
    wanted = PolicyOptions(group_size=16, equalization=EqualizerOptions("search"))
    policy, stream = decide_policy(sites, flat, llama, wanted, NoProgress(), tmp_path / "white.safetensors")
    assert policy.equalization == {}
    assert not [name for name in stream.specs if name.endswith((".equalization", ".input_rms"))]


def test_missing_hessians_are_named(sites: Sites, stats: Stats, llama: Checkpoint) -> None:
    """A search without the matrices cannot score anything: it does not quietly pick s = 1."""
    wanted = PolicyOptions(equalization=EqualizerOptions("search"))
    with pytest.raises(UserError, match="needs Hessians"):
        decide_policy(sites, stats, llama, wanted, NoProgress())


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    """Before anything runs."""
    with pytest.raises(UserError, match="--smoothquant-alpha"):
        EqualizerOptions("smoothquant", alpha)


@pytest.mark.parametrize(
    ("equalizer", "alpha", "needed"),
    [
        ("paper", 0.5, False),
        ("none", 0.5, False),
        ("lae", None, False),
        ("smoothquant", 0.5, False),
        ("smoothquant", None, True),
        ("awq", 0.5, True),
        ("search", 0.5, True),
    ],
)
def test_hessians_are_measured_only_where_something_is_scored(
    equalizer: Any, alpha: float | None, needed: bool
) -> None:
    """They cost time and disk; formulas of maxima and weights do without."""
    assert EqualizerOptions(equalizer, alpha).needs_hessian is needed
