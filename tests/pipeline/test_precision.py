"""`--precision` and `--range-calibrator` on the whole road."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.conftest import SMALL, Command

MIXED = (r"down_proj$=w8a8", r"self_attn\.[kv]_proj$=w8a8", r"layers\.0\.self_attn=w4a16", r"lm_head=float")


def test_mixed_precisions_run_the_whole_road(
    run_copy: Path, tmp_path: Path, tiny_llama_dir: Path, command: Command
) -> None:
    """The policy says what was asked for, the graph is verified, and the engine holds INT4 and INT8 weights.

    The statistics of the run before are used: the same inputs were measured.
    """
    engine = tmp_path / "out.plan"
    outcome = command(tiny_llama_dir, "-o", run_copy, "--precision", *MIXED, "--engine", engine, *SMALL)
    assert outcome.code == 0, outcome.err
    assert "calibrate: up to date" in outcome.err
    layers = json.loads((run_copy / "policy.json").read_text())["layers"]
    found = {path.removeprefix("model.layers."): layer["precision"] for path, layer in layers.items()}
    assert found == {
        **{f"0.self_attn.{name}_proj": "w4a16" for name in "qkvo"},
        **{f"1.self_attn.{name}_proj": "w8a8" if name in "kv" else "w4a8" for name in "qkvo"},
        **{f"{index}.mlp.{name}_proj": "w4a8" for index in (0, 1) for name in ("gate", "up")},
        **{f"{index}.mlp.down_proj": "w8a8" for index in (0, 1)},
        "lm_head": "float",
    }
    stages = json.loads((run_copy / "manifest.json").read_text())["stages"]
    assert stages["policy"]["summary"]["precisions"] == {"float": 1, "w4a16": 4, "w4a8": 6, "w8a8": 4}
    assert (stages["build"]["summary"]["quantized_linears"], stages["build"]["summary"]["int8_linears"]) == (10, 4)
    assert "verify" in stages
    assert stages["build"]["summary"]["verdicts"] == {"proven": 15}
    assert engine.is_file()
    assert "INT8" in outcome.out


def test_a_layer_that_was_not_measured_is_calibrated(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """The head is excluded by default, so statistics of the run before do not cover it."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--precision", "lm_head=w8a8", *SMALL, "--no-verify")
    assert outcome.code == 0, outcome.err
    assert "calibrate: up to date" not in outcome.err
    head = json.loads((run_copy / "policy.json").read_text())["layers"]["lm_head"]
    assert (head["precision"], head["activation"]) == ("w8a8", "static")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--precision", "fp16"), "the type of what is not quantized is --dtype"),
        (("--precision", "down=w3a8"), "w4a8, w4a16, w8a8, float"),
        (("--precision", "down(=w8a8"), "not a regular expression"),
        (("--precision", "down=w8a8", "--checkpoint", "out"), "--checkpoint"),
        (("--precision", "down=w8a8", "--policy", "policy.json"), "a replayed policy says what each layer runs"),
    ],
)
def test_what_cannot_work_is_refused_first(
    tiny_llama_dir: Path, tmp_path: Path, command: Command, words: tuple[str, ...], message: str
) -> None:
    """Nothing long may start before a mistake in the option is said."""
    outcome = command(tiny_llama_dir, "-o", tmp_path / "run", *words, *SMALL)
    assert outcome.code == 1
    assert message in outcome.err.replace("\n", " ")
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_pattern_that_matches_nothing_is_refused(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """A typo must not leave a layer in another precision; the names of the model's linears are known after trace."""
    before = (run_copy / "policy.json").read_bytes()
    outcome = command(tiny_llama_dir, "-o", run_copy, "--precision", "dwn_proj=w8a8", *SMALL)
    assert outcome.code == 1
    assert "matches no linear of the model" in outcome.err
    assert (run_copy / "policy.json").read_bytes() == before


def test_range_calibrators_measure_once(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """Histograms need another calibration; a second calibrator uses what the first one measured."""
    words = (tiny_llama_dir, "-o", run_copy, *SMALL, "--no-verify")
    for name, measured in (("entropy", False), ("percentile", True)):
        outcome = command(*words, "--range-calibrator", name)
        assert outcome.code == 0, outcome.err
        assert ("calibrate: up to date" in outcome.err) is measured
        layers = json.loads((run_copy / "policy.json").read_text())["layers"]
        reasons = [layer["reason"] for layer in layers.values() if layer["activation"] == "static"]
        assert reasons
        assert all(f"by {name}" in reason for reason in reasons)
