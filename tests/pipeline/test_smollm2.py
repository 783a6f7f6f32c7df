"""The main road on a real LLM, SmolLM2-135M: what the README promises, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from calib.stats import read_stats
from fptq_export.files import read_json_model
from fptq_export.package.manifest import Manifest
from fptq_export.policy import Policy, read_policy
from fptq_export.sites import read_sites
from fptq_export.verify.report import VerifyReport

pytestmark = pytest.mark.slow

LINEARS = 7 * 30
EMBEDDING_WEIGHTS = 49152 * 576
LARGEST_W4A8_TO_FP16 = 0.45
"""SmolLM2's FP16 embedding is the larger half of what remains."""
LARGEST_ENGINE_TO_W4A8 = 1.35
MEMORY_LIMIT_BYTES = 3_500_000_000
LARGEST_GRAPH_OVERHEAD = 1.01
"""Nodes, names and norm weights beside the large tensors."""


@pytest.fixture(scope="module")
def run(smollm2_run: Path) -> Path:
    """The run directory; `out.plan` is beside it."""
    return smollm2_run


@pytest.fixture(scope="module")
def policy(run: Path) -> Policy:
    """The policy the run wrote."""
    return read_policy(run / "policy.json")


def size(*paths: Path) -> int:
    """Bytes of files together."""
    return sum(path.stat().st_size for path in paths)


def test_layers_follow_the_three_tiers(run: Path, policy: Policy) -> None:
    """All three tiers occur, and every layer is in the one its measured range and fold site ask for."""
    stats = read_stats(run / "stats.safetensors")
    sites = read_sites(run / "sites.json")
    expected = {}
    for path in policy.quantized():
        v = stats.absmax(path)
        foldable = sites.linear(path).site is not None
        expected[path] = "static" if v <= 15 else "lae_static" if v < 150 and foldable else "per_token"
    assert {path: layer.activation for path, layer in policy.quantized().items()} == expected
    assert set(expected.values()) == {"static", "lae_static", "per_token"}


def test_every_linear_but_the_head_is_quantized(policy: Policy) -> None:
    """210 linears run W4A8; lm_head keeps its float type and says why."""
    assert len(policy.quantized()) == LINEARS
    assert [path for path, layer in policy.layers.items() if layer.precision == "float"] == ["lm_head"]
    assert "exclude" in policy.layers["lm_head"].reason


def test_every_layer_has_a_reason_with_its_number(policy: Policy) -> None:
    """A person can read why each layer runs what it runs."""
    for path, layer in policy.quantized().items():
        assert f"{layer.input_absmax:.6g}" in layer.reason, path


def test_the_weights_are_really_four_bits(run: Path, policy: Policy) -> None:
    """The data file is half a byte a quantized weight, two bytes a group scale, and the FP16 rest."""
    layers = policy.quantized().values()
    codes = sum(layer.in_features * layer.out_features for layer in layers) // 2
    scales = sum(2 * layer.in_features * layer.out_features // (layer.group_size or 1) for layer in layers)
    norms = 2 * 61 * 576
    expected = codes + scales + 2 * EMBEDDING_WEIGHTS + norms
    assert expected <= size(run / "model.w4a8.onnx", run / "model.w4a8.onnx.data") <= LARGEST_GRAPH_OVERHEAD * expected


def test_sizes_are_what_the_readme_says(run: Path) -> None:
    """The W4A8 graph against FP16, the engine against the W4A8 graph."""
    full = size(run / "model.onnx", run / "model.onnx.data")
    small = size(run / "model.w4a8.onnx", run / "model.w4a8.onnx.data")
    assert small <= LARGEST_W4A8_TO_FP16 * full
    assert size(run.parent / "out.plan") <= LARGEST_ENGINE_TO_W4A8 * small


def test_the_portable_graph_has_one_node_a_linear(run: Path, policy: Policy) -> None:
    """188-odd static and a few per-token nodes: as many of each as the policy has."""
    proto = onnx.load(run / "model.w4a8.onnx", load_external_data=False)
    kinds = [node.op_type for node in proto.graph.node if node.domain == "fptq"]
    tiers = [layer.activation for layer in policy.quantized().values()]
    assert kinds.count("FptqW4A8GemmPerToken") == tiers.count("per_token") > 0
    assert kinds.count("FptqW4A8GemmStatic") == LINEARS - tiers.count("per_token")


def test_the_engine_holds_every_quantized_linear(run: Path) -> None:
    """The layer list of the engine has an INT4 constant for each of the 210 linears, none dequantized on its own."""
    build = read_json_model(run / "manifest.json", Manifest).stages["build"].summary
    assert build["quantized_linears"] == LINEARS
    assert build["int4_constants"] >= 1
    assert build["unfused"] == []


def test_memory_stays_below_the_promise(run: Path) -> None:
    """The largest resident size of any stage."""
    stages = read_json_model(run / "manifest.json", Manifest).stages
    assert max(record.peak_memory_bytes for record in stages.values()) < MEMORY_LIMIT_BYTES


def test_the_proof_of_accuracy_is_there(run: Path) -> None:
    """Perplexity of both models on the same text, the cache proven, Polygraphy's figures recorded."""
    report = read_json_model(run / "verify.json", VerifyReport)
    assert report.reference_perplexity.tokens == report.candidate_perplexity.tokens > 0
    assert report.cache.within_bound
    assert report.polygraphy is not None
    assert report.decode.steps == 16


def test_the_policy_file_is_plain_json(run: Path) -> None:
    """An editor and any JSON tool can read it."""
    data: dict[str, Any] = json.loads((run / "policy.json").read_text())
    assert data["rule"] == {"name": "paper", "equalizer": "paper", "v0": 15.0, "v1": 150.0}
