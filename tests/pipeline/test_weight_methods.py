"""Weight methods that need more than the weight, on the whole road."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.pipeline.conftest import SMALL, Command

SHORT = (*SMALL, "--no-verify")


def stages_up_to_date(err: str) -> list[str]:
    return [line.split(":")[0] for line in err.splitlines() if "up to date" in line]


@pytest.fixture
def gptq_run(run_copy: Path, tiny_llama_dir: Path, command: Command) -> Path:
    outcome = command(tiny_llama_dir, "-o", run_copy, "--weight-method", "gptq", *SHORT)
    assert outcome.code == 0, outcome.err
    # The run before had no Hessians: the model runs again for them.
    assert "calibrate" not in stages_up_to_date(outcome.err)
    return run_copy


def test_gptq_runs_from_the_command_line(gptq_run: Path) -> None:
    """The policy says what was used, and the codes are not those of rounding."""
    policy = json.loads((gptq_run / "policy.json").read_text())
    methods = {layer["weight_method"] for layer in policy["layers"].values() if layer["precision"] == "w4a8"}
    assert methods == {"gptq"}
    assert len(load_file(gptq_run / "hessians.safetensors")) == 8


def test_another_method_reuses_what_was_measured(gptq_run: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Back to rounding and to GPTQ again: calibration is not repeated, and equal options give equal codes."""
    before = (gptq_run / "policy.safetensors").read_bytes()
    for method in ("rtn", "gptq"):
        outcome = command(tiny_llama_dir, "-o", gptq_run, "--weight-method", method, *SHORT)
        assert outcome.code == 0, outcome.err
        assert "calibrate" in stages_up_to_date(outcome.err)
        changed = (gptq_run / "policy.safetensors").read_bytes() != before
        assert changed is (method == "rtn")


def test_edited_policy_is_replayed_with_the_hessians_beside_it(
    gptq_run: Path, tiny_llama_dir: Path, command: Command
) -> None:
    """A replay does not calibrate; it finds the matrices, and says so where they are gone."""
    policy = gptq_run / "policy.json"
    document = json.loads(policy.read_text())
    document["layers"]["model.layers.0.self_attn.q_proj"]["group_size"] = 16
    policy.write_text(json.dumps(document))
    outcome = command(tiny_llama_dir, "-o", gptq_run, "--policy", policy, *SHORT)
    assert outcome.code == 0, outcome.err
    scales = load_file(gptq_run / "policy.safetensors")["model.layers.0.self_attn.q_proj.weight_scales"]
    assert scales.shape == (64, 4)
    (gptq_run / "hessians.safetensors").unlink()
    document["layers"]["model.layers.0.self_attn.q_proj"]["group_size"] = 32
    policy.write_text(json.dumps(document))
    outcome = command(tiny_llama_dir, "-o", gptq_run, "--policy", policy, *SHORT)
    assert outcome.code == 1
    assert "--weight-method gptq" in outcome.err


def test_signed_scales_reach_the_policy(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Without an engine nothing stands against them: ONNX Runtime runs negative scales."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--signed-scales", *SHORT)
    assert outcome.code == 0, outcome.err
    arrays = load_file(run_copy / "policy.safetensors")
    scales = {name: array for name, array in arrays.items() if name.endswith(".weight_scales")}
    assert scales
    assert all((array < 0).any() and (array > 0).any() for array in scales.values())


def test_signed_scales_without_the_plugin_are_refused(tmp_path: Path, tiny_llama_dir: Path, command: Command) -> None:
    """TensorRT's own INT4 layers take positive scales; nothing long may start before that is said."""
    outcome = command(
        tiny_llama_dir, "-o", tmp_path / "run", "--engine", tmp_path / "out.plan", "--signed-scales", *SHORT
    )
    assert outcome.code == 1
    assert "--signed-scales" in outcome.err
    assert "--plugin on" in outcome.err
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_replayed_signed_scales_without_the_plugin_are_refused(
    run_copy: Path, tmp_path: Path, tiny_llama_dir: Path, command: Command
) -> None:
    """A policy file carries them past the option: the layer is named."""
    policy = run_copy / "policy.json"
    document = json.loads(policy.read_text())
    document["layers"]["model.layers.1.mlp.up_proj"]["signed_scales"] = True
    policy.write_text(json.dumps(document))
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", policy, "--engine", tmp_path / "out.plan", *SHORT)
    assert outcome.code == 1
    assert "model.layers.1.mlp.up_proj" in outcome.err
    assert not (tmp_path / "out.plan").exists()
