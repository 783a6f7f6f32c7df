"""Equalizers on the whole road: what is chosen, stored, reused and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fptq_export.policy import read_policy
from tests.pipeline.conftest import SMALL, Command
from tests.support.quantized import write_quantized

SHORT = (*SMALL, "--no-verify")


def test_awq_under_gptq_and_then_the_search(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """`gptq+awq` is awq at every site under GPTQ; another equalizer reuses the statistics and is in the summary."""
    policy = run_copy / "policy.json"
    outcome = command(tiny_llama_dir, "-o", run_copy, "--weight-method", "gptq+awq", *SHORT)
    assert outcome.code == 0, outcome.err
    first = read_policy(policy)
    assert {layer.weight_method for layer in first.quantized().values()} == {"gptq"}
    assert {entry.method for entry in first.equalization.values()} == {"awq"}
    outcome = command(tiny_llama_dir, "-o", run_copy, "--weight-method", "clip", "--equalizer", "search", *SHORT)
    assert outcome.code == 0, outcome.err
    assert "calibrate: up to date" in outcome.err
    assert {entry.method for entry in read_policy(policy).equalization.values()} == {"search"}
    assert "search" in next(line for line in outcome.out.splitlines() if "equalized fold sites" in line)


def test_awq_is_clipped(run_copy: Path, tiny_llama_dir: Path, command: Command) -> None:
    """`awq` alone is the scale search and the clip search, and an edited table of it is replayed."""
    outcome = command(tiny_llama_dir, "-o", run_copy, "--weight-method", "awq", *SHORT)
    assert outcome.code == 0, outcome.err
    policy = read_policy(run_copy / "policy.json")
    assert {layer.weight_method for layer in policy.quantized().values()} == {"clip"}
    document = json.loads((run_copy / "policy.json").read_text())
    site = next(iter(document["equalization"]))
    document["equalization"][site] = {"method": "lae"}
    for layer in document["layers"].values():
        layer["activation_scale"] = None
    (run_copy / "policy.json").write_text(json.dumps(document))
    outcome = command(tiny_llama_dir, "-o", run_copy, "--policy", run_copy / "policy.json", *SHORT)
    assert outcome.code == 0, outcome.err
    assert read_policy(run_copy / "policy.json").equalization[site].method == "lae"


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (("--smoothquant-alpha", "0.8"), "add --equalizer smoothquant"),
        (("--equalizer", "smoothquant", "--smoothquant-alpha", "1.5"), "--smoothquant-alpha"),
        (("--equalizer", "smoothquant", "--smoothquant-alpha", "some"), "--smoothquant-alpha"),
        (("--equalizer", "omniquant"), "--equalizer"),
        (("--weight-method", "gptq+awq", "--equalizer", "search"), "sets --equalizer awq"),
    ],
    ids=["unused alpha", "alpha above 1", "no number", "no equalizer", "two equalizers"],
)
def test_options_that_contradict_are_refused_at_once(
    tmp_path: Path, tiny_llama_dir: Path, command: Command, words: tuple[str, ...], fragment: str
) -> None:
    """Nothing is traced before the error."""
    outcome = command(tiny_llama_dir, "-o", tmp_path / "run", *words, *SHORT)
    assert outcome.code == 1
    assert fragment in outcome.err
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_given_codes_are_not_equalized(tmp_path: Path, tiny_llama_dir: Path, command: Command) -> None:
    """INT4 codes belong to the weight as it is: the equalizer is refused before calibration."""
    checkpoint = write_quantized(tiny_llama_dir, tmp_path / "gptq", "gptq")
    outcome = command(checkpoint.directory, "-o", tmp_path / "run", "--equalizer", "lae", *SHORT)
    assert outcome.code == 1
    assert "would change the INT4 codes" in outcome.err
    assert not (tmp_path / "run" / "stats.safetensors").exists()
