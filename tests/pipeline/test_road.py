"""The whole road on a tiny model: files, resume, verbs, replay, gates, and a process killed at every rename."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import onnx
import pytest

from fptq_export.files import read_json_model
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.verify.report import VerifyReport
from tests.pipeline.conftest import FILES, SMALL, Command
from tests.support.killed_runs import kill_before_renames

ENGINE = {
    "engine_layers": 1,
    "quantized_linears": 14,
    "unfused": [],
    "plugin_layers": 0,
    "target": "tensorrt-rtx",
    "library_version": "0",
}
RENAMED = (
    "model.onnx.data",
    "model.onnx",
    "sites.json",
    "stats.safetensors",
    "policy.safetensors",
    "policy.json",
    "model.w4a8.onnx.data",
    "model.qdq.onnx",
    "model.w4a8.onnx",
    "verify.json",
    "out.plan",
    "proof.json",
)
"""Every file the road writes, in order."""


def build_stand_in(directory: RunDirectory, engine: Path, *_: object) -> dict[str, Any]:
    """Writes what a build writes, without TensorRT."""
    engine.write_text("engine")
    directory.build_log.write_text("log")
    directory.proof.write_text("{}")
    return ENGINE


def edited_policy(path: Path, **changes: Any) -> dict[str, Any]:
    """The policy with the entries of every `o_proj` changed; written back."""
    policy: dict[str, Any] = json.loads(path.read_text())
    for name, layer in policy["layers"].items():
        if name.endswith("o_proj"):
            layer.update(changes)
    path.write_text(json.dumps(policy))
    return policy


def test_the_road_ends_with_every_file(finished_run: Path) -> None:
    """The run directory holds what the README lists, the engine lies where --engine says, nothing else is left."""
    assert {path.name for path in (finished_run / "run").iterdir()} - {".lock"} == FILES
    assert {path.name for path in finished_run.iterdir()} == {"run", "out.plan"}
    assert (finished_run / "out.plan").stat().st_size > 0


def test_both_graphs_read_one_data_file(finished_run: Path) -> None:
    """The Q/DQ form costs no second copy of the weights."""
    for name in ("model.qdq.onnx", "model.w4a8.onnx"):
        proto = onnx.load(finished_run / "run" / name, load_external_data=False)
        locations = {
            entry.value
            for tensor in proto.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert locations == {"model.w4a8.onnx.data"}


def test_a_second_run_does_nothing(finished_run: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Every stage is up to date and no file changes."""
    run, engine = finished_run / "run", finished_run / "out.plan"
    before = {path: path.stat().st_mtime_ns for path in (*run.iterdir(), engine) if path.name != "manifest.json"}
    outcome = command(tiny_llama_dir, "-o", run, "--engine", engine, *SMALL)
    assert outcome.code == 0
    assert outcome.err.count("up to date") == 8
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_threshold_keeps_trace_and_statistics(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """A change of the rule runs policy and what follows it, not calibration."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--v0", "0.5", *SMALL)
    assert outcome.code == 0
    assert [line.split(":")[0] for line in outcome.err.splitlines() if "up to date" in line] == [
        "load",
        "trace",
        "calibrate",
        "package",
    ]
    assert '"lae_static"' in (run_copy / "policy.json").read_text()


def test_no_keep_removes_the_large_intermediate_files(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """The float graph and the Q/DQ form go; a second run still finds nothing to do."""
    assert command(tiny_llama_dir, "-o", run_copy, "--no-keep", *SMALL).code == 0
    gone = {"model.onnx", "model.onnx.data", "model.qdq.onnx"}
    assert FILES - {path.name for path in run_copy.iterdir()} == gone
    assert command(tiny_llama_dir, "-o", run_copy, "--no-keep", *SMALL).err.count("up to date") == 7


def test_an_edited_policy_is_replayed_without_calibration(
    run_copy: Path, tiny_llama_dir: Path, command: Command
) -> None:
    """Per-token o_proj in the file becomes per-token o_proj in the graph; the statistics are not needed."""
    edited_policy(run_copy / "policy.json", activation="per_token", activation_scale=None)
    (run_copy / "stats.safetensors").unlink()
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", run_copy / "policy.json", *SMALL)
    assert outcome.code == 0, outcome.err
    assert "calibrate" not in outcome.err
    proto = onnx.load(run_copy / "model.w4a8.onnx", load_external_data=False)
    per_token = {node.name for node in proto.graph.node if node.op_type == "FptqW4A8GemmPerToken"}
    assert per_token >= {f"model.layers.{layer}.self_attn.o_proj/FptqW4A8GemmPerToken" for layer in range(2)}


def test_an_edit_that_is_not_replayed_is_not_lost(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Running again without --policy refuses to overwrite the edited file and says how to use it."""
    edited = edited_policy(run_copy / "policy.json", activation="per_token", activation_scale=None)
    outcome = command(tiny_llama_dir, "-o", run_copy, *SMALL)
    assert outcome.code == 1
    assert "--policy" in outcome.err
    assert json.loads((run_copy / "policy.json").read_text()) == edited


def test_rewrite_alone_refuses_an_edited_policy(run_copy: Path, command: Command) -> None:
    """The arrays belong to the policy as it was written: the verb says to replay, and the graph stays as it is."""
    before = (run_copy / "model.w4a8.onnx").read_bytes()
    edited_policy(run_copy / "policy.json", activation="per_token", activation_scale=None)
    outcome = command("rewrite", run_copy)
    assert outcome.code == 1
    assert "--policy" in outcome.err
    assert (run_copy / "model.w4a8.onnx").read_bytes() == before


def test_the_gate_stops_before_the_engine(
    run_copy: Path, tiny_llama_dir: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 % worse passes a limit of 10 %; a limit of 9 % ends with exit code 3, both perplexities and no engine."""
    report = read_json_model(run_copy / "verify.json", VerifyReport)
    reference = report.reference_perplexity.model_copy(update={"perplexity": 10.0})
    worse = report.reference_perplexity.model_copy(update={"perplexity": 11.0})
    planted = report.model_copy(update={"reference_perplexity": reference, "candidate_perplexity": worse})
    monkeypatch.setattr("fptq_export.pipeline.verification.verify", lambda *_, **_options: planted)
    monkeypatch.setattr("fptq_export.pipeline.engine.build", build_stand_in)
    engine = tmp_path / "gated.plan"
    words = (tiny_llama_dir, "-o", run_copy, "--engine", engine, *SMALL, "--decode-steps", "5")
    refused = command(*words, "--max-ppl-increase", "9%")
    assert refused.code == 3
    assert "11" in refused.err
    assert not engine.exists()
    assert command(*words, "--max-ppl-increase", "10%").code == 0
    assert engine.exists()


def test_verbs_build_the_same_road_one_part_at_a_time(
    finished_run: Path, tiny_llama_dir: Path, tmp_path: Path, command: Command
) -> None:
    """trace, calibrate, rewrite, verify, build in turn give the files of one run, byte for byte."""
    run = tmp_path / "run"
    assert command("trace", tiny_llama_dir, "-o", run, *SMALL).code == 0
    assert command("calibrate", tiny_llama_dir, "-o", run, *SMALL).code == 0
    for verb in ("rewrite", "verify"):
        assert command(verb, run).code == 0
    assert command("build", run, "--engine", tmp_path / "out.plan").code == 0
    same = {name for name in FILES if name.startswith(("model", "policy", "sites", "stats"))}
    for name in sorted(same):
        assert (run / name).read_bytes() == (finished_run / "run" / name).read_bytes(), name


def test_a_verb_without_its_input_names_the_file(tmp_path: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Rewrite before calibrate says which file is missing."""
    assert command("trace", tiny_llama_dir, "-o", tmp_path, *SMALL).code == 0
    outcome = command("rewrite", tmp_path)
    assert outcome.code == 1
    assert "policy.json" in outcome.err


def test_target_onnx_needs_no_builder(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """--target onnx ends with the portable graph; an engine with it is refused."""
    assert command(tiny_llama_dir, "-o", run_copy, "--target", "onnx", *SMALL).code == 0
    assert command(tiny_llama_dir, "-o", run_copy, "--target", "onnx", "--engine", "x.plan", *SMALL).code == 1


def test_a_dry_run_writes_nothing(tmp_path: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Sizes and stages are printed; the output directory does not appear."""
    outcome = command(tiny_llama_dir, "-o", tmp_path / "run", "--engine", tmp_path / "out.plan", "--dry-run")
    assert outcome.code == 0
    assert "peak memory" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_two_runs_in_one_directory_are_refused(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """The second run says that another one is working there."""
    from filelock import FileLock

    with FileLock(run_copy / ".lock"):
        outcome = command(tiny_llama_dir, "-o", run_copy, *SMALL)
    assert outcome.code == 1
    assert "another run" in outcome.err


@pytest.mark.slow
def test_a_run_killed_before_any_rename_leaves_nothing_half_written_and_resumes(
    tiny_llama_dir: Path, tmp_path: Path, finished_run: Path, command: Command
) -> None:
    """SIGKILL right before each final name appears: that name stays free, and in the end the run completes."""
    run, engine = tmp_path / "run", tmp_path / "out.plan"
    words = [str(tiny_llama_dir), "-o", str(run), "--engine", str(engine), *SMALL]
    files = [engine if name == engine.name else run / name for name in RENAMED]
    killed = kill_before_renames(tiny_llama_dir, files, words)
    assert dict(zip(RENAMED, killed, strict=True)) == dict.fromkeys(RENAMED, (-signal.SIGKILL, False))
    assert command(*words).code == 0
    assert {path.name for path in run.iterdir()} - {".lock"} == FILES
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
    assert (run / "policy.safetensors").read_bytes() == (finished_run / "run" / "policy.safetensors").read_bytes()
