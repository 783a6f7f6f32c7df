"""Quantizing block by block, on the whole road."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pipeline.conftest import SMALL, Command

GPTQ = ("--weight-method", "gptq", *SMALL, "--no-verify")


def test_options_run_the_policy_stage_again_and_nothing_before(
    run_copy: Path, tiny_llama_dir: Path, command: Command
) -> None:
    """On, learned, and off again: what was measured is used again, and off gives the bytes of before."""

    def codes(*words: object) -> tuple[bytes, bytes]:
        outcome = command(tiny_llama_dir, "-o", run_copy, *GPTQ, *words)
        assert outcome.code == 0, outcome.err
        stages = [line.split(":")[0] for line in outcome.err.splitlines() if "up to date" in line]
        assert words == () or "calibrate" in stages
        assert "policy" not in stages
        return (run_copy / "policy.json").read_bytes(), (run_copy / "policy.safetensors").read_bytes()

    plain = codes()
    assert b"sequential" not in plain[0]
    sequential = codes("--sequential")
    learned = codes("--reconstruct-blocks", 8, "--max-memory", "10KB")
    assert len({plain[0], sequential[0], learned[0]}) == 3
    assert codes("--no-sequential", "--reconstruct-blocks", 0) == plain
    assert codes("--reconstruct-blocks", 8) == learned
    layers = json.loads(learned[0])["layers"].values()
    assert {layer["sequential"]["reconstruction_steps"] for layer in layers if layer["precision"] == "w4a8"} == {8}
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", run_copy / "policy.json", *SMALL, "--no-verify")
    assert outcome.code == 0, outcome.err
    assert ((run_copy / "policy.json").read_bytes(), (run_copy / "policy.safetensors").read_bytes()) == learned
    assert not (run_copy / "block-state").exists()


@pytest.mark.parametrize(
    ("words", "option", "cause"),
    [
        (("--sequential",), "--sequential", "rtn does not look at inputs"),
        (("--sequential", "--weight-method", "gptq", "--policy", "auto"), "--sequential", "--policy auto"),
        (("--reconstruct-blocks", "4", "--policy", "auto"), "--reconstruct-blocks", "--policy auto"),
        (("--sequential", "--policy", "POLICY"), "--sequential", "calibration text"),
        (("--reconstruct-blocks", "4", "--policy", "POLICY"), "--reconstruct-blocks", "calibration text"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    run_copy: Path, tiny_llama_dir: Path, command: Command, words: tuple[str, ...], option: str, cause: str
) -> None:
    """Nothing is run, and what was there stays."""
    before = (run_copy / "policy.safetensors").read_bytes()
    given = [run_copy / "policy.json" if word == "POLICY" else word for word in words]
    outcome = command(tiny_llama_dir, "-o", run_copy, *SMALL, "--no-verify", *given)
    assert outcome.code == 1
    assert option in outcome.err
    assert cause in outcome.err
    assert (run_copy / "policy.safetensors").read_bytes() == before
