"""Quantized checkpoints on the command line: one is written from a run, and one is a MODEL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fptq_export.policy import read_policy
from tests.pipeline.conftest import SMALL, Command
from tests.support.quantized import write_quantized


@pytest.fixture
def written(run_copy: Path, tmp_path: Path, command: Command) -> Path:
    """The checkpoint of the finished run."""
    outcome = command("checkpoint", run_copy, "--checkpoint", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    return tmp_path / "out"


def test_verb_writes_a_checkpoint_with_its_tokenizer(written: Path) -> None:
    """Everything a loader needs lies in the directory."""
    names = {path.name for path in written.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_written_checkpoint_runs_the_whole_road(
    written: Path, run_copy: Path, tmp_path: Path, command: Command
) -> None:
    """It is a MODEL: traced, calibrated, rewritten and verified, with the codes of the first run."""
    outcome = command(written, "-o", tmp_path / "again", "--target", "onnx", *SMALL)
    assert outcome.code == 0, outcome.err
    first, again = (load_file(run / "policy.safetensors") for run in (run_copy, tmp_path / "again"))
    codes = [name for name in first if name.endswith(("weight_codes", "weight_scales"))]
    assert codes
    assert all(np.array_equal(first[name], again[name]) for name in codes)
    before, after = (read_policy(run / "policy.json").quantized() for run in (run_copy, tmp_path / "again"))
    assert {path: layer.activation_scale for path, layer in before.items()} == {
        path: layer.activation_scale for path, layer in after.items()
    }
    assert "up to date" in command(written, "-o", tmp_path / "again", "--target", "onnx", *SMALL).err


def test_gptq_checkpoint_runs_the_whole_road(tiny_llama_dir: Path, tmp_path: Path, command: Command) -> None:
    """MODEL may be a GPTQ checkpoint: the ONNX file verifies against its dequantized weights."""
    checkpoint = write_quantized(tiny_llama_dir, tmp_path / "gptq", "gptq")
    outcome = command(checkpoint.directory, "-o", tmp_path / "run", "--target", "onnx", *SMALL)
    assert outcome.code == 0, outcome.err
    policy = read_policy(tmp_path / "run" / "policy.json")
    assert {layer.weight_method for layer in policy.quantized().values()} == {"given"}
    report = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert report["candidate_perplexity"]["perplexity"] > 0


def test_dry_run_of_a_quantized_model_converts_nothing(tiny_llama_dir: Path, tmp_path: Path, command: Command) -> None:
    """Sizes come from headers."""
    checkpoint = write_quantized(tiny_llama_dir, tmp_path / "gptq", "gptq")
    outcome = command(checkpoint.directory, "-o", tmp_path / "run", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert not (tmp_path / "run").exists()


def to_model(run: Path) -> Path:
    return Path(json.loads((run / "manifest.json").read_text())["options"]["model"])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (lambda run: run, "is the run directory"),
        (to_model, "holds files that are not such a checkpoint"),
        (lambda run: run.parent, "holds files that are not such a checkpoint"),
    ],
    ids=["run", "model", "other"],
)
def test_checkpoint_never_overwrites_something_else(
    run_copy: Path, command: Command, target: Callable[[Path], Path], message: str
) -> None:
    """The model, the run and foreign directories stay as they are."""
    before = sorted(target(run_copy).iterdir())
    outcome = command("checkpoint", run_copy, "--checkpoint", target(run_copy))
    assert outcome.code == 1
    assert message in outcome.err
    assert sorted(target(run_copy).iterdir()) == before


def test_quantized_model_is_never_overwritten(written: Path, tmp_path: Path, command: Command) -> None:
    """A compressed-tensors MODEL is no free place for a checkpoint either."""
    before = (written / "model.safetensors").read_bytes()
    outcome = command(written, "-o", tmp_path / "again", "--checkpoint", written, "--target", "onnx", *SMALL)
    assert outcome.code == 1
    assert "is the model itself" in outcome.err
    assert (written / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--checkpoint is missing"),
        (("--checkpoint", "out", "--checkpoint-format", "dense"), "--checkpoint-format"),
        (("--checkpoint", "out", "--dtype", "bf16"), "would round"),
    ],
)
def test_wrong_options_are_refused(run_copy: Path, command: Command, words: tuple[str, ...], message: str) -> None:
    """Before anything is read or written."""
    outcome = command("checkpoint", run_copy, *words)
    assert outcome.code == 1
    assert message in outcome.err.replace(":", "")
