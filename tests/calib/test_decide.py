"""The FPTQ rule decides every layer, says why, and its arrays are those of the reference."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PretrainedConfig

from calib.decide import PolicyOptions, decide_policy
from calib.load import Checkpoint, checkpoint_from_directory, read_tensor
from calib.stats import Stats
from calib.tensor_files import WEIGHTS_FILE
from fptq_export import numerics
from fptq_export.errors import UserError
from fptq_export.packing import int4_from_packed
from fptq_export.policy import Policy, WeightMethod, read_policy, write_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites, UnmatchedLinear
from tests.support.checkpoints import llama_sites

StatsFactory = Callable[[dict[str, float]], Stats]
Decide = Callable[..., tuple[Policy, dict[str, NDArray[Any]]]]

LAYER = "model.layers.0"
Q, ATTENTION_OUT, DOWN = (f"{LAYER}.self_attn.q_proj", f"{LAYER}.self_attn.o_proj", f"{LAYER}.mlp.down_proj")
UP, GATE = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.gate_proj"
ABOVE_V0 = float(np.nextafter(np.float32(15.0), np.float32(16.0)))
BELOW_V1 = float(np.nextafter(np.float32(150.0), np.float32(149.0)))


@pytest.fixture
def decide(sites: Sites, make_stats: StatsFactory, llama: Checkpoint) -> Decide:
    """Decide for the tiny LLaMA with given input ranges, 1 elsewhere."""

    def run(absmax: dict[str, float], **options: Any) -> tuple[Policy, dict[str, NDArray[Any]]]:
        policy, arrays = decide_policy(sites, make_stats(absmax), llama, PolicyOptions(**options), NoProgress())
        return policy, arrays.read_all()

    return run


@pytest.mark.parametrize(
    ("absmax", "foldable", "unfoldable"),
    [
        (0.0, "static", "static"),
        (15.0, "static", "static"),
        (ABOVE_V0, "lae_static", "per_token"),
        (BELOW_V1, "lae_static", "per_token"),
        (150.0, "per_token", "per_token"),
        (1e30, "per_token", "per_token"),
    ],
)
def test_tiers_change_exactly_at_the_thresholds(decide: Decide, absmax: float, foldable: str, unfoldable: str) -> None:
    """V <= 15 static, 15 < v < 150 equalized where that is exact, v >= 150 or no fold site per token."""
    policy, _ = decide({"layers.0.self_attn.q_proj": absmax, "layers.0.self_attn.o_proj": absmax})
    assert policy.layers[Q].activation == foldable
    assert policy.layers[ATTENTION_OUT].activation == unfoldable
    assert policy.layers[Q].input_absmax == np.float32(absmax)


def test_linears_that_share_an_input_share_the_decision(decide: Decide) -> None:
    """q, k and v are equalized together with one scale, and no other layer is."""
    policy, _ = decide({"layers.0.self_attn.q_proj": 40.0})
    tiers = {path: (layer.activation, layer.activation_scale) for path, layer in policy.layers.items()}
    together = {tiers[f"{LAYER}.self_attn.{name}_proj"] for name in "qkv"}
    assert together == {("lae_static", float(numerics.static_scale(numerics.equalized_absmax(40.0))))}
    assert sum(activation == "lae_static" for activation, _ in tiers.values()) == 3
    assert policy.equalized_sites() == (f"{LAYER}.input_layernorm",)


def test_scales_are_closed_form(decide: Decide) -> None:
    """Static: v / 127. Per token: none, for it is computed at run time."""
    policy, _ = decide({"layers.0.self_attn.q_proj": 3.0, "layers.0.mlp.down_proj": 200.0})
    assert policy.layers[Q].activation_scale == float(np.float32(3.0 / 127))
    assert policy.layers[DOWN].activation_scale is None


@pytest.mark.parametrize(
    ("absmax", "words"),
    [
        (3.0, ["3", "v0 15", "one INT8 scale"]),
        (40.0, ["40", "v0 15", "v1 150", f"{LAYER}.input_layernorm"]),
        (200.0, ["200", "v1 150", "a token"]),
    ],
)
def test_reasons_carry_the_numbers(decide: Decide, absmax: float, words: list[str]) -> None:
    """Each tier says the measured range, the threshold it met and what runs."""
    reason = decide({"layers.0.self_attn.q_proj": absmax})[0].layers[Q].reason
    assert [word for word in words if word not in reason] == []


def test_refused_fold_is_explained(decide: Decide) -> None:
    """A layer in the middle tier without a fold site says why it has none."""
    reason = decide({"layers.0.self_attn.o_proj": 40.0})[0].layers[ATTENTION_OUT].reason
    assert "the input comes from a reshape" in reason


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_arrays_are_those_of_the_reference(
    decide: Decide, llama: Checkpoint, make_stats: StatsFactory, method: WeightMethod
) -> None:
    """Codes are those of the equalized weight: consumers' columns times s, rows of a gated producer over s."""
    absmax = {"layers.0.mlp.up_proj": 40.0, "layers.0.mlp.down_proj": 90.0}
    policy, arrays = decide(absmax, weight_method=method)
    maxima = make_stats(absmax).channel_absmax
    norm, gated = f"{LAYER}.post_attention_layernorm", UP
    s_in = numerics.equalization_from_absmax(maxima[UP]).astype(np.float32)
    s_out = numerics.equalization_from_absmax(maxima[DOWN]).astype(np.float32)
    assert np.array_equal(arrays[f"{norm}.equalization"], s_in)
    assert np.array_equal(arrays[f"{gated}.equalization"], s_out)
    weights = {path: read_tensor(llama, f"{path}.weight").numpy() for path in (Q, GATE, UP, DOWN)}
    expected = {Q: weights[Q], GATE: weights[GATE] * s_in, UP: weights[UP] * s_in / s_out[:, None]}
    expected[DOWN] = weights[DOWN] * s_out
    for path, weight in expected.items():
        size = policy.layers[path].group_size
        assert size is not None
        scales, codes = arrays[f"{path}.weight_scales"], int4_from_packed(arrays[f"{path}.weight_codes"])
        if method == "rtn":
            assert np.array_equal(scales, numerics.weight_scale_rtn(weight, size)), path
        assert np.array_equal(codes, numerics.quantize_weight_rtn(weight, scales, size)), path


def test_arrays_have_the_documented_names_and_types(decide: Decide, make_stats: StatsFactory, sites: Sites) -> None:
    """Every quantized layer has codes, scales and maxima; every equalized site its scales; nothing else is stored."""
    policy, arrays = decide({"layers.0.self_attn.q_proj": 40.0})
    kinds = {"weight_codes": np.uint8, "weight_scales": np.float16}
    names = {f"{path}.{kind}" for path in policy.quantized() for kind in kinds}
    names |= {f"{linear.path}.input_absmax" for linear in sites.linears}
    names |= {f"{site}.equalization" for site in policy.equalized_sites()}
    assert arrays.keys() == names
    assert all(arrays[f"{path}.{kind}"].dtype == kinds[kind] for path in policy.quantized() for kind in kinds)
    assert np.array_equal(
        arrays[f"{Q}.input_absmax"], make_stats({"layers.0.self_attn.q_proj": 40.0}).channel_absmax[Q]
    )


def test_head_is_excluded_by_default_and_can_be_taken_in(decide: Decide) -> None:
    """The head keeps its precision with a reason; without the pattern it is quantized."""
    excluded = decide({})[0].layers["lm_head"]
    assert (excluded.precision, excluded.activation) == ("float", None)
    assert "'lm_head'" in excluded.reason
    assert decide({}, exclude=())[0].layers["lm_head"].precision == "w4a8"


def test_excluded_layers_need_no_statistics(sites: Sites, make_stats: StatsFactory, llama: Checkpoint) -> None:
    """Calibration does not run the head; the other consumers of a site decide without an excluded one."""
    stats = make_stats({"layers.0.self_attn.q_proj": 40.0})
    without = {path: absmax for path, absmax in stats.channel_absmax.items() if path not in ("lm_head", Q)}
    options = PolicyOptions(exclude=("lm_head", r"layers\.0\.self_attn\.q_proj$"))
    policy, stream = decide_policy(sites, Stats(without, 1, "x"), llama, options, NoProgress())
    arrays = stream.read_all()
    assert policy.layers[Q].precision == "float"
    assert policy.layers[f"{LAYER}.self_attn.k_proj"].activation == "lae_static"
    assert f"{Q}.weight_codes" not in arrays


def test_group_size_falls_back_and_says_so(decide: Decide) -> None:
    """K = 64 cannot have groups of 128: it gets 64, with the reason; K = 128 keeps what was asked for, without one."""
    policy, _ = decide({})
    assert (policy.layers[Q].group_size, policy.layers[DOWN].group_size) == (64, 128)
    assert "group size 64, because 128 does not divide 64" in policy.layers[Q].reason
    assert "group size" not in policy.layers[DOWN].reason
    assert decide({}, group_size=32)[0].layers[Q].group_size == 32


def test_layer_without_a_group_size_stays_float(
    make_model_dir: Callable[[PretrainedConfig], Path], make_uniform_stats: Callable[[Sites], Stats]
) -> None:
    """K = 24 has no supported group size: float, with the numbers; the layers that have one are quantized."""
    checkpoint = checkpoint_from_directory(make_model_dir(narrow_config(mlp=32)), "narrow")
    sites = llama_sites(checkpoint)
    policy, _ = decide_policy(sites, make_uniform_stats(sites), checkpoint, PolicyOptions(), NoProgress())
    assert set(policy.quantized()) == {DOWN}
    assert policy.layers[DOWN].group_size == 32
    assert (
        policy.layers[Q].reason == "no group size of 128, 64, 32, 16 divides its 24 inputs: keeps the float precision"
    )


def test_model_without_any_quantizable_layer_is_refused(
    make_model_dir: Callable[[PretrainedConfig], Path], make_uniform_stats: Callable[[Sites], Stats]
) -> None:
    """If no K has a group size there is nothing to do, and the error says why."""
    checkpoint = checkpoint_from_directory(make_model_dir(narrow_config(mlp=40)), "narrow")
    sites = llama_sites(checkpoint)
    with pytest.raises(UserError, match="divides its 24 inputs") as error:
        decide_policy(sites, make_uniform_stats(sites), checkpoint, PolicyOptions(), NoProgress())[1].read_all()
    assert "divides its 40 inputs" in error.value.cause


def narrow_config(mlp: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=24, intermediate_size=mlp, num_hidden_layers=1, num_attention_heads=4, vocab_size=512,
        tie_word_embeddings=False,
    )  # fmt: skip


@pytest.fixture
def make_uniform_stats() -> Callable[[Sites], Stats]:
    return lambda sites: Stats({item.path: np.ones(item.in_features, np.float32) for item in sites.linears}, 1, "x")


def test_linear_that_trace_could_not_match_stays_float(
    sites: Sites, make_stats: StatsFactory, llama: Checkpoint
) -> None:
    """It is in the policy with trace's reason, so that no layer is silently left out."""
    odd = UnmatchedLinear(path="model.odd", in_features=64, out_features=8, reason="computed by Einsum")
    policy, _ = decide_policy(
        sites.model_copy(update={"unmatched": (odd,)}), make_stats({}), llama, PolicyOptions(), NoProgress()
    )
    assert (policy.layers["model.odd"].precision, policy.layers["model.odd"].reason) == ("float", "computed by Einsum")


def test_policy_survives_the_disk(decide: Decide, tmp_path: Path) -> None:
    """What is written reads back equal: scales are not rounded by JSON."""
    policy, arrays = decide({"layers.0.self_attn.q_proj": 40.123})
    write_policy(policy, arrays, tmp_path / "policy.json")
    assert read_policy(tmp_path / "policy.json") == policy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exclude": ("(",)}, "not a regular expression"),
        ({"exclude": ("lm_head", "no_such_layer")}, "matches no linear"),
        ({"exclude": (".",)}, "no layer can be quantized"),
        ({"v0": 150.0, "v1": 15.0}, "v0 <= v1"),
        ({"v0": -1.0}, "v0 <= v1"),
        ({"v0": float("nan")}, "v0 <= v1"),
        ({"v1": float("inf")}, "< infinity"),
        ({"weight_method": "best"}, "use rtn, mse, clip, gptq"),
        ({"weight_method": "gptq"}, "needs Hessians of the inputs"),
        ({"group_size": 48}, "choose one of 128, 64, 32, 16"),
    ],
)
def test_unusable_options_are_refused(decide: Decide, options: dict[str, Any], words: str) -> None:
    """Each option that makes no sense gives one error that says what would."""
    with pytest.raises(UserError) as error:
        decide({}, **options)
    assert words in str(error.value)


def test_default_exclusion_may_match_nothing(sites: Sites, make_stats: StatsFactory, llama: Checkpoint) -> None:
    """A model whose head has another name is not refused for the default pattern."""
    headless = sites.model_copy(update={"linears": tuple(x for x in sites.linears if x.path != "lm_head")})
    policy, _ = decide_policy(headless, make_stats({}), llama, PolicyOptions(), NoProgress())
    assert all(layer.precision == "w4a8" for layer in policy.layers.values())


def test_missing_statistics_are_refused(sites: Sites, make_stats: StatsFactory, llama: Checkpoint) -> None:
    """A layer that calibration did not see is named, not guessed."""
    stats = make_stats({})
    partial = Stats({path: x for path, x in stats.channel_absmax.items() if path != ATTENTION_OUT}, 1, "x")
    with pytest.raises(UserError, match="calibrate again") as error:
        decide_policy(sites, partial, llama, PolicyOptions(), NoProgress())
    assert error.value.where == f"layer {ATTENTION_OUT}"


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_weight_beyond_float16_scales_names_its_layer(
    tiny_llama_copy: Path, sites: Sites, make_stats: StatsFactory, method: WeightMethod
) -> None:
    """A group scale that overflows float16 is refused with the layer and the way around it."""
    tensors = load_file(tiny_llama_copy / WEIGHTS_FILE)
    tensors[f"{ATTENTION_OUT}.weight"][3, 5] = 1e6
    save_file(tensors, tiny_llama_copy / WEIGHTS_FILE)
    checkpoint = checkpoint_from_directory(tiny_llama_copy, "huge")
    with pytest.raises(UserError, match="does not fit float16") as error:
        decide_policy(sites, make_stats({}), checkpoint, PolicyOptions(weight_method=method), NoProgress())[
            1
        ].read_all()
    assert error.value.where == f"layer {ATTENTION_OUT}"
    assert "--exclude" in error.value.hint


def test_sites_of_another_model_are_refused(sites: Sites, make_stats: StatsFactory, tiny_opt_dir: Path) -> None:
    """Sites that do not belong to the checkpoint are noticed at the first weight."""
    with pytest.raises(UserError, match="trace the model again"):
        decide_policy(
            sites, make_stats({}), checkpoint_from_directory(tiny_opt_dir, "opt"), PolicyOptions(), NoProgress()
        )
