"""`--policy auto` on the whole road."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.conftest import SMALL, Command

SHORT = (*SMALL, "--no-verify")


def test_auto_runs_from_the_command_line(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """The graph is rewritten as chosen, the report lies beside the policy, and a second run repeats nothing."""
    words = (tiny_llama_dir, "-o", run_copy, "--policy", "auto", "--effective-bits", "4.4", *SHORT)
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    assert "calibrate: up to date" in outcome.err
    assert (run_copy / "pareto.svg").is_file()
    report = json.loads((run_copy / "auto.json").read_text())
    assert report["auto"]["effective_bits"] <= 4.4
    policy = json.loads((run_copy / "policy.json").read_text())
    assert all(layer["candidates"] for layer in policy["layers"].values() if layer["precision"] == "w4a8")
    again = command(*words)
    assert again.code == 0, again.err
    assert "rewrite: up to date" in again.err


def test_chosen_policy_is_replayed(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """What auto wrote is a policy like any other."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", "auto", *SHORT)
    assert outcome.code == 0, outcome.err
    before = (run_copy / "policy.safetensors").read_bytes()
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", run_copy / "policy.json", *SHORT)
    assert outcome.code == 0, outcome.err
    assert (run_copy / "policy.safetensors").read_bytes() == before


def test_edit_of_a_choice_is_told_from_it(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """The reason no longer claims that auto chose what a person set; that of an untouched layer stays."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", "auto", *SHORT)
    assert outcome.code == 0, outcome.err
    policy = json.loads((run_copy / "policy.json").read_text())
    edited, untouched = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"
    before = policy["layers"][edited]
    policy["layers"][edited] = {**before, "group_size": 96 - before["group_size"]}
    (run_copy / "policy.json").write_text(json.dumps(policy))
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", run_copy / "policy.json", *SHORT)
    assert outcome.code == 0, outcome.err
    layers = json.loads((run_copy / "policy.json").read_text())["layers"]
    assert layers[edited]["reason"].startswith("set by hand to ")
    assert layers[untouched]["reason"].startswith("auto chose ")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--effective-bits", "5"], "--effective-bits"),
        (["--max-dynamic-layers", "3"], "--max-dynamic-layers"),
        (["--cost-table", "cost.json"], "--cost-table"),
        (["--policy", "auto", "--cost-table", "absent.json"], "absent.json"),
        (["--policy", "auto", "--effective-bits", "0"], "effective"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, tiny_llama_dir: Path, command: Command, words: list[str], named: str
) -> None:
    """Before anything long starts."""
    outcome = command(tiny_llama_dir, "-o", tmp_path / "run", *words, *SHORT)
    assert outcome.code == 1
    assert named in outcome.err
    assert not (tmp_path / "run" / "model.onnx").exists()
