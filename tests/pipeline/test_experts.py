"""Mixtures of experts on the whole road: from stacked weights to an engine that holds every linear of every expert."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from calib.fake_quant import apply_policy
from calib.load import checkpoint_from_directory, model_from_checkpoint
from fptq_export.cli import main
from fptq_export.files import read_json_model
from fptq_export.package.manifest import Manifest
from fptq_export.policy import Policy, PolicyArrays, read_policy
from fptq_export.rewrite.passes import lower_for_plugin
from fptq_export.sites import FoldSite, Sites, read_sites
from tests.pipeline.conftest import SMALL
from tests.support.experts import EXPERTS, Float64, tiny_mixtral, tiny_qwen3_moe
from tests.support.models import model_once
from tests.support.traced import FP32_LOGITS, causal_feed, run, torch_logits

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

FOLD = 1e-10
"""Relative to the largest logit, in float64: two layers of seven linears in a row, each a sum of at most 128 products
with two more roundings, are off by less than 14 x 130 x 2^-53 = 2e-13. Measured 1.5e-15."""
FLIPPED_CODES = 8 * 4.0 / 127.0 / 64**0.5
"""Of the largest logit: two correct float32 programs may round an INT8 code to either side of a boundary. One code in
4000 is so near to one, so that fewer than 8 of a layer are; each moves one of at least 64 channels by 1/127 of the
largest magnitude, about 4 times the root mean square. They are taken to add up. Measured 7e-7: none flipped."""
IDS = np.random.default_rng(5).integers(0, 512, (2, 12))
OPTIONS = (*SMALL, "--group-size", "32", "--v0", "2", "--v1", "100")
"""Two groups along a hidden size of 64, so that TensorRT fuses them; thresholds that equalize the norms' outputs."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

    model: Path
    directory: Path

    @property
    def sites(self) -> Sites:
        """What trace found."""
        return read_sites(self.directory / "sites.json")

    @property
    def policy(self) -> Policy:
        """What was decided."""
        return read_policy(self.directory / "policy.json")

    def summary(self, stage: str) -> Any:
        """What a stage says of itself."""
        return read_json_model(self.directory / "manifest.json", Manifest).stages[stage].summary


def _finished(model: Path, directory: Path, *options: str) -> Run:
    engine = directory / "out.plan"
    assert main([str(model), "-o", str(directory), "--engine", str(engine), *OPTIONS, *options]) == 0
    logging.disable(logging.NOTSET)
    return Run(model, directory)


@pytest.fixture(scope="module")
def mixtral(make_model_dir: ModelDirFactory, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two layers of four experts in FP32, from a file with three matrices an expert."""
    return _finished(model_once(make_model_dir, tiny_mixtral()), tmp_path_factory.mktemp("mixtral"), "--dtype", "fp32")


@pytest.fixture(scope="module")
def qwen3_moe(make_model_dir: ModelDirFactory, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A layer in FP16, from a file with two stacks a layer."""
    from tests.support.experts import stacked_model

    original = model_once(make_model_dir, tiny_qwen3_moe())
    directory = tmp_path_factory.mktemp("qwen3-moe")
    stacked_model(original, torch.float32).save_pretrained(directory / "model", save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "model" / name).write_bytes((original / name).read_bytes())
    return _finished(directory / "model", directory / "run")


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def finished(request: pytest.FixtureRequest) -> Run:
    """Either of them."""
    result: Run = request.getfixturevalue(request.param)
    return result


def _linears_of_experts(sites: Sites) -> Iterator[str]:
    return (linear.path for linear in sites.linears if linear.expert is not None)


def test_norm_is_read_by_router_and_all_experts(finished: Run) -> None:
    """One fold site for the router and the gate and up projections of every expert; one for each down projection."""
    sites = finished.sites
    norm = sites.site("model.layers.0.post_attention_layernorm")
    experts = [f"model.layers.0.mlp.experts.{expert}" for expert in range(EXPERTS)]
    readers = {f"{path}.{name}" for path in experts for name in ("gate_proj", "up_proj")}
    assert set(norm.consumers) == {"model.layers.0.mlp.gate", *readers}
    for path in experts:
        down = sites.linear(f"{path}.down_proj")
        assert down.site is not None
        assert sites.site(down.site).producer_linear == f"{path}.up_proj"
        assert down.expert == path
    assert sites.unmatched == ()


def test_engine_holds_every_linear_of_every_expert(finished: Run) -> None:
    """The layer list has the INT4 codes of all linears but router and head, none dequantized on its own."""
    build, sites = finished.summary("build"), finished.sites
    quantized = finished.policy.quantized()
    assert set(_linears_of_experts(sites)) <= quantized.keys()
    assert build["quantized_linears"] == len(quantized) == len(sites.linears) - 1 - len(_routers(sites))
    assert build["unfused"] == []


def _routers(sites: Sites) -> list[str]:
    return [linear.path for linear in sites.linears if linear.float_reason is not None]


def test_router_is_float_in_the_policy(finished: Run) -> None:
    """With the reason, though the norm before it is equalized for the experts."""
    policy = finished.policy
    assert _routers(finished.sites)
    for path in _routers(finished.sites):
        assert policy.layers[path].precision == "float"
        assert "it scores the experts" in policy.layers[path].reason
    assert "model.layers.0.post_attention_layernorm" in policy.equalized_sites()


def test_static_graph_equals_transformers(mixtral: Run) -> None:
    """Every expert on every token, and what was not chosen dropped: the logits of transformers' routing."""
    expected = torch_logits(mixtral.model, IDS)
    graph = mixtral.directory / "model.onnx"
    given = run(graph, causal_feed(graph, IDS), outputs=["logits"])["logits"]
    np.testing.assert_allclose(given, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


def test_quantized_graph_equals_the_torch_model(mixtral: Run) -> None:
    """The W4A8 graph against torch with the same codes and routed experts, far nearer than the float model is."""
    checkpoint = checkpoint_from_directory(mixtral.model, "mixtral")
    model: Any = model_from_checkpoint(checkpoint, torch.float32)
    arrays = PolicyArrays(mixtral.directory / "policy.safetensors")
    names = {f"{path}.{kind}" for path in mixtral.policy.quantized() for kind in ("weight_codes", "weight_scales")}
    names |= {f"{site}.equalization" for site in mixtral.policy.equalized_sites()}
    with torch.inference_mode():
        float_logits = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
        apply_policy(model, mixtral.policy, {name: arrays.read(name) for name in names}, mixtral.sites)
        expected: NDArray[np.float32] = model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    graph = mixtral.directory / "model.w4a8.onnx"
    given = run(graph, causal_feed(graph, IDS), outputs=["logits"])["logits"]
    allowed = FLIPPED_CODES * np.abs(expected).max()
    np.testing.assert_allclose(given, expected, rtol=0.0, atol=allowed)
    assert np.abs(float_logits - expected).max() > 3 * allowed, "quantization would not be seen"


def test_graph_has_no_control_flow(finished: Run) -> None:
    """Which experts a token chooses decides what is added, not what runs: TensorRT gets one fixed program."""
    proto = onnx.load(finished.directory / "model.onnx", load_external_data=False)
    assert not {node.op_type for node in proto.graph.node} & {"If", "Loop", "Scan", "NonZero", "SequenceAt"}


def test_fold_is_exact_in_float64(mixtral: Run) -> None:
    """Random s in every site, the norm of router and experts among them, carried out in torch: the logits stay."""
    model: Any = model_from_checkpoint(checkpoint_from_directory(mixtral.model, "mixtral"), torch.float64)
    before = _logits_in_float64(model)
    random = np.random.default_rng(0)
    for site in mixtral.sites.fold_sites:
        _fold(model, site, site.tied(random.lognormal(sigma=1.5, size=site.channels).astype(np.float32)))
    after = _logits_in_float64(model)
    assert (after - before).abs().max() <= FOLD * before.abs().max()


def test_a_forgotten_router_is_seen(mixtral: Run) -> None:
    """The comparison above can fail: without the router among the consumers, tokens choose other experts."""
    model: Any = model_from_checkpoint(checkpoint_from_directory(mixtral.model, "mixtral"), torch.float64)
    before = _logits_in_float64(model)
    site = mixtral.sites.site("model.layers.0.post_attention_layernorm")
    experts_only = tuple(path for path in site.consumers if not path.endswith("mlp.gate"))
    broken = site.model_copy(update={"consumers": experts_only})
    _fold(model, broken, np.random.default_rng(0).lognormal(sigma=1.5, size=site.channels).astype(np.float32))
    assert (_logits_in_float64(model) - before).abs().max() > 1e6 * FOLD * before.abs().max()


def _logits_in_float64(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode(), Float64():
        logits: torch.Tensor = model(torch.from_numpy(IDS), use_cache=False).logits
    assert logits.dtype == torch.float64
    return logits


def _fold(model: nn.Module, site: FoldSite, scale: NDArray[np.float32]) -> None:
    """Divide what produces a tensor and multiply what reads it, in torch's own parameters."""
    rows = torch.from_numpy(site.producer_scale(scale).astype(np.float64))
    with torch.no_grad():
        for producer in site.producers:
            parameter = model.get_parameter(producer.initializer)
            parameter.copy_(parameter / (rows[:, None] if parameter.dim() > 1 else rows))
        for path in site.consumers:
            weight = model.get_submodule(path).get_parameter("weight")
            weight.copy_(weight * torch.from_numpy(scale.astype(np.float64)))


def test_plugin_multiplies_all_experts_once(qwen3_moe: Run, tmp_path: Path) -> None:
    """Gate and up projections of all experts read one tensor with one scale: one node of the plugin for them all."""
    lowered = lower_for_plugin(qwen3_moe.directory / "model.w4a8.onnx", tmp_path / "plugin.onnx")
    assert sorted(len(paths) for paths in lowered.fused.values()) == [3, 2 * EXPERTS]
    assert lowered.left_alone == {}
