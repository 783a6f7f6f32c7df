"""Codes that came with a model: what the rule may still decide, and what an edit may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calib.decide import PolicyOptions, decide_policy
from calib.load import Checkpoint
from calib.replay import replay_policy
from calib.stats import Stats
from fptq_export.errors import UserError, UserErrors
from fptq_export.policy import Policy, read_policy, write_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites
from tests.calib.interchange.conftest import Decide, ReadBack
from tests.support.checkpoints import llama_sites
from tests.support.quantized import QuantizedCheckpoint

LAYER = "model.layers.0"
Q, GATE, UP, DOWN = (f"{LAYER}.{name}_proj" for name in ("self_attn.q", "mlp.gate", "mlp.up", "mlp.down"))


@pytest.fixture
def gptq(quantized: Callable[..., QuantizedCheckpoint], read_back: ReadBack) -> Checkpoint:
    """A GPTQ checkpoint, opened: it says nothing of activations."""
    return read_back(quantized("gptq").directory)


@pytest.fixture
def sites(gptq: Checkpoint) -> Sites:
    return llama_sites(gptq)


@pytest.fixture
def stats(sites: Sites) -> Stats:
    """q/k/v reach 40, down_proj 500, everything else 1."""
    reach = {"q_proj": 40.0, "k_proj": 40.0, "v_proj": 40.0, "down_proj": 500.0}
    return Stats(
        {
            linear.path: np.full(linear.in_features, reach.get(linear.path.rpartition(".")[2], 1.0), np.float32)
            for linear in sites.linears
        },
        1024,
        "hand-made",
    )


@pytest.fixture
def policy_file(gptq: Checkpoint, sites: Sites, stats: Stats, tmp_path: Path) -> Path:
    """The policy of the checkpoint, written."""
    policy, arrays = decide_policy(sites, stats, gptq, PolicyOptions(), NoProgress())
    write_policy(policy, arrays, tmp_path / "policy.json")
    return tmp_path / "policy.json"


def edit(file: Path, path: str, **changes: Any) -> None:
    policy = read_policy(file)
    layers = {**policy.layers, path: policy.layers[path].model_copy(update=changes)}
    file.write_text(policy.model_copy(update={"layers": layers}).model_dump_json())


def replay(file: Path, sites: Sites, checkpoint: Checkpoint) -> tuple[Policy, dict[str, Any]]:
    policy, arrays = replay_policy(file, sites, checkpoint, NoProgress())
    return policy, arrays.read_all()


def test_rule_adds_activations_without_equalizing(policy_file: Path) -> None:
    """Small inputs are static, large ones per-token, and where the rule would equalize the input is per-token."""
    policy = read_policy(policy_file)
    tiers = {path: policy.layers[path].activation for path in (GATE, Q, DOWN)}
    assert tiers == {GATE: "static", Q: "per_token", DOWN: "per_token"}
    assert "equalization would change the given codes" in policy.layers[Q].reason
    assert {layer.weight_method for layer in policy.quantized().values()} == {"given"}
    assert policy.equalized_sites() == ()


def test_excluded_layer_stays_float(gptq: Checkpoint, sites: Sites, stats: Stats) -> None:
    """--exclude works on a quantized checkpoint too: the layer runs its dequantized weight."""
    policy, arrays = decide_policy(sites, stats, gptq, PolicyOptions(exclude=("q_proj",)), NoProgress())
    assert policy.layers[Q].precision == "float"
    assert f"{Q}.weight_codes" not in arrays.specs


def test_layer_without_codes_stays_float(
    quantized: Callable[..., QuantizedCheckpoint], read_back: ReadBack, sites: Sites, stats: Stats
) -> None:
    """What the checkpoint left in float is not quantized behind its back."""
    checkpoint = quantized("awq")

    def dequantize(tensors: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[f"{Q}.{part}"]
        tensors[f"{Q}.weight"] = np.ones((64, 64), np.float16)

    checkpoint.edit_tensors(dequantize)
    policy, _ = decide_policy(sites, stats, read_back(checkpoint.directory), PolicyOptions(), NoProgress())
    assert policy.layers[Q].precision == "float"
    assert "holds no INT4 codes" in policy.layers[Q].reason


def test_unchanged_policy_replays_to_itself(policy_file: Path, sites: Sites, gptq: Checkpoint) -> None:
    """Replay takes the given codes again, bit for bit."""
    policy, arrays = replay(policy_file, sites, gptq)
    assert policy == read_policy(policy_file)
    assert gptq.given is not None
    codes, scales = gptq.given.read(Q)
    assert np.array_equal(arrays[f"{Q}.weight_codes"], codes)
    assert np.array_equal(arrays[f"{Q}.weight_scales"], scales)


def test_given_weight_may_be_quantized_again_on_purpose(policy_file: Path, sites: Sites, gptq: Checkpoint) -> None:
    """Another weight method is an edit like any other; the group size is then free."""
    edit(policy_file, Q, weight_method="rtn", group_size=16)
    policy, arrays = replay(policy_file, sites, gptq)
    assert policy.layers[Q].weight_method == "rtn"
    assert arrays[f"{Q}.weight_scales"].shape == (64, 4)


def test_edited_tier_says_so(policy_file: Path, sites: Sites, gptq: Checkpoint) -> None:
    """The reason of an edited layer names the person's choice and what would have been chosen."""
    edit(policy_file, Q, activation="static")
    policy, _ = replay(policy_file, sites, gptq)
    assert policy.layers[Q].reason.startswith("set by hand to static; by the rule: max|x| 40")
    assert policy.layers[Q].activation_scale == pytest.approx(40 / 127, rel=2.0**-24, abs=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 64}, "the given codes have 32"),
        ({"signed_scales": True}, "the given scales make it false"),
        ({"activation": "lae_static"}, "equalization would change the given codes"),
    ],
)
def test_edit_that_would_change_given_codes_is_refused(
    policy_file: Path, sites: Sites, gptq: Checkpoint, changes: dict[str, Any], message: str
) -> None:
    """Group size, sign and equalization belong to the codes."""
    edit(policy_file, Q, **changes)
    with pytest.raises(UserErrors, match=message):
        replay(policy_file, sites, gptq)


def test_equalizing_behind_a_given_producer_is_refused(policy_file: Path, sites: Sites, gptq: Checkpoint) -> None:
    """Folding into up_proj divides its rows, which would change its given codes."""
    edit(policy_file, DOWN, weight_method="rtn", activation="lae_static")
    with pytest.raises(UserErrors, match=f"{DOWN} is lae_static, which would change the given codes"):
        replay(policy_file, sites, gptq)
    edit(policy_file, UP, weight_method="rtn")
    policy, _ = replay(policy_file, sites, gptq)
    assert policy.layers[DOWN].activation == "lae_static"


def test_given_policy_needs_its_checkpoint(policy_file: Path, sites: Sites, llama: Checkpoint) -> None:
    """A policy of given codes cannot be replayed with a float model: there is nothing to take over."""
    with pytest.raises(UserErrors, match="the model holds no INT4 codes"):
        replay(policy_file, sites, llama)


def test_static_scale_of_the_checkpoint_is_kept(decide: Decide, read_back: ReadBack, tmp_path: Path) -> None:
    """The rule does not overrule what a compressed-tensors checkpoint says, whatever was measured."""
    decided = decide("llama", "static")
    back = read_back(decided.write(tmp_path / "ct"))
    large = {path: maxima * np.float32(1000) for path, maxima in decided.maxima.items()}
    policy, _ = decide_policy(decided.sites, Stats(large, 48, "test"), back, PolicyOptions(), NoProgress())
    for path, layer in decided.policy.quantized().items():
        assert policy.layers[path].activation == "static"
        assert policy.layers[path].activation_scale == layer.activation_scale


def test_unknown_layer_has_no_codes(gptq: Checkpoint) -> None:
    """Asking for codes that are not there names the layer."""
    assert gptq.given is not None
    with pytest.raises(UserError, match="layer lm_head: the gptq checkpoint holds no INT4 codes"):
        gptq.given.read("lm_head")


def test_float_inputs_keep_the_given_codes(gptq: Checkpoint, sites: Sites, stats: Stats) -> None:
    """A w4a16 layer of a quantized model has the codes that came with it, whatever its input's range is."""
    usual, codes = decide_policy(sites, stats, gptq, PolicyOptions(), NoProgress())
    policy, arrays = decide_policy(sites, stats, gptq, PolicyOptions(precision=("down_proj=w4a16",)), NoProgress())
    layer = policy.layers[DOWN]
    assert (layer.precision, layer.activation, layer.weight_method) == ("w4a16", None, "given")
    assert policy.layers[GATE] == usual.layers[GATE]
    name = f"{DOWN}.weight_codes"
    assert np.array_equal(arrays.read_all()[name], codes.read_all()[name])


@pytest.mark.parametrize("precision", ["down_proj=w8a8", "lm_head=w4a16"])
def test_precisions_that_given_codes_cannot_have_are_refused(
    gptq: Checkpoint, sites: Sites, stats: Stats, precision: str
) -> None:
    """INT8 codes of dequantized INT4 ones hold no more, and a float layer of the checkpoint has no codes."""
    options = PolicyOptions(precision=(precision,))
    with pytest.raises(UserError, match="the model came quantized"):
        decide_policy(sites, stats, gptq, options, NoProgress())
