"""`--rotate` on the whole road."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.pipeline.conftest import SMALL, Command


def stages_up_to_date(err: str) -> list[str]:
    return [line.split(":")[0] for line in err.splitlines() if "up to date" in line]


@pytest.fixture(scope="module")
def rotated_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with `--rotate`. Not to be changed: copy it."""
    from fptq_export.cli import main

    run = tmp_path_factory.mktemp("rotated") / "run"
    assert main([str(tiny_llama_dir), "-o", str(run), "--rotate", *SMALL]) == 0
    return run


def test_verification_compares_with_the_model_that_was_given(rotated_run: Path, finished_run: Path) -> None:
    """The FP32 perplexity is that of a run without rotation: an inexact rotation would show in the candidate."""
    rotated, plain = (json.loads((run / "verify.json").read_text()) for run in (rotated_run, finished_run / "run"))
    assert rotated["reference_perplexity"] == plain["reference_perplexity"]
    assert rotated["logits"]["cosine_mean"] > 0.9


def test_codes_are_those_of_the_rotated_weights(rotated_run: Path, finished_run: Path) -> None:
    """The policy belongs to the rotated model; calibration saw its activations."""
    rotated, plain = (load_file(run / "policy.safetensors") for run in (rotated_run, finished_run / "run"))
    assert set(rotated) == set(plain)
    name = "model.layers.0.mlp.up_proj.weight_codes"
    assert (rotated[name] != plain[name]).any()
    record = json.loads((rotated_run / "manifest.json").read_text())["stages"]["rotate"]
    assert (record["summary"]["readers"], record["summary"]["writers"]) == (11, 4)


def test_run_resumes_and_goes_back(rotated_run: Path, tmp_path: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Nothing is rotated again; a damaged weight file is made anew; without the option the original is calibrated."""
    run = Path(shutil.copytree(rotated_run, tmp_path / "run"))
    outcome = command("calibrate", tiny_llama_dir, "-o", run, "--rotate", *SMALL)
    assert outcome.code == 0, outcome.err
    assert stages_up_to_date(outcome.err) == ["load", "rotate", "calibrate", "policy"]
    weights = run / "rotated" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1])
    assert command("calibrate", tiny_llama_dir, "-o", run, "--rotate", *SMALL).code == 0
    assert weights.read_bytes() == before
    outcome = command("calibrate", tiny_llama_dir, "-o", run, "--no-rotate", *SMALL)
    assert outcome.code == 0, outcome.err
    assert stages_up_to_date(outcome.err) == []
    assert "rotate" not in json.loads((run / "manifest.json").read_text())["stages"]


def test_model_that_cannot_be_rotated_is_refused_first(tmp_path: Path, tiny_opt_dir: Path, command: Command) -> None:
    """LayerNorm: the reason comes before any weight is read, and no file of a stage is there."""
    outcome = command(tiny_opt_dir, "-o", tmp_path / "run", "--rotate", *SMALL)
    assert outcome.code == 1
    assert "mean of the channels" in outcome.err
    assert "leave --rotate out" in outcome.err
    assert not (tmp_path / "run" / "rotated").exists()
    assert not (tmp_path / "run" / "model.onnx").exists()
