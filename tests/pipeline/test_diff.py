"""`fptq-export diff` on a finished run: candidates side by side, thresholds, the files for other tools, refusals."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import onnx
import pytest

from fptq_export.diff.report import DiffReport
from fptq_export.diff.save_io import ARGUMENTS_FILE, INPUTS_FILE, OUTPUTS_FILE
from fptq_export.errors import ExitCode
from fptq_export.files import read_json_model
from fptq_export.verify.report import VerifyReport
from tests.pipeline.conftest import Command
from tests.support.polygraphy import run_polygraphy

FLOAT64_TOLERANCE = 1000 * 2.0**-53
"""Relative: the same logits, added up in another order by two float64 programs of at most a thousand terms."""
SMALL = ("--eval-windows", "1", "--eval-seq", "80", "--decode-steps", "4")
"""The windows that the finished run was verified on."""
HEAD = 64
LEAST_COSINE = "0.95"
"""INT4 weights leave the tiny model above it; 512 logits drawn on their own have 0, give or take 1 / sqrt(512)."""


@pytest.fixture(scope="module")
def saved(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`diff.json` and `io/` of a diff of the finished run."""
    from fptq_export.cli import main

    output = tmp_path_factory.mktemp("diff")
    words = ["diff", str(finished_run / "run"), "-o", str(output), "--save-io", str(output / "io"), *SMALL]
    assert main(words) == ExitCode.OK
    return output


def report_in(directory: Path) -> DiffReport:
    return read_json_model(directory / "diff.json", DiffReport)


def test_figures_are_those_of_verification(saved: Path, finished_run: Path) -> None:
    """The onnx column has the perplexity, KL and cosine of verify.json, which two models in memory gave."""
    verified = read_json_model(finished_run / "run" / "verify.json", VerifyReport)
    report = report_in(saved)
    assert [found.system for found in report.candidates] == ["fake-quant", "onnx"]
    graph = report.candidates[1]
    assert graph.prefill.candidate_perplexity.nll_sum == pytest.approx(
        verified.candidate_perplexity.nll_sum, rel=FLOAT64_TOLERANCE, abs=0.0
    )
    assert graph.prefill.logits.kl_mean == pytest.approx(verified.logits.kl_mean, rel=FLOAT64_TOLERANCE, abs=0.0)
    assert graph.prefill.logits.top1_agreement == verified.logits.top1_agreement
    assert graph.decode.logits.tokens == 4
    assert "GPU" in report.left_out["tensorrt"]
    assert list(saved.glob(".diff*")) == [], "the reference's logits are removed"


def polygraphy(graph: Path, inputs: Path, outputs: Path) -> subprocess.CompletedProcess[str]:
    """The README's command."""
    compare = ("--compare", "cosine_similarity", "--cosine-similarity-threshold", f"logits:{LEAST_COSINE}")
    return run_polygraphy("run", graph, "--onnxrt", "--load-inputs", inputs, "--load-outputs", outputs, *compare)


def test_polygraphy_accepts_good_outputs_and_refuses_others(saved: Path, finished_run: Path) -> None:
    """Polygraphy's own command runs a decode step with the saved cache; outputs of other tokens fail."""
    graph, step = finished_run / "run" / "model.w4a8.onnx", saved / "io" / "decode"
    done = polygraphy(graph, step / INPUTS_FILE, step / OUTPUTS_FILE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASSED" in done.stdout
    wrong = saved / "wrong.json"
    from fptq_export.verify.polygraphy_diff import save_outputs

    save_outputs(np.random.default_rng(0).normal(size=(1, 1, 512)).astype(np.float16), "wrong", wrong)
    done = polygraphy(graph, step / INPUTS_FILE, wrong)
    assert done.returncode != 0
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(("part", "tokens", "past"), [("prefill", HEAD, 0), ("decode", 1, HEAD)])
def test_trtexec_files_are_raw_tensors_of_the_graph(
    saved: Path, finished_run: Path, part: str, tokens: int, past: int
) -> None:
    """Every input of the graph has a shape, and a file of volume x element size bytes; logits are in their type."""
    graph = onnx.load(str(finished_run / "run" / "model.w4a8.onnx"), load_external_data=False).graph
    sizes = {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).itemsize
        for value in (*graph.input, *graph.output)
    }
    directory = saved / "io" / part
    words = (directory / ARGUMENTS_FILE).read_text(encoding="utf-8").split()
    options = {name: value for name, _, value in (word.partition("=") for word in words)}
    assert list(options) == ["--shapes", "--loadInputs", "--loadRefOutputs"]
    pairs = dict(pair.split(":") for pair in options["--shapes"].split(","))
    shapes = {name: tuple(map(int, text.split("x"))) for name, text in pairs.items()}
    assert set(shapes) == {value.name for value in graph.input}
    assert shapes["input_ids"] == (1, tokens)
    assert shapes["past_key_values.0.key"][2] == past
    files = dict(pair.split(":") for pair in options["--loadInputs"].split(","))
    assert set(files) == {name for name, shape in shapes.items() if np.prod(shape)}
    for name, file in files.items():
        assert (directory / file).stat().st_size == np.prod(shapes[name]) * sizes[name], name
    name, file = options["--loadRefOutputs"].split(":")
    assert (name, (directory / file).stat().st_size) == ("logits", tokens * 512 * sizes["logits"])


def test_saved_tokens_are_the_texts(saved: Path) -> None:
    """The binary ids of the decode step are the token behind the head: the two folders hold one text."""
    ids, position = (
        np.fromfile(saved / "io" / "decode" / f"{name}.bin", np.int64) for name in ("input_ids", "position_ids")
    )
    assert position.tolist() == [HEAD]
    assert np.fromfile(saved / "io" / "prefill" / "position_ids.bin", np.int64).tolist() == list(range(HEAD))
    assert 0 <= ids[0] < 512


def test_threshold_ends_with_the_gates_code_and_keeps_the_report(run_copy: Path, command: Command) -> None:
    """A limit that no quantized model meets: exit code 3, the sentence, the table and diff.json."""
    done = command("diff", run_copy, *SMALL, "--systems", "onnx", "--min-cosine", "1", "--reference", "fp16")
    assert done.code == ExitCode.ACCURACY_GATE
    assert re.search(r"onnx: mean cosine of prefill is 0\.\d+; --min-cosine asks for 1", done.err)
    assert "top-5 agreement" in done.out
    assert report_in(run_copy).reference.runs == "torch, FP16"


@pytest.mark.parametrize(
    "form",
    [("--logits", "last"), ("--kv-cache", "static"), ("--kv-dtype", "int8")],
    ids=["last", "static", "int8"],
)
def test_other_graph_forms_are_compared_too(run_copy: Path, command: Command, form: tuple[str, str]) -> None:
    """Last-token, static-cache and INT8-cache graphs have every row of logits and carry their cache."""
    assert command("rewrite", run_copy, *form).code == 0
    done = command("diff", run_copy, *SMALL, "--systems", "onnx", "--min-cosine", LEAST_COSINE, "--save-io", run_copy)
    assert done.code == 0, done.err
    assert report_in(run_copy).candidates[0].prefill.logits.tokens == 80
    rows = 1 if form[1] == "last" else HEAD
    assert (run_copy / "prefill" / "logits.bin").stat().st_size == rows * 512 * np.dtype(np.float16).itemsize


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--systems", "tensorrt"), "--systems tensorrt: "),
        (("--systems", "float"), "--systems"),
        (("--decode-steps", "255"), "give at most 254"),
        (("--text", "missing.txt"), "missing.txt: no such file"),
        (("--max-kl", "-1", "--min-top1", "2"), "2 problems"),
        (("--min-kosine", "1"), "did you mean --min-cosine"),
    ],
)
def test_mistakes_are_named(
    finished_run: Path, tmp_path: Path, command: Command, words: tuple[str, ...], message: str
) -> None:
    """Each mistake ends with exit code 1 and its cause before a model runs."""
    done = command("diff", finished_run / "run", "-o", tmp_path, *words)
    assert done.code == ExitCode.USER_ERROR
    assert message in done.err
    assert not (tmp_path / "diff.json").exists()


def test_directory_that_is_no_run_is_refused(tiny_llama_dir: Path, command: Command) -> None:
    """A model has nothing to be compared with."""
    done = command("diff", tiny_llama_dir)
    assert done.code == ExitCode.USER_ERROR
    assert "is not a run directory" in done.err
