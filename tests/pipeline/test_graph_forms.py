"""`--logits` and `--kv-cache`: what the caller of the written graphs sees, from an earlier run on."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from fptq_export.build.layer_list import layers_from_log
from fptq_export.files import read_json_model
from fptq_export.package.manifest import Manifest
from fptq_export.rewrite import GraphForm, check_form, static_cache
from fptq_export.verify.report import VerifyReport
from tests.pipeline.conftest import SMALL, Command

FUSED_ATTENTION = "gemm_mha"
"""In the name of the layer that TensorRT for RTX runs a whole attention in."""


def report_of(run: Path) -> VerifyReport:
    """What the run measured."""
    return read_json_model(run / "verify.json", VerifyReport)


def test_the_last_token_is_proven_on_the_form_with_all(run_copy: Path, command: Command) -> None:
    """No figure is lost: those of the form with all logits are the earlier run's, and the file's rows are its rows."""
    before = report_of(run_copy)
    assert command("rewrite", run_copy, "--logits", "last").code == 0
    outcome = command("verify", run_copy)
    assert outcome.code == 0, outcome.err
    graph = onnx.load(run_copy / "model.w4a8.onnx", load_external_data=False).graph
    assert [dim.dim_value for dim in graph.output[0].type.tensor_type.shape.dim][1] == 1
    after = report_of(run_copy)
    assert before.last_token is None
    assert after.last_token is not None
    assert after.last_token.within_bound
    assert after.model_dump(exclude={"last_token"}) == before.model_dump(exclude={"last_token"})


def test_a_static_cache_is_verified_and_built_with_fused_attention(run_copy: Path, command: Command) -> None:
    """Neither traced nor calibrated again: same policy, proof of the static form, one fused attention a layer."""
    before = (run_copy / "policy.json").read_bytes()
    words = ("--kv-cache", "static", "--max-kv-len", "64", "--max-input-len", "32", "--compute-capability", "8.6")
    for verb in ("rewrite", "verify", "build"):
        outcome = command(verb, run_copy, *words, "--engine", run_copy / "static.plan")
        assert outcome.code == 0, outcome.err
    assert (run_copy / "policy.json").read_bytes() == before
    assert report_of(run_copy).cache.within_bound
    summary = read_json_model(run_copy / "manifest.json", Manifest).stages["rewrite"].summary
    assert summary["fused"] == {"RMSNormalization": 5, "RotaryEmbedding": 4, "Attention": 2}
    assert summary["attention_left_alone"] == {}
    layers = layers_from_log(run_copy / "build.log")
    assert sum(FUSED_ATTENTION in layer.name for layer in layers) == 2
    caches = {tensor.dims for layer in layers for tensor in layer.outputs if tensor.name.startswith("present.")}
    assert caches == {(-1, 2, 96, 16)}


def test_an_int8_cache_is_verified_and_built(run_copy: Path, command: Command) -> None:
    """From the same policy: the proof of the cache holds, and the engine takes and gives INT8 with FP32 scales."""
    words = ("--kv-dtype", "int8", "--max-kv-len", "64", "--max-input-len", "32", "--compute-capability", "8.6")
    before = (run_copy / "policy.json").read_bytes()
    for verb in ("rewrite", "verify", "build"):
        outcome = command(verb, run_copy, *words, "--engine", run_copy / "int8.plan")
        assert outcome.code == 0, outcome.err
    assert (run_copy / "policy.json").read_bytes() == before
    assert report_of(run_copy).cache.within_bound
    types = {
        tensor.name.rpartition(".")[2]: tensor.datatype
        for layer in layers_from_log(run_copy / "build.log")
        for tensor in layer.outputs
        if tensor.name.startswith("present.")
    }
    assert types == {"key": "Int8", "value": "Int8", "key_scale": "Float", "value_scale": "Float"}


def test_an_engine_with_a_static_int8_cache_is_refused(run_copy: Path, command: Command) -> None:
    """TensorRT's cache update takes no INT8: said before anything is written, and with what works."""
    before = (run_copy / "model.w4a8.onnx").read_bytes()
    words = ("--kv-dtype", "int8", "--kv-cache", "static", "--engine", run_copy / "int8.plan")
    outcome = command("build", run_copy, *words)
    assert outcome.code == 1
    assert "--kv-dtype int8: TensorRT writes float types only into a static KV cache" in outcome.err
    assert (run_copy / "model.w4a8.onnx").read_bytes() == before


def test_a_graph_that_cannot_have_a_static_cache_is_refused_before_calibration(
    run_copy: Path, tiny_llama_dir: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other seed asks for another calibration, which the refusal does not wait for."""
    monkeypatch.setattr(static_cache, "_MASK", frozenset())  # no mask is understood any more
    stages = read_json_model(run_copy / "manifest.json", Manifest).stages
    outcome = command(tiny_llama_dir, "-o", run_copy, *SMALL, "--kv-cache", "static", "--seed", "1")
    assert outcome.code == 1
    assert "--kv-cache static" in outcome.err
    assert "use --kv-cache concat for this model" in outcome.err
    assert [line.split(":")[0] for line in outcome.err.splitlines() if "up to date" in line] == ["load", "trace"]
    assert read_json_model(run_copy / "manifest.json", Manifest).stages == stages


def test_asking_for_a_static_cache_leaves_the_traced_graph_alone(run_copy: Path) -> None:
    """The check works on a copy in memory: no file is written or touched."""
    before = {path: path.stat().st_mtime_ns for path in run_copy.iterdir()}
    check_form(run_copy / "model.onnx", GraphForm(logits="last", kv_cache="static"))
    assert {path: path.stat().st_mtime_ns for path in run_copy.iterdir()} == before
