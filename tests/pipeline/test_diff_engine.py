"""The engine's column of `fptq-export diff`, with a double in TensorRT's place; and when it is left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fptq_export.build.profiles import LlmLimits
from fptq_export.diff.report import DiffReport
from fptq_export.errors import ExitCode
from fptq_export.files import read_json_model
from tests.pipeline.conftest import Command
from tests.runtime import fake_tensorrt

SMALL = ("--eval-windows", "1", "--eval-seq", "80", "--decode-steps", "4")
LIMITS = LlmLimits(max_batch_size=1, max_input_len=80, max_kv_len=160)


def test_engine_has_the_figures_of_its_graph(
    finished_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill, decode and greedy text through the engine's session give every figure of the onnx column."""
    fake_tensorrt.installed(monkeypatch)
    graph = finished_run / "run" / "model.w4a8.onnx"
    plan = fake_tensorrt.plan_of_graph(graph, tmp_path / "out.plan", (LIMITS,))
    words = ("--systems", "onnx,tensorrt", "--engine", plan, "-o", tmp_path, *SMALL)
    outcome = command("diff", finished_run / "run", *words)
    assert outcome.code == ExitCode.OK, outcome.err
    onnx, engine = read_json_model(tmp_path / "diff.json", DiffReport).candidates
    assert engine.system == "tensorrt"
    assert engine.model_dump(exclude={"system", "run"}) == onnx.model_dump(exclude={"system", "run"})


def test_engine_without_logits_of_all_tokens_is_refused(run_copy: Path, command: Command) -> None:
    """Nothing to compare prompts with; the form that has them is named."""
    path = run_copy / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["options"]["logits"] = "last"
    path.write_text(json.dumps(manifest), encoding="utf-8")
    outcome = command("diff", run_copy, "--systems", "tensorrt", *SMALL)
    assert outcome.code == ExitCode.USER_ERROR
    assert "logits of the last token only; the onnx column is the same model" in outcome.err
