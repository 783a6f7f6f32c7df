"""Layers get the precision that the patterns say, with weights that are those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.decide import PolicyOptions, decide_policy, replay_policy
from calib.fake_quant import apply_policy
from calib.load import Checkpoint, model_from_checkpoint
from calib.precision import chosen_precisions, float_paths
from calib.stats import Stats
from calib.weights.per_channel import quantize_int8
from fptq_export import numerics
from fptq_export.errors import UserError, UserErrors
from fptq_export.policy import Policy, write_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites

LAYER = "model.layers.0"
Q, K, V, DOWN = (f"{LAYER}.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.down"))
PATHS = ("a.down_proj", "a.up_proj", "lm_head")
StatsFactory = Callable[[dict[str, float]], Stats]
Decide = Callable[..., tuple[Policy, dict[str, NDArray[Any]]]]
Replay = Decide
weights = hnp.arrays(
    np.float32, (3, 16), elements=st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-1, 1, width=32) | st.just(0.0)
)


@pytest.fixture
def decide(sites: Sites, make_stats: StatsFactory, llama: Checkpoint) -> Decide:
    """Decide for the tiny LLaMA: q, k, v of layer 0 equalized, its down_proj per token, the rest static."""

    def run(*precision: str, **options: Any) -> tuple[Policy, dict[str, NDArray[Any]]]:
        stats = make_stats({"layers.0.self_attn.q_proj": 40.0, "layers.0.mlp.down_proj": 500.0})
        wanted = PolicyOptions(precision=precision, **options)
        policy, arrays = decide_policy(sites, stats, llama, wanted, NoProgress())
        return policy, arrays.read_all()

    return run


@given(weights)
def test_int8_codes_are_the_reference(weight: NDArray[np.float32]) -> None:
    """Bit for bit, for rows of zeros, denormals, outliers and huge values; no code is -128."""
    codes, scales = quantize_int8(torch.from_numpy(weight))
    expected = numerics.weight_scale_int8(weight)
    assert np.array_equal(scales.numpy(), expected)
    assert np.array_equal(codes.numpy(), numerics.quantize_weight_int8(weight, expected))
    assert np.abs(codes.numpy().astype(np.int64)).max() <= 127


@given(weights)
def test_int8_error_is_half_a_step(weight: NDArray[np.float32]) -> None:
    """No weight is off by more than half its channel's scale, up to the roundings of the scale and of the quotient."""
    scale = numerics.weight_scale_int8(weight)
    error = np.abs(numerics.quantize_weight_int8(weight, scale) * scale[:, None].astype(np.float64) - weight)
    # The quotient is at most 127, so its rounding and the scale's move it by 127 x 2 x 2^-24 steps.
    assert (error <= (0.5 + 127 * 2 * 2.0**-24) * scale[:, None]).all()


def test_later_patterns_win() -> None:
    """Also over --exclude, so that one of many excluded layers can be taken back."""
    chosen = chosen_precisions(PATHS, ["lm_head", "up_proj"], ["proj=w8a8", "up=w4a16", "down=float", "lm=w8a8"])
    assert {path: choice.precision for path, choice in chosen.items()} == {
        "a.down_proj": "float",
        "a.up_proj": "w4a16",
        "lm_head": "w8a8",
    }
    assert float_paths(PATHS, ["lm_head"], ["up=float"]) == ("a.up_proj", "lm_head")
    assert float_paths(PATHS, ["lm_head"], ["up=w8a8"]) == ("lm_head",)


def test_layers_without_a_pattern_are_not_touched() -> None:
    """The default stays what it is."""
    assert chosen_precisions(PATHS, [], ["up=w8a8"]).keys() == {"a.up_proj"}


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("q_proj=w8a8", "matches no linear of the model"),
        ("(=w8a8", "not a regular expression"),
        ("up=w3a3", "is not a pattern and a precision"),
        ("fp16", "is not a pattern and a precision"),
        ("=w8a8", "is not a pattern and a precision"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(pattern: str, cause: str) -> None:
    """A typo must not leave a model in another precision than its owner thinks."""
    with pytest.raises(UserError, match=cause):
        chosen_precisions(PATHS, [], ["up=w8a8", pattern])


def test_int8_layers_keep_the_tier_of_the_rule(decide: Decide) -> None:
    """Static, equalized and per token are decided by the input, whatever the weight is."""
    policy, _ = decide("layers.0=w8a8")
    usual, _ = decide()
    for path, layer in policy.layers.items():
        other = usual.layers[path]
        assert (layer.activation, layer.activation_scale) == (other.activation, other.activation_scale)
        if path.startswith(LAYER):
            assert (layer.precision, layer.group_size, layer.weight_method) == ("w8a8", None, "rtn")
            assert layer.reason.partition("; ")[0] == other.reason.partition("; ")[0]
            assert "'layers.0=w8a8'" in layer.reason
            assert layer.bits_per_weight == 8 + 32 / layer.in_features


def test_weights_are_those_of_the_equalized_linear(decide: Decide, llama: Checkpoint) -> None:
    """INT8 codes of q, whose input is equalized beside a w4a8 k and a w4a16 v, and of down, whose input is not."""
    policy, arrays = decide("layers.0.self_attn.q=w8a8", "down=w8a8", "layers.0.self_attn.v=w4a16")
    model: Any = model_from_checkpoint(llama, torch.float32)
    s = arrays[f"{policy.layers[Q].site}.equalization"]
    for path, scales in ((Q, s), (DOWN, np.float32(1.0))):
        weight = model.get_submodule(path).weight.detach().numpy() * scales
        step = numerics.weight_scale_int8(weight)
        assert np.array_equal(arrays[f"{path}.weight_scales"], step)
        assert np.array_equal(arrays[f"{path}.weight_codes"], numerics.quantize_weight_int8(weight, step))
    weight = model.get_submodule(V).weight.detach().numpy() * s
    assert np.array_equal(arrays[f"{V}.weight_scales"], numerics.weight_scale_rtn(weight, 64))


def test_float_inputs_have_no_activation(decide: Decide) -> None:
    """A w4a16 layer keeps its INT4 groups; signed scales are left out, because only the plugin runs them."""
    policy, arrays = decide("v_proj=w4a16", signed_scales=True)
    layer = policy.layers[V]
    assert (layer.precision, layer.activation, layer.activation_scale) == ("w4a16", None, None)
    assert (layer.group_size, layer.signed_scales) == (64, False)
    assert (arrays[f"{V}.weight_scales"] > 0).all()
    assert policy.layers[Q].signed_scales


def test_excluded_head_can_be_int8(decide: Decide) -> None:
    """A pattern takes a layer back that is excluded by default."""
    policy, arrays = decide("lm_head=w8a8")
    assert policy.layers["lm_head"].precision == "w8a8"
    assert arrays["lm_head.weight_codes"].dtype == np.int8


def test_torch_model_runs_each_precision(decide: Decide, sites: Sites, llama: Checkpoint) -> None:
    """INT8 codes times channel scales; a w4a16 layer leaves its input alone."""
    policy, arrays = decide("layers.0.self_attn.q=w8a8", "layers.0.self_attn.v=w4a16")
    model: Any = model_from_checkpoint(llama, torch.float32)
    apply_policy(model, policy, arrays, sites)
    q, v = model.get_submodule(Q), model.get_submodule(V)
    expected = arrays[f"{Q}.weight_codes"].astype(np.float32) * arrays[f"{Q}.weight_scales"][:, None]
    assert np.array_equal(q.weight.numpy(), expected)
    assert (q.activation, v.activation) == ("static", None)
    assert v.divisor is not None  # it reads the equalized tensor, as q and k do


@pytest.fixture
def replay(decide: Decide, sites: Sites, llama: Checkpoint, tmp_path: Path) -> Replay:
    """Write the default policy, change one layer of it, and replay it."""
    policy, arrays = decide()
    path = tmp_path / "policy.json"

    def run(layer: str, **changes: Any) -> tuple[Policy, dict[str, NDArray[Any]]]:
        layers = {**policy.layers, layer: policy.layers[layer].model_copy(update=changes)}
        write_policy(policy.model_copy(update={"layers": layers}), arrays, path)
        completed, stream = replay_policy(path, sites, llama, NoProgress())
        return completed, stream.read_all()

    return run


def test_precision_can_be_set_by_hand(decide: Decide, replay: Replay) -> None:
    """A replay gives the codes that --precision gives."""
    completed, arrays = replay(Q, precision="w8a8", group_size=None)
    _, expected = decide("layers.0.self_attn.q=w8a8")
    assert completed.layers[Q].precision == "w8a8"
    assert np.array_equal(arrays[f"{Q}.weight_codes"], expected[f"{Q}.weight_codes"])
    completed, _ = replay(DOWN, precision="w4a16", activation=None)
    assert completed.layers[DOWN].reason.startswith("set by hand to w4a16")
    assert completed.layers[DOWN].activation_scale is None


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (Q, {"precision": "w8a8"}, "a w8a8 layer has none"),
        (Q, {"precision": "w8a8", "group_size": None, "weight_method": "mse"}, "rounded to nearest"),
        (Q, {"precision": "w8a8", "group_size": None, "signed_scales": True}, "only the plugin runs them"),
        (Q, {"precision": "w8a8", "group_size": None, "activation": None, "activation_scale": None}, "needs one"),
        (DOWN, {"precision": "w4a16"}, "a w4a16 layer has none"),
        (DOWN, {"precision": "w4a16", "activation": None, "group_size": None}, "a w4a16 layer needs one"),
        (DOWN, {"precision": "w4a16", "activation": None, "signed_scales": True}, "only the plugin runs them"),
    ],
)
def test_entries_of_another_precision_are_refused(
    replay: Replay, path: str, changes: dict[str, Any], message: str
) -> None:
    """What is left over from before an edit is named with its JSON path."""
    with pytest.raises(UserErrors, match=message) as caught:
        replay(path, **changes)
    assert f'$.layers["{path}"]' in str(caught.value)
