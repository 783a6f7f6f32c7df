"""Calibration of experts: only tokens that chose an expert count for it, and an expert that none chose is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from calib.auto import AutoOptions, Measured, decide_auto
from calib.batches import TokenBatches
from calib.choose_equalization import EqualizerOptions
from calib.decide import PolicyOptions, decide_policy
from calib.fake_quant import FakeQuantLinear, apply_policy
from calib.hessians import Hessians, hessian_writer, owners_from_sites
from calib.load import Checkpoint, checkpoint_from_directory, model_from_checkpoint
from calib.observe import HessianSink, observe
from calib.replay import replay_policy
from calib.shared_inputs import stats_of_tensors
from calib.stats import Stats
from fptq_export.errors import UserErrors
from fptq_export.files import write_json_model
from fptq_export.policy import LayerPolicy, Policy, write_policy
from fptq_export.progress import NoProgress
from fptq_export.sites import Linear, Sites
from tests.support.checkpoints import edit_config
from tests.support.experts import EXPERTS, LAYERS, Routed, mixtral_sites, routed_inputs, stacked_model, tiny_mixtral
from tests.support.models import model_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

BLOCK = "model.layers.0.mlp"
NORM = "model.layers.0.post_attention_layernorm"
UNUSED = f"{BLOCK}.experts.3"
"""No token chooses it in the `lopsided` model."""
FLOAT32_EPS = 2.0**-24
TWO_PROGRAMS = 4 * 128**0.5 * FLOAT32_EPS
"""Relative: an input of an expert in two float32 programs, behind at most four sums of at most 128 terms, whose
roundings add up like a random walk."""


@pytest.fixture(scope="module")
def batches() -> TokenBatches:
    return TokenBatches(np.random.default_rng(3).integers(0, 512, (4, 24)), "random", "")


@pytest.fixture(scope="module")
def mixtral(make_model_dir: ModelDirFactory) -> Checkpoint:
    return checkpoint_from_directory(model_once(make_model_dir, tiny_mixtral()), "mixtral")


@pytest.fixture(scope="module")
def lopsided(mixtral: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """One expert a token, by scores 2t, -2t, t and 0: the third and the fourth are never the largest."""
    directory = tmp_path_factory.mktemp("lopsided") / "model"
    shutil.copytree(mixtral.directory, directory)
    tensors = load_file(directory / "model.safetensors")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        tensors[name] = torch.tensor([[2.0], [-2.0], [1.0], [0.0]]) * tensors[name][:1]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    edit_config(directory, num_experts_per_tok=1)
    return checkpoint_from_directory(directory, "lopsided")


@pytest.fixture(scope="module")
def sites(mixtral: Checkpoint) -> Sites:
    return mixtral_sites(mixtral)


def quantizable(sites: Sites) -> list[str]:
    return [linear.path for linear in sites.linears if linear.float_reason is None]


class Calibrated:
    """Statistics and Hessians of a model."""

    def __init__(self, checkpoint: Checkpoint, sites: Sites, batches: TokenBatches, file: Path) -> None:
        self.checkpoint, self.file = checkpoint, file
        owners = owners_from_sites(sites, quantizable(sites))
        sizes = {owner: sites.linear(owner).in_features for owner in owners.values()}
        load = partial(model_from_checkpoint, checkpoint, torch.float32)
        with hessian_writer(file, sizes) as write:
            sink = HessianSink(owners, write)
            self.stats = observe(load, batches, quantizable(sites), NoProgress(), 2, sink, histograms=True)
        self.hessians = Hessians(file, sites)


@pytest.fixture(scope="module")
def calibrated(
    mixtral: Checkpoint, sites: Sites, batches: TokenBatches, tmp_path_factory: pytest.TempPathFactory
) -> Calibrated:
    return Calibrated(mixtral, sites, batches, tmp_path_factory.mktemp("calibrated") / "hessians.safetensors")


@pytest.fixture(scope="module")
def one_sided(
    lopsided: Checkpoint, sites: Sites, batches: TokenBatches, tmp_path_factory: pytest.TempPathFactory
) -> Calibrated:
    return Calibrated(lopsided, sites, batches, tmp_path_factory.mktemp("one-sided") / "hessians.safetensors")


@pytest.fixture(scope="module")
def routed(mixtral: Checkpoint, batches: TokenBatches) -> list[Routed]:
    """What transformers' own experts are called with."""
    return routed_inputs(stacked_model(mixtral.directory, torch.float32), torch.from_numpy(batches.tokens))


def down_inputs(experts: Any, expert: int, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """What the down projection of a stacked expert reads for tokens [tokens, hidden]."""
    gate, up = (torch.from_numpy(x) @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
    result: NDArray[np.float32] = (experts.act_fn(gate) * up).detach().numpy()
    return result


def inputs_of_linears(routed: list[Routed], stacked: Any) -> dict[str, NDArray[np.float32]]:
    """Torch path -> everything the linear reads, computed from transformers' model."""
    found = {}
    for layer, record in enumerate(routed):
        for expert in range(EXPERTS):
            path, x = f"model.layers.{layer}.mlp.experts.{expert}", record.of_expert(expert)
            found[f"{path}.gate_proj"] = found[f"{path}.up_proj"] = x
            found[f"{path}.down_proj"] = down_inputs(stacked.model.layers[layer].mlp.experts, expert, x)
    return found


@pytest.fixture(scope="module")
def inputs(routed: list[Routed], mixtral: Checkpoint) -> dict[str, NDArray[np.float32]]:
    return inputs_of_linears(routed, stacked_model(mixtral.directory, torch.float32))


def test_maxima_are_those_of_routed_tokens(calibrated: Calibrated, inputs: dict[str, NDArray[np.float32]]) -> None:
    """For gate, up and down of every expert, against the tokens that chose it in transformers' own model."""
    for path, x in inputs.items():
        expected = np.abs(x).max(axis=0)
        error = np.abs(calibrated.stats.channel_absmax[path] - expected).max()
        assert error <= TWO_PROGRAMS * expected.max(), path
    first, second = (inputs[f"{BLOCK}.experts.{expert}.gate_proj"] for expert in (0, 1))
    assert (np.abs(first).max(axis=0) != np.abs(second).max(axis=0)).any(), "all experts saw the same"


def test_histograms_count_routed_tokens(calibrated: Calibrated, inputs: dict[str, NDArray[np.float32]]) -> None:
    """As many values as routed tokens have channels."""
    for path, x in inputs.items():
        assert calibrated.stats.histograms[path].counts.sum() == x.size, path


def test_hessians_sum_over_routed_tokens(
    calibrated: Calibrated, inputs: dict[str, NDArray[np.float32]], batches: TokenBatches
) -> None:
    """Sum of x x^T over the tokens that chose the expert, divided by all tokens; one matrix for its gate and up."""
    for path, x in inputs.items():
        wide = x.astype(np.float64)
        expected = wide.T @ wide / batches.count
        bound = (len(x) * FLOAT32_EPS + 2 * TWO_PROGRAMS) * np.abs(wide).max() ** 2 * len(x) / batches.count
        assert np.abs(calibrated.hessians.read(path).numpy() - expected).max() <= bound, path
    gates = [calibrated.hessians.read(f"{BLOCK}.experts.{expert}.gate_proj") for expert in range(EXPERTS)]
    assert torch.equal(gates[0], calibrated.hessians.read(f"{BLOCK}.experts.0.up_proj"))
    assert not torch.equal(gates[0], gates[1])
    readers = [f"{BLOCK}.experts.{expert}.{name}" for expert in range(EXPERTS) for name in ("gate_proj", "up_proj")]
    summed = calibrated.hessians.read_sum([f"{BLOCK}.gate", *readers])
    assert torch.allclose(summed, sum(gates[1:], gates[0]), rtol=EXPERTS * FLOAT32_EPS, atol=0.0)


def test_tensor_has_what_all_experts_saw(calibrated: Calibrated, sites: Sites) -> None:
    """For the policy, linears that read one tensor have its maxima over all tokens; a second time changes nothing."""
    shared = stats_of_tensors(calibrated.stats, sites)
    readers = [path for path in sites.site(NORM).consumers if path in shared.channel_absmax]
    expected = np.maximum.reduce([calibrated.stats.channel_absmax[path] for path in readers])
    for path in readers:
        assert np.array_equal(shared.channel_absmax[path], expected)
        assert shared.histograms[path].counts.sum() == sum(
            calibrated.stats.histograms[f"{BLOCK}.experts.{expert}.gate_proj"].counts.sum() for expert in range(EXPERTS)
        )
    down = f"{BLOCK}.experts.0.down_proj"
    assert np.array_equal(shared.channel_absmax[down], calibrated.stats.channel_absmax[down])
    again = stats_of_tensors(shared, sites)
    assert all(np.array_equal(again.channel_absmax[path], found) for path, found in shared.channel_absmax.items())


def test_statistics_without_experts_are_left_alone() -> None:
    """Dense models keep what was measured, also where linears that read one tensor were measured apart."""
    linears = tuple(
        Linear(path=path, node="", weight="", weight_transposed=False, bias=None, in_features=1, out_features=1,
               input="x", site=None, no_site_reason="none")
        for path in "ab"
    )  # fmt: skip
    stats = Stats({"a": np.array([1], np.float32), "b": np.array([2], np.float32)}, 1, "")
    assert stats_of_tensors(stats, Sites(linears=linears, fold_sites=())).channel_absmax == stats.channel_absmax


def decided(
    calibrated: Calibrated, sites: Sites, options: PolicyOptions | None = None, path: Path | None = None
) -> tuple[Policy, dict[str, NDArray[Any]]]:
    options = options or PolicyOptions(group_size=32)
    policy, stream = decide_policy(
        sites, calibrated.stats, calibrated.checkpoint, options, NoProgress(), calibrated.file
    )
    arrays = stream.read_all()
    if path is not None:
        write_policy(policy, arrays, path)
        shutil.copy(calibrated.file, path.with_name("hessians.safetensors"))
    return policy, arrays


def test_expert_that_no_token_chose_is_known_by_zeros(one_sided: Calibrated) -> None:
    """Its linears are there, with maxima 0, an empty histogram and a Hessian of 0; nothing stops."""
    for name in ("gate_proj", "up_proj", "down_proj"):
        path = f"{UNUSED}.{name}"
        assert not one_sided.stats.channel_absmax[path].any()
        assert not one_sided.stats.histograms[path].counts.any()
        assert not one_sided.hessians.read(path).any()
    assert one_sided.stats.absmax(f"{BLOCK}.experts.0.gate_proj") > 0.0


@pytest.mark.parametrize(
    "options",
    [
        PolicyOptions(group_size=32, v0=0.5, v1=1e4),
        PolicyOptions(group_size=32, weight_method="gptq", range_calibrator="percentile"),
    ],
    ids=["paper, equalized", "gptq, percentile"],
)
def test_expert_that_no_token_chose_is_told_in_the_policy(
    one_sided: Calibrated, sites: Sites, options: PolicyOptions
) -> None:
    """Per token, which needs no statistics, with the reason; other experts get static scales; codes are sound."""
    policy, arrays = decided(one_sided, sites, options)
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer = policy.layers[f"{UNUSED}.{name}"]
        assert (layer.activation, layer.activation_scale) == ("per_token", None)
        assert "calibration routed no token to this expert" in layer.reason
        assert np.isfinite(arrays[f"{UNUSED}.{name}.weight_scales"]).all()
        used = policy.layers[f"{BLOCK}.experts.0.{name}"]
        assert used.activation in ("static", "lae_static")
        assert used.activation_scale is not None


def test_router_stays_float_whatever_is_asked(calibrated: Calibrated, sites: Sites) -> None:
    """Never INT4: the reason is in the policy, also where a pattern asks for INT8 weights."""
    options = PolicyOptions(group_size=32, precision=("mlp=w8a8",))
    policy, _ = decided(calibrated, sites, options)
    router = policy.layers[f"{BLOCK}.gate"]
    assert router.precision == "float"
    assert "it scores the experts" in router.reason
    assert policy.layers[f"{BLOCK}.experts.0.gate_proj"].precision == "w8a8"


def test_experts_share_the_scale_of_their_tensor(calibrated: Calibrated, sites: Sites) -> None:
    """All gate and up projections of a layer quantize one tensor, once; each down projection has its own scale."""
    policy, _ = decided(calibrated, sites)
    layers = [policy.layers[path] for path in sites.site(NORM).consumers if path != f"{BLOCK}.gate"]
    assert len({layer.activation_scale for layer in layers}) == 1
    downs = [policy.layers[f"{BLOCK}.experts.{expert}.down_proj"] for expert in range(EXPERTS)]
    assert len({layer.activation_scale for layer in downs}) == EXPERTS


@pytest.mark.parametrize("equalizer", ["paper", "lae", "search"])
def test_unedited_policy_is_replayed_as_it_is(
    one_sided: Calibrated, sites: Sites, equalizer: Any, tmp_path: Path
) -> None:
    """Shared scales, an expert without tokens and a router all pass the checks, and nothing changes."""
    options = PolicyOptions(group_size=32, v0=0.5, v1=1e4, equalization=EqualizerOptions(equalizer))
    policy, arrays = decided(one_sided, sites, options, tmp_path / "policy.json")
    assert NORM in policy.equalizations()
    assert f"{UNUSED}.up_proj" not in policy.equalizations(), "nothing is known of its channels"
    replayed, stream = replay_policy(tmp_path / "policy.json", sites, one_sided.checkpoint, NoProgress())
    assert replayed == policy
    again = stream.read_all()
    assert again.keys() == arrays.keys()
    assert all(np.array_equal(again[name], array) for name, array in arrays.items())


BAD_EDITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "router quantized": (
        f"{BLOCK}.gate",
        {"precision": "w8a8", "activation": "per_token", "weight_method": "rtn"},
        "cannot be quantized .it scores the experts",
    ),
    "static without statistics": (
        f"{UNUSED}.down_proj",
        {"activation": "static"},
        "calibration routed no token to this expert: use per_token",
    ),
}


@pytest.mark.parametrize("edit", BAD_EDITS)
def test_edit_that_cannot_be_right_is_refused(one_sided: Calibrated, sites: Sites, edit: str, tmp_path: Path) -> None:
    """A person cannot quantize the router, nor give an expert a static scale that nothing is known for."""
    path, changes, message = BAD_EDITS[edit]
    policy, _ = decided(one_sided, sites, path=tmp_path / "policy.json")
    layer = LayerPolicy.model_validate({**policy.layers[path].model_dump(), **changes})
    write_json_model(policy.model_copy(update={"layers": {**policy.layers, path: layer}}), tmp_path / "policy.json")
    with pytest.raises(UserErrors, match=message):
        replay_policy(tmp_path / "policy.json", sites, one_sided.checkpoint, NoProgress())


def test_fake_quantized_experts_hold_the_codes_of_the_policy(calibrated: Calibrated, sites: Sites) -> None:
    """Each linear of an expert is replaced, the router is not, and folding alone leaves the logits."""
    policy, arrays = decided(calibrated, sites, PolicyOptions(group_size=32, v0=0.5, v1=1e4))
    assert len(policy.equalized_sites()) == LAYERS * (1 + EXPERTS)
    model: Any = model_from_checkpoint(calibrated.checkpoint, torch.float32)
    ids = torch.arange(48).reshape(2, 24)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        replaced = apply_policy(model, policy, arrays, sites, weights="float", quantize_activations=False)
        after = model(input_ids=ids).logits
    assert replaced.keys() == policy.quantized().keys()
    assert isinstance(model.get_submodule(f"{BLOCK}.experts.2.down_proj"), FakeQuantLinear)
    # Each of 2 layers x 3 linears in a row is a sum of at most 128 products, and s adds two roundings to each.
    assert (after - before).abs().max() <= 2 * LAYERS * 3 * (128 + 2) * FLOAT32_EPS * before.abs().max()


def test_auto_chooses_for_experts_that_its_text_does_not_reach(
    one_sided: Calibrated, sites: Sites, batches: TokenBatches
) -> None:
    """The unused expert is per token, what the others run is chosen, and the whole policy can be measured."""
    measured = Measured(sites, one_sided.stats, one_sided.checkpoint, one_sided.file)
    decision = decide_auto(measured, PolicyOptions(group_size=32), AutoOptions(), batches.tokens, NoProgress())
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert decision.policy.layers[f"{UNUSED}.{name}"].activation == "per_token"
    assert decision.report.auto.measured_kl is not None
    tiers = {
        decision.policy.layers[path].activation
        for path in sites.site(NORM).consumers
        if path != f"{BLOCK}.gate" and not path.startswith((UNUSED, f"{BLOCK}.experts.2"))
    }
    assert len(tiers) == 1, "linears that read one tensor run one tier"
