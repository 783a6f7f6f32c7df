"""`fptq-export stats` on a finished run, on a model alone, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from calib.batches import CalibrationOptions, token_batches
from calib.load import checkpoint_from_directory, tokenizer_from_checkpoint
from calib.stats import read_stats
from fptq_export.activations.plot import plot_inputs
from fptq_export.activations.report import ActivationsReport
from fptq_export.files import read_json_model
from tests.pipeline.conftest import Command

PARTS = ("--parts", "2", "--max-range-ratio", "4")
"""Each part is one short window, so their maxima differ more than those of real calibration."""
TEN_TIMES = 10.0
NARROWED = "model.layers.1.self_attn.o_proj"
SCALE_ROUNDING = 2.0**-50
"""Of 127 times a scale that was divided by 127, in float64: a few roundings of 2^-53."""


def report_in(directory: Path) -> ActivationsReport:
    return read_json_model(directory / "stats.json", ActivationsReport)


@pytest.fixture
def calibration_ids(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The windows that the finished run was calibrated on, as token ids."""
    tokenizer = tokenizer_from_checkpoint(checkpoint_from_directory(tiny_llama_dir, "tiny"))
    path = tmp_path / "ids.npz"
    np.savez(path, input_ids=token_batches(CalibrationOptions(size=2, seq=64), tokenizer, 512).tokens)
    return path


def test_text_that_was_calibrated_on_is_covered_to_the_last_bit(
    run_copy: Path, calibration_ids: Path, command: Command
) -> None:
    """Maxima are those of the run's calibration; the same text, held out, reaches every static range and ends there."""
    done = command("stats", run_copy, *PARTS, "--text", calibration_ids, "--eval-seq", "64")
    assert done.code == 0, done.err
    report, stats = report_in(run_copy), read_stats(run_copy / "stats.safetensors")
    paths = [path for figures in report.inputs for path in figures.linears]
    assert sorted(paths) == sorted(stats.channel_absmax)
    for figures in report.inputs:
        assert {stats.absmax(path) for path in figures.linears} == {figures.absmax} == {figures.held_out_absmax}
        if figures.activation == "static":
            assert figures.held_out_ratio is not None
            assert abs(figures.held_out_ratio - 1.0) <= SCALE_ROUNDING
    assert report.suspicious == ()
    assert "warning" not in done.out
    assert (run_copy / "stats.svg").is_file()


def test_static_range_that_is_too_small_is_named(run_copy: Path, calibration_ids: Path, command: Command) -> None:
    """A scale that is ten times too small is named, and no other layer."""
    policy = json.loads((run_copy / "policy.json").read_text(encoding="utf-8"))
    policy["layers"][NARROWED]["activation_scale"] /= TEN_TIMES
    (run_copy / "policy.json").write_text(json.dumps(policy), encoding="utf-8")
    done = command("stats", run_copy, *PARTS, "--text", calibration_ids, "--eval-seq", "64")
    assert done.code == 0, done.err
    (figures,) = report_in(run_copy).suspicious
    assert figures.linears == (NARROWED,)
    assert f"warning: {NARROWED}" in done.out


def test_model_alone_says_what_is_certain_of_it(tiny_bert_dir: Path, tmp_path: Path, command: Command) -> None:
    """An encoder without a run: every linear is measured, and what stays below v0 would be static."""
    small = ("--calib-size", "2", "--calib-seq", "32", "--eval-windows", "2", "--eval-seq", "32", "--no-plot")
    done = command("stats", tiny_bert_dir, "-o", tmp_path / "out", *PARTS, *small, "--layer", "layer\\.0\\..*query$")
    assert done.code == 0, done.err
    report = report_in(tmp_path / "out")
    assert sum(len(figures.linears) for figures in report.inputs) == 12
    assert all(figures.activation == "static" and figures.absmax <= report.v0 for figures in report.inputs)
    assert "layer.0.attention.self.query, key, value" in done.out
    assert "|x| below" in done.out
    assert not (tmp_path / "out" / "stats.svg").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--parts", "3"), "--parts: is 3, and there are 2 calibration windows"),
        (("--parts", "1"), "--parts"),
        ((*PARTS, "--eval-windows", "1", "--layer", "no_such"), "layers look like model.layers.0.self_attn.q_proj"),
        ((*PARTS, "--eval-windows", "1", "--layer", "("), "not a regular expression"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    run_copy: Path, command: Command, words: tuple[str, ...], expected: str
) -> None:
    """The option, the cause and what would fit."""
    done = command("stats", run_copy, *words)
    assert done.code == 1
    assert expected in done.err


def test_source_is_needed(command: Command) -> None:
    """Without a directory there is nothing to look at."""
    done = command("stats")
    assert done.code == 1
    assert "DIR or MODEL" in done.err


def test_picture_is_the_same_for_the_same_report_and_names_its_units(
    run_copy: Path, calibration_ids: Path, command: Command, tmp_path: Path
) -> None:
    """Every axis has a label, every block a tick."""
    command("stats", run_copy, *PARTS, "--text", calibration_ids, "--eval-seq", "64")
    plot_inputs(report_in(run_copy), tmp_path / "again.svg")
    picture = (run_copy / "stats.svg").read_text(encoding="utf-8")
    assert picture == (tmp_path / "again.svg").read_text(encoding="utf-8")
    labels = ("|x|, no unit", "log2 |x|, calibration", "% of values", "x calibrated range", "part of calibration")
    assert all(f"<!-- {label} -->" in picture for label in labels)
