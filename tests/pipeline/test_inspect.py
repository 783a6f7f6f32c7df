"""`fptq-export inspect`: a healthy run is explained, and planted faults are named, each with its exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fptq_export.errors import ExitCode
from tests.pipeline.conftest import Command


@pytest.fixture
def engine(finished_run: Path, run_copy: Path, tmp_path: Path) -> Path:
    """A copy of the engine beside the copy of its run; both may be changed."""
    return Path(shutil.copyfile(finished_run / "out.plan", tmp_path / "out.plan"))


def looked_at(command: Command, *words: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of an inspection."""
    outcome = command("inspect", *words, "--json")
    return outcome.code, json.loads(outcome.out)


def rows_of(inspection: dict[str, Any], name: str) -> list[list[Any]]:
    """Rows of one of its tables."""
    (section,) = (section for section in inspection["sections"] if section["name"] == name)
    rows: list[list[Any]] = section["rows"]
    return rows


def test_healthy_engine_is_explained(engine: Path, command: Command) -> None:
    """Every layer of the policy is counted as proven, the log agrees, and nothing is wrong."""
    code, found = looked_at(command, engine)
    assert code == ExitCode.OK
    assert (found["precision_problems"], found["file_problems"]) == ([], [])
    assert sum(row[-1] for row in rows_of(found, "layers") if row[3] == "proven") == 15
    assert {row[0]: row[1] for row in rows_of(found, "built_for")}["compute capabilities"] == "8.0, 8.6, 8.9, 12.0"
    assert "unproven" not in [section["name"] for section in found["sections"]]


def test_healthy_run_is_explained(run_copy: Path, command: Command) -> None:
    """A run directory shows what was asked, its files, its policy and its engine, as tables too."""
    outcome = command("inspect", run_copy)
    assert outcome.code == ExitCode.OK, outcome.out
    for title in ("files, by the stage that wrote them", "linears, by what they run", "left in float, and why"):
        assert title in outcome.out
    assert "lm_head" in outcome.out


def test_graph_of_the_run_is_explained(run_copy: Path, command: Command) -> None:
    """The fused form: what is quantized how, in which groups; no forbidden pattern."""
    code, found = looked_at(command, run_copy / "model.w4a8.onnx")
    assert code == ExitCode.OK
    fused = [row for row in rows_of(found, "quantized") if row[0].startswith("FptqW4A8Gemm")]
    assert sum(row[-1] for row in fused) == 14
    assert {row[1] for row in fused} == {4}
    assert {row[2] for row in fused} == {"groups of 64", "groups of 128"}
    assert ["MatMul", 16, "none", "float", 1] in rows_of(found, "quantized")
    assert "forbidden" not in [section["name"] for section in found["sections"]]


def test_forbidden_pattern_is_named_by_node(run_copy: Path, command: Command) -> None:
    """The Q/DQ form, which is not for TensorRT: every MatMul that it would build wrongly, and exit code 4."""
    code, found = looked_at(command, run_copy / "model.qdq.onnx")
    assert code == ExitCode.PRECISION_PROOF
    assert len(found["precision_problems"]) == 14
    assert found["precision_problems"][0].startswith("model.layers.0.self_attn.q_proj/MatMul: ")
    places = dict(rows_of(found, "qdq"))
    assert places["DequantizeLinear of weights"] == 14
    assert places["QuantizeLinear of activations"] == places["DequantizeLinear of activations"]


def test_policy_is_explained(run_copy: Path, command: Command) -> None:
    """Tiers, bits, and the layer that stays in float with its reason."""
    code, found = looked_at(command, run_copy / "policy.json")
    assert code == ExitCode.OK
    assert sum(row[1] for row in rows_of(found, "runs")) == 15
    assert [row[0] for row in rows_of(found, "float")] == ["lm_head"]
    assert rows_of(found, "float")[0][1]


def test_engine_of_another_policy_is_named_by_layer(engine: Path, run_copy: Path, command: Command) -> None:
    """A policy that was edited after the build: each layer that the engine runs otherwise, and exit code 4."""
    path = run_copy / "policy.json"
    policy = json.loads(path.read_text())
    layer = policy["layers"]["model.layers.0.mlp.down_proj"]
    layer.update(precision="float", activation=None, activation_scale=None, group_size=None, weight_method=None)
    path.write_text(json.dumps(policy))
    code, found = looked_at(command, engine)
    assert code == ExitCode.PRECISION_PROOF
    (problem,) = found["precision_problems"]
    assert problem.startswith("model.layers.0.mlp.down_proj: the policy says float, the engine was built for w4a8")
    assert any("policy.json: has changed since the engine was built" in text for text in found["file_problems"])


def test_log_that_contradicts_the_proof_is_named(engine: Path, run_copy: Path, command: Command) -> None:
    """A proof that says more than the builder's log shows is no proof: the linear is named."""
    path = run_copy / "build.log"
    path.write_text(path.read_text().replace("down_proj/MatMul", "other/MatMul").replace("down_proj/Deq", "other/Deq"))
    code, found = looked_at(command, engine)
    assert code == ExitCode.PRECISION_PROOF
    assert any(text.startswith("build.log: ") and "down_proj" in text for text in found["precision_problems"])


def test_changed_engine_and_tampered_manifest_are_named(engine: Path, run_copy: Path, command: Command) -> None:
    """Bytes that changed, and a hash that was edited, are found in the run and at the engine."""
    content = bytearray(engine.read_bytes())
    content[-1] ^= 1
    engine.write_bytes(content)
    code, found = looked_at(command, engine)
    assert code == ExitCode.USER_ERROR
    assert any("is not the engine that" in text for text in found["file_problems"])
    path = run_copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["stages"]["policy"]["outputs"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    code, found = looked_at(command, run_copy)
    assert code == ExitCode.USER_ERROR
    assert any("policy.json: has changed since" in text for text in found["file_problems"])


def test_what_cannot_be_inspected_is_refused(run_copy: Path, tmp_path: Path, command: Command) -> None:
    """One sentence that says what the file is, and exit code 1."""
    (tmp_path / "text.plan").write_text("<html>not found</html> and so on, to the end")
    for path, cause in ((tmp_path / "text.plan", "HTML"), (tmp_path, "is not a run"), (tmp_path / "no", "no such")):
        outcome = command("inspect", path)
        assert outcome.code == ExitCode.USER_ERROR
        assert cause in outcome.err
    alone = command("inspect")
    assert (alone.code, "FILE: is missing" in alone.err) == (ExitCode.USER_ERROR, True)
