"""Mixtures of experts on the whole road: from stacked weights to an engine that holds every linear of every expert."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch

from fptq_export.cli import main
from fptq_export.files import read_json_model
from fptq_export.package.manifest import Manifest
from fptq_export.policy import Policy, read_policy
from fptq_export.rewrite.passes import lower_for_plugin
from fptq_export.sites import Sites, read_sites
from tests.pipeline.conftest import SMALL
from tests.support.experts import EXPERTS, stacked_model, tiny_qwen3_moe
from tests.support.models import model_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

OPTIONS = (*SMALL, "--group-size", "32", "--v0", "2", "--v1", "100")
"""Two groups along a hidden size of 64, so that TensorRT fuses them; thresholds that equalize the norms' outputs."""


@dataclass(frozen=True)
class Run:
    """A finished run."""

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


@pytest.fixture(scope="module")
def qwen3_moe(make_model_dir: ModelDirFactory, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A layer in FP16, from a file with two stacks a layer."""
    original = model_once(make_model_dir, tiny_qwen3_moe())
    directory = tmp_path_factory.mktemp("qwen3-moe")
    stacked_model(original, torch.float32).save_pretrained(directory / "model", save_original_format=False)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / "model" / name).write_bytes((original / name).read_bytes())
    words = [str(directory / "model"), "-o", str(directory / "run"), "--engine", str(directory / "run" / "out.plan")]
    assert main([*words, *OPTIONS]) == 0
    logging.disable(logging.NOTSET)
    return Run(directory / "run")


def _linears_of_experts(sites: Sites) -> Iterator[str]:
    return (linear.path for linear in sites.linears if linear.expert is not None)


def test_norm_is_read_by_router_and_all_experts(qwen3_moe: Run) -> None:
    """One fold site for the router and the gate and up projections of every expert; one for each down projection."""
    sites = qwen3_moe.sites
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


def test_engine_holds_every_linear_of_every_expert(qwen3_moe: Run) -> None:
    """The layer list has the INT4 codes of all linears but router and head, none dequantized on its own."""
    build, sites = qwen3_moe.summary("build"), qwen3_moe.sites
    quantized = qwen3_moe.policy.quantized()
    assert set(_linears_of_experts(sites)) <= quantized.keys()
    assert build["quantized_linears"] == len(quantized) == len(sites.linears) - 1 - len(_routers(sites))
    assert build["unfused"] == []


def _routers(sites: Sites) -> list[str]:
    return [linear.path for linear in sites.linears if linear.float_reason is not None]


def test_router_is_float_in_the_policy(qwen3_moe: Run) -> None:
    """With the reason, though the norm before it is equalized for the experts."""
    policy = qwen3_moe.policy
    assert _routers(qwen3_moe.sites)
    for path in _routers(qwen3_moe.sites):
        assert policy.layers[path].precision == "float"
        assert "it scores the experts" in policy.layers[path].reason
    assert "model.layers.0.post_attention_layernorm" in policy.equalized_sites()


def test_graph_has_no_control_flow(qwen3_moe: Run) -> None:
    """Which experts a token chooses decides what is added, not what runs: TensorRT gets one fixed program."""
    proto = onnx.load(qwen3_moe.directory / "model.onnx", load_external_data=False)
    assert not {node.op_type for node in proto.graph.node} & {"If", "Loop", "Scan", "NonZero", "SequenceAt"}


def test_plugin_multiplies_all_experts_once(qwen3_moe: Run, tmp_path: Path) -> None:
    """Gate and up projections of all experts read one tensor with one scale: one node of the plugin for them all."""
    lowered = lower_for_plugin(qwen3_moe.directory / "model.w4a8.onnx", tmp_path / "plugin.onnx")
    assert sorted(len(paths) for paths in lowered.fused.values()) == [3, 2 * EXPERTS]
    assert lowered.left_alone == {}
