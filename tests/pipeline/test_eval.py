"""`fptq-export eval`: three systems of a finished run side by side, one model alone, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from calib.fake_quant import apply_policy
from calib.load import checkpoint_from_directory, model_from_checkpoint
from calib.session import TorchCausalSession
from fptq_export.evaluate.report import EvalReport
from fptq_export.evaluate.systems import Source, opened_system
from fptq_export.files import read_json_model
from fptq_export.numerics import INT8_MAX
from fptq_export.package.manifest import read_manifest
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.progress import NoProgress
from fptq_export.rewrite import RewritePaths, rewrite
from fptq_export.verify.report import VerifyReport
from tests.pipeline.conftest import Command
from tests.support.policies import measured_absmax, mixed_tiers, rtn_policy
from tests.support.traced import FP32_LOGITS, Traced

FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: the same logits, added up in another order by two float64 programs of at most a thousand terms."""
SMALL = ("--eval-windows", "1", "--eval-seq", "80")
"""The windows that the finished run was verified on."""
CALIBRATION = ("--calib-size", "2", "--calib-seq", "64")
"""That of the finished run, so that only the policy is made anew."""
TIPPED_CODES = (12 * 2 * INT8_MAX * FP32_LOGITS) ** 0.5
"""How far apart two float32 programs of one policy may be, in units of what quantizing the activations changes: 0.26.
Their activations differ by at most `FP32_LOGITS` of the largest, which is 127 steps; a code is another one with a
probability of at most twice that difference in steps. Rounding to codes adds noise of 1/12 square step to each value, a
tipped code 1 square step to one of many: amplitudes are as the square root of 12 x probability. Measured: 0.02."""
TASKS = Path(__file__).parents[1] / "evaluate" / "tasks"


def report_in(directory: Path) -> EvalReport:
    return read_json_model(directory / "eval.json", EvalReport)


def test_three_systems_agree_with_verification(run_copy: Path, command: Command) -> None:
    """FP32 and ONNX perplexity are those of verify.json; fake quantization is another model, close to the graph."""
    done = command("eval", run_copy, *SMALL)
    assert done.code == 0, done.err
    report, verified = report_in(run_copy), read_json_model(run_copy / "verify.json", VerifyReport)
    assert [record.system for record in report.systems] == ["float", "fake-quant", "onnx"]
    (text,) = report.texts
    figures = {system: figure.nll_sum for system, figure in text.perplexity.items()}
    for system, expected in (("float", verified.reference_perplexity), ("onnx", verified.candidate_perplexity)):
        assert figures[system] == pytest.approx(expected.nll_sum, rel=FLOAT64_TOLERANCE, abs=0.0)  # type: ignore[index]
    assert abs(figures["fake-quant"] - figures["onnx"]) < abs(figures["float"] - figures["onnx"])
    assert "policy.json" in report.systems[1].files
    assert set(report.systems[2].files) == {"model.w4a8.onnx", "model.w4a8.onnx.data"}
    assert all(system in done.out for system in ("float", "fake-quant", "onnx"))


def rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))


def test_fp32_graph_computes_what_fake_quantization_does(llama_fp32: Traced, tmp_path: Path) -> None:
    """Static, equalized and per-token inputs: both systems agree far better than with the same policy's float inputs.

    In FP16 they would not: rounding tips so many codes that most of the activations' rounding errors are drawn anew.
    """
    run, ids = RunDirectory(tmp_path), np.random.default_rng(3).integers(0, 512, 80)
    absmax = measured_absmax(llama_fp32, ids[None])
    policy, arrays = rtn_policy(llama_fp32, run.policy, mixed_tiers(llama_fp32.sites), absmax)
    shutil.copy(llama_fp32.model.with_name("sites.json"), run.sites)
    rewrite(RewritePaths(llama_fp32.model, run.qdq, run.w4a8), llama_fp32.sites, policy, arrays, NoProgress())
    source = Source(checkpoint_from_directory(llama_fp32.checkpoint, "tiny"), 512, run, None)
    with opened_system(source, "fake-quant") as model:
        fake = model.logits(ids)
    with opened_system(source, "onnx") as model:
        graph = model.logits(ids)
    float_inputs = model_from_checkpoint(source.checkpoint, torch.float32)
    apply_policy(float_inputs, policy, load_file(arrays.path), llama_fp32.sites, quantize_activations=False)
    plain, _ = TorchCausalSession(float_inputs, "float inputs").prefill(ids[None])
    assert rms(graph - fake) <= TIPPED_CODES * rms(fake - plain[0])


def test_tasks_run_on_the_chosen_systems(run_copy: Path, tmp_path: Path, command: Command) -> None:
    """Systems run in their own order, tasks without text, and the report goes where -o says."""
    words = ("--systems", "onnx,float", "--text", "", "--task-path", TASKS, "--tasks", "tiny_choice,tiny_rolling")
    done = command("eval", run_copy, *words, "-o", tmp_path / "out", "--limit", "3", "--max-length", "64")
    assert done.code == 0, done.err
    report = report_in(tmp_path / "out")
    assert [record.system for record in report.systems] == ["float", "onnx"]
    assert report.texts == ()
    assert [(task.task, task.documents) for task in report.tasks] == [("tiny_choice", 3), ("tiny_rolling", 3)]
    assert (report.limit, report.max_length) == (3, 64)
    assert not (run_copy / "eval.json").exists()
    perplexity = next(metric for metric in report.tasks[1].metrics if metric.metric == "byte_perplexity").figures
    assert perplexity["float"].value != perplexity["onnx"].value


def test_model_alone_is_its_float_system(tiny_llama_dir: Path, tmp_path: Path, command: Command) -> None:
    """A model that was never quantized has one system; token ids need no tokenizer, and 0 windows means all."""
    ids = tmp_path / "ids.npz"
    np.savez(ids, input_ids=np.random.default_rng(0).integers(0, 512, 100))
    done = command(
        "eval", tiny_llama_dir, "-o", tmp_path / "out", "--text", ids, "--eval-seq", "32", "--eval-windows", "0"
    )
    assert done.code == 0, done.err
    (text,) = report_in(tmp_path / "out").texts
    assert list(text.perplexity) == ["float"]
    assert (text.windows, text.perplexity["float"].tokens) == (3, 93)
    assert "left out" not in done.err


def test_system_whose_files_are_gone_is_left_out_and_said(run_copy: Path, command: Command) -> None:
    """Without being asked for it, a missing graph is named and the others run; asked for, it is an error."""
    (run_copy / "model.w4a8.onnx").unlink()
    done = command("eval", run_copy, *SMALL)
    assert done.code == 0, done.err
    assert "onnx: left out" in done.err
    assert [record.system for record in report_in(run_copy).systems] == ["float", "fake-quant"]
    refused = command("eval", run_copy, "--systems", "onnx", *SMALL)
    assert refused.code == 1
    assert "has no model.w4a8.onnx" in refused.err


def test_edited_policy_is_refused(run_copy: Path, command: Command) -> None:
    """A policy that the graph was not made from would be compared with the wrong graph."""
    policy = run_copy / "policy.json"
    document = json.loads(policy.read_text(encoding="utf-8"))
    document["rule"]["v0"] = 1.0
    policy.write_text(json.dumps(document), encoding="utf-8")
    done = command("eval", run_copy, *SMALL)
    assert done.code == 1
    assert "was changed since the run was made" in done.err
    assert not (run_copy / "eval.json").exists()


def test_graph_of_an_earlier_policy_is_refused(run_copy: Path, command: Command) -> None:
    """A policy that was decided anew and not yet written into the graph is not compared with the old graph."""
    manifest = read_manifest(run_copy)
    assert manifest is not None
    assert command("calibrate", manifest.options.model, "-o", run_copy, "--v0", "1", *CALIBRATION).code == 0
    done = command("eval", run_copy, *SMALL)
    assert done.code == 1
    assert "model.w4a8.onnx: was made from an earlier policy.json" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--systems", "float,fast"), "choose from float, fake-quant, onnx"),
        (("--systems", "fake-quant"), "a model has one system only"),
        (("--text", ""), "there is nothing to measure"),
        (("--text", "random"), "no model predicts random tokens"),
        (("--text", "missing.txt"), "missing.txt: no such file"),
        (("--eval-seq", "1"), "--eval-seq"),
        (("--eval-seq", "99999"), "--text builtin: too short"),
        (("--max-length", "4096"), "the model has 512 positions"),
        (("--windows", "4"), "did you mean --eval-windows"),
        (("--tasks", "tiny_choice", "--task-path", "nowhere"), "--task-path nowhere: no such directory"),
    ],
)
def test_mistakes_are_named(
    tiny_llama_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Command,
    words: tuple[str, ...],
    message: str,
) -> None:
    """Each mistake ends with exit code 1 and its cause before anything runs."""
    monkeypatch.chdir(tmp_path)
    done = command("eval", tiny_llama_dir, "-o", "out", *words)
    assert done.code == 1
    assert message in done.err
    assert not (tmp_path / "out" / "eval.json").exists()


def test_source_is_required(command: Command) -> None:
    """Nothing to evaluate is said with an example."""
    done = command("eval")
    assert done.code == 1
    assert "DIR or MODEL: is missing" in done.err


def test_tasks_without_lm_eval_name_the_extra(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """The optional library is asked for by its extra, before the model is opened."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    done = command("eval", tiny_llama_dir, "-o", tmp_path / "out", "--tasks", "piqa")
    assert done.code == 1
    assert "pip install 'fptq-export[eval]'" in done.err
