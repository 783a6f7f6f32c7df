"""The torch model of a policy computes the numeric contract, and folding alone changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.decide import PolicyOptions, decide_policy
from calib.fake_quant import FakeQuantLinear, applied_policy, apply_policy, quantize_per_token, quantize_static
from calib.load import Checkpoint, checkpoint_from_directory, model_from_checkpoint
from calib.stats import Stats
from fptq_export import numerics
from fptq_export.packing import int4_from_packed
from fptq_export.policy import Policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Linear, Sites

FLOAT32_EPS = 2.0**-24
"""Largest relative error of one float32 rounding."""
FOLD_TOLERANCE = 2 * 7 * (128 + 2) * FLOAT32_EPS
"""Relative to the largest logit. Each of 2 layers x 7 linears is a float32 sum of at most 128 products (so off by 128
roundings, in whatever order), and s adds two roundings to each product: x / s and W s."""
IDS = torch.arange(48).reshape(2, 24)
LAYER = "model.layers.0"
UP, DOWN, GATE = (f"{LAYER}.mlp.{name}_proj" for name in ("up", "down", "gate"))
ALL_EQUALIZED = {"q_proj": 40.0, "o_proj": 3.0, "gate_proj": 25.0, "down_proj": 90.0}
StatsFactory = Callable[[dict[str, float]], Stats]
Decided = tuple[Policy, dict[str, NDArray[Any]]]

activations = hnp.arrays(
    np.float32, (4, 32), elements=st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 0.5, 1.5, 2.5])
)
scales = st.floats(2.0**-20, 2.0**10, width=32)


@pytest.fixture
def model(llama: Checkpoint) -> Any:
    return model_from_checkpoint(llama, torch.float32)


@pytest.fixture
def decide(sites: Sites, make_stats: StatsFactory, llama: Checkpoint) -> Callable[..., Decided]:
    def run(absmax: dict[str, float], **options: Any) -> Decided:
        policy, arrays = decide_policy(sites, make_stats(absmax), llama, PolicyOptions(**options), NoProgress())
        return policy, arrays.read_all()

    return run


def logits(model: Any) -> NDArray[np.float32]:
    with torch.inference_mode():
        values: NDArray[np.float32] = model(input_ids=IDS).logits.numpy()
    return values


def assert_same_logits(model: Any, expected: NDArray[np.float32]) -> None:
    assert np.abs(logits(model) - expected).max() <= FOLD_TOLERANCE * np.abs(expected).max()


@given(activations, scales)
def test_static_codes_are_the_reference(x: NDArray[np.float32], scale: float) -> None:
    """Bit for bit: float32 division, ties to even, clipped to [-128, 127]."""
    codes = quantize_static(torch.from_numpy(x), torch.tensor(scale, dtype=torch.float32))
    assert np.array_equal(codes.numpy(), numerics.quantize_activation(x, np.float32(scale)))


@given(activations)
def test_per_token_codes_are_the_reference(x: NDArray[np.float32]) -> None:
    """Bit for bit, also for tokens that are all zero."""
    codes, scale = quantize_per_token(torch.from_numpy(x))
    expected = numerics.per_token_scale(x)
    assert np.array_equal(scale.numpy(), expected)
    assert np.array_equal(codes.numpy(), numerics.quantize_activation(x, expected))


@settings(max_examples=30)
@given(activations, st.sampled_from(["static", "per_token"]), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_linear_is_the_reference(
    x: NDArray[np.float32], activation: Literal["static", "per_token"], has_bias: bool, divided: bool, seed: int
) -> None:
    """Static or per token, with and without bias and equalization, within the error of a float32 sum.

    Each of the K = 32 products is exact (8 bits times 15). The sum has K - 1 roundings, then come the activation scale
    and the bias: K + 1 roundings of at most the sum of magnitudes.
    """
    random = np.random.default_rng(seed)
    codes = random.integers(-8, 8, (5, 32))
    group_scales = random.uniform(0.01, 0.1, (5, 2)).astype(np.float16)
    bias = random.standard_normal(5).astype(np.float32) if has_bias else None
    divisor = random.uniform(0.5, 2.0, 32).astype(np.float32) if divided else None
    scale = float(np.float32(0.37))
    weight = numerics.dequantize_weight(codes, group_scales, 16).astype(np.float32)
    linear = FakeQuantLinear(
        torch.from_numpy(weight),
        None if bias is None else torch.from_numpy(bias),
        activation=activation,
        scale=scale if activation == "static" else None,
        divisor=None if divisor is None else torch.from_numpy(divisor),
    )
    values = x if divisor is None else x / divisor
    x_scale = np.float32(scale) if activation == "static" else numerics.per_token_scale(values)
    x_codes = numerics.quantize_activation(values, x_scale)
    expected = numerics.w4a8_linear(x_codes, x_scale, codes, group_scales, 16, bias)
    magnitudes = numerics.w4a8_linear(
        np.abs(x_codes), x_scale, np.abs(codes), group_scales, 16, None if bias is None else np.abs(bias)
    )
    error = np.abs(linear(torch.from_numpy(x)).numpy() - expected)
    assert (error <= (32 + 1) * FLOAT32_EPS * magnitudes).all()


def test_half_precision_is_rounded_once() -> None:
    """A float16 model gets the float32 result rounded to float16, not a float16 sum."""
    weight, x = torch.full((1, 64), 1.0009765625), torch.ones(1, 64, dtype=torch.float16)
    linear = FakeQuantLinear(weight, None, activation=None)
    assert linear(x).dtype == torch.float16
    assert linear(x).item() == np.float16(64 * 1.0009765625)


def test_static_activation_needs_a_scale() -> None:
    """A static layer without a scale is a bug, not a layer with scale 1."""
    with pytest.raises(RuntimeError, match="needs a scale"):
        FakeQuantLinear(torch.ones(1, 4), None, activation="static")(torch.ones(1, 4))


def test_folding_alone_leaves_the_logits(model: Any, decide: Callable[..., Decided], sites: Sites) -> None:
    """Every site equalized, nothing quantized: x / s and W s cancel up to float32 rounding."""
    policy, arrays = decide(ALL_EQUALIZED, v0=0.0, v1=1e6)
    assert len(policy.equalized_sites()) == 6
    before = logits(model)
    apply_policy(model, policy, arrays, sites, weights="float", quantize_activations=False)
    assert_same_logits(model, before)


def test_int4_weights_and_int8_activations_both_take_effect(
    model: Any, decide: Callable[..., Decided], sites: Sites
) -> None:
    """Each half of the policy changes the logits, and each linear holds the codes of its policy."""
    policy, arrays = decide(ALL_EQUALIZED)
    results = [logits(model)]
    for weights, quantize in (("int4", False), ("float", True), ("int4", True)):
        with applied_policy(model, policy, arrays, sites, weights=weights, quantize_activations=quantize):  # type: ignore[arg-type]
            results.append(logits(model))
            down = model.get_submodule(DOWN)
            codes = numerics.dequantize_weight(
                int4_from_packed(arrays[f"{DOWN}.weight_codes"]), arrays[f"{DOWN}.weight_scales"], 128
            )
            assert np.array_equal(down.weight.numpy(), codes) == (weights == "int4")
    differences = [np.abs(a - b).max() for i, a in enumerate(results) for b in results[:i]]
    assert min(differences) > 0


def test_model_is_float_again_after_the_block(model: Any, decide: Callable[..., Decided], sites: Sites) -> None:
    """The float modules themselves come back, also after an error inside."""
    before, modules = logits(model), dict(model.named_modules())
    policy, arrays = decide(ALL_EQUALIZED)
    with pytest.raises(KeyboardInterrupt), applied_policy(model, policy, arrays, sites):
        raise KeyboardInterrupt
    assert all(modules[path] is module for path, module in model.named_modules())
    assert np.array_equal(logits(model), before)


def test_float_layers_are_left_alone(model: Any, decide: Callable[..., Decided], sites: Sites) -> None:
    """Excluded layers stay the module they were, also beside an equalized norm, which is not folded here."""
    policy, arrays = decide(ALL_EQUALIZED, exclude=("lm_head", r"layers\.0\.self_attn\.q_proj"))
    untouched = {path: model.get_submodule(path) for path in ("lm_head", f"{LAYER}.self_attn.q_proj")}
    replaced = apply_policy(model, policy, arrays, sites)
    assert replaced.keys() == policy.quantized().keys()
    assert all(model.get_submodule(path) is module for path, module in untouched.items())


@pytest.mark.parametrize("excluded", [r"layers\.0\.mlp\.up_proj", r"layers\.0\.mlp\.gate_proj"])
def test_float_layer_next_to_an_equalized_gated_site_still_folds(
    model: Any, decide: Callable[..., Decided], sites: Sites, excluded: str
) -> None:
    """An excluded `up` is the producer of down_proj's input: its rows are divided though it stays float."""
    policy, arrays = decide(ALL_EQUALIZED, v0=0.0, v1=1e6, exclude=("lm_head", excluded))
    before = logits(model)
    replaced = apply_policy(model, policy, arrays, sites, weights="float", quantize_activations=False)
    assert UP in replaced
    assert (GATE in replaced) == ("up_proj" in excluded)
    assert_same_logits(model, before)


def test_bias_of_a_producer_is_divided(make_stats: StatsFactory, tiny_llama_copy: Any) -> None:
    """Linears with bias: the producer's bias is divided like its rows, consumers' biases are left alone."""
    from tests.support.checkpoints import llama_sites

    checkpoint = checkpoint_from_directory(_with_biases(tiny_llama_copy), "biased")
    biased_sites = llama_sites(checkpoint)
    stats = make_stats(ALL_EQUALIZED)
    policy, stream = decide_policy(biased_sites, stats, checkpoint, PolicyOptions(v0=0.0, v1=1e6), NoProgress())
    arrays = stream.read_all()
    model: Any = model_from_checkpoint(checkpoint, torch.float32)
    before, biases = logits(model), {path: model.get_submodule(path).bias.clone() for path in (UP, DOWN)}
    apply_policy(model, policy, arrays, biased_sites, weights="float", quantize_activations=False)
    s = torch.from_numpy(arrays[f"{UP}.equalization"])
    assert torch.equal(model.get_submodule(UP).bias, biases[UP] / s)
    assert torch.equal(model.get_submodule(DOWN).bias, biases[DOWN])
    assert_same_logits(model, before)


def _with_biases(directory: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    return directory


def test_sites_helper_is_complete(sites: Sites) -> None:
    """The hand-made sites have what trace writes: a site or a reason for each linear."""
    assert all((linear.site is None) != (linear.no_site_reason is None) for linear in sites.linears)
    assert isinstance(sites.linears[0], Linear)
