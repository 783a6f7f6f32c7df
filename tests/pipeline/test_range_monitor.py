"""`--emit-range-outputs` and `fptq-export monitor`: from the graph through ONNX Runtime to the names of layers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from calib.batches import TextOptions, evaluation_batches
from fptq_export.build.layer_list import layers_from_log
from fptq_export.cli import main
from fptq_export.files import read_json_model
from fptq_export.monitor.report import MonitorReport, RowFigures
from fptq_export.package.manifest import Manifest
from fptq_export.verify.report import VerifyReport
from fptq_export.verify.sessions import OnnxCausalSession
from tests.pipeline.conftest import SMALL, Command

RARE = 1
"""A token that no text contains: the end of a sequence."""
CHANNEL = 5


@pytest.fixture(scope="module")
def monitored_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with the range output, of a model whose rare token is large in one channel; `model/` beside it."""
    directory = tmp_path_factory.mktemp("monitored")
    model = shutil.copytree(tiny_llama_dir, directory / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][RARE, CHANNEL] = 50.0
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    words = ("--target", "onnx", "--no-verify", "--emit-range-outputs", *SMALL)
    assert main([str(model), "-o", str(directory / "run"), *words]) == 0
    logging.disable(logging.NOTSET)
    return directory / "run"


def held_out_ids(run: Path) -> NDArray[np.int64]:
    """Tokens of text that calibration did not see, [8, 80]."""
    from transformers import AutoTokenizer

    batches = evaluation_batches(TextOptions("builtin", 8, 80, 0), AutoTokenizer.from_pretrained(run), 512)
    return batches.tokens.astype(np.int64)


def collect(run: Path, ids: NDArray[np.int64], target: Path) -> Path:
    """What the README shows: run the graph, keep one more output."""
    session = ort.InferenceSession(run / "model.w4a8.onnx", providers=["CPUExecutionProvider"])
    feed = OnnxCausalSession(run / "model.w4a8.onnx", threads=1).prefill_feed(ids)
    np.save(target, session.run(["range_monitor"], feed)[0])
    return target


def findings(run: Path) -> dict[str, RowFigures]:
    """Layers with findings, by path."""
    report = read_json_model(run / "monitor.json", MonitorReport)
    return {path: row for row in report.rows if row.findings for path in row.layers}


def test_text_like_that_of_calibration_has_no_finding(monitored_run: Path, tmp_path: Path, command: Command) -> None:
    """Held-out text clips (nearly) nothing, and the exit code is 0."""
    values = collect(monitored_run, held_out_ids(monitored_run), tmp_path / "values.npy")
    outcome = command("monitor", monitored_run, values, "-o", tmp_path)
    assert outcome.code == 0, outcome.out + outcome.err
    report = read_json_model(tmp_path / "monitor.json", MonitorReport)
    assert report.calls == 1
    assert report.hints == ()
    assert max(row.saturation_rate for row in report.rows) < report.max_saturation
    assert not (monitored_run / "monitor.json").exists()


def test_tokens_that_enlarge_a_channel_are_named_by_layer(
    monitored_run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drift: the layers that read the embedding's norm see more than in calibration; the exit code is 3."""
    monkeypatch.setenv("COLUMNS", "200")
    ids = held_out_ids(monitored_run)
    ids[:, ::2] = RARE
    values = collect(monitored_run, ids, tmp_path / "values.npy")
    outcome = command("monitor", monitored_run, values, "--max-drift", "1.5", "-o", tmp_path)
    assert outcome.code == 3, outcome.out + outcome.err
    found = findings(tmp_path)
    first = {f"model.layers.0.self_attn.{name}_proj" for name in "qkv"}
    assert first <= found.keys()
    assert {found[path].findings for path in first} == {("saturates", "drifted")}
    assert "model.layers.0.self_attn.q_proj, k_proj, v_proj" in outcome.out
    assert "--calib-dataset" in outcome.out


def test_a_scale_ten_times_too_small_is_named(monitored_run: Path, tmp_path: Path, command: Command) -> None:
    """On text like that of calibration: this layer alone saturates, and it is said that the scale is at fault."""
    path = "model.layers.1.self_attn.o_proj"
    for name in ("policy.json", "policy.safetensors"):
        shutil.copy(monitored_run / name, tmp_path)
    policy = json.loads((tmp_path / "policy.json").read_text())
    assert policy["layers"][path]["activation"] == "static"
    policy["layers"][path]["activation_scale"] /= 10
    (tmp_path / "policy.json").write_text(json.dumps(policy))
    run = Path(shutil.copytree(monitored_run, tmp_path / "run"))
    words = ("--policy", tmp_path / "policy.json", "--target", "onnx", "--no-verify")
    outcome = command(monitored_run.parent / "model", "-o", run, *words, "--emit-range-outputs")
    assert outcome.code == 0, outcome.err
    values = collect(run, held_out_ids(run), tmp_path / "values.npy")
    outcome = command("monitor", run, values)
    assert outcome.code == 3, outcome.out + outcome.err
    assert findings(run).keys() == {path}
    assert "although calibration saw values as large" in " ".join(outcome.out.split())


def test_a_run_goes_on_with_the_output_and_without_it(run_copy: Path, command: Command) -> None:
    """Verified with the same figures, built with every linear found, listed in the manifest; and dropped again."""
    before = read_json_model(run_copy / "verify.json", VerifyReport)
    linears = read_json_model(run_copy / "manifest.json", Manifest).stages["build"].summary["quantized_linears"]
    words = ("--compute-capability", "8.6", "--max-kv-len", "64", "--max-input-len", "32")
    assert command("rewrite", run_copy, "--emit-range-outputs").code == 0
    for verb in ("verify", "build"):
        outcome = command(verb, run_copy, *words, "--engine", run_copy / "monitored.plan")
        assert outcome.code == 0, outcome.err
    assert read_json_model(run_copy / "verify.json", VerifyReport) == before
    stages = read_json_model(run_copy / "manifest.json", Manifest).stages
    assert "range_outputs.json" in {file.path for file in stages["rewrite"].outputs}
    assert stages["build"].summary["quantized_linears"] == linears
    written = {tensor.name for layer in layers_from_log(run_copy / "build.log") for tensor in layer.outputs}
    assert "range_monitor" in written
    assert command("rewrite", run_copy, "--no-emit-range-outputs").code == 0
    assert not (run_copy / "range_outputs.json").exists()


def test_debug_walks_through_a_monitored_graph(monitored_run: Path, tmp_path: Path, command: Command) -> None:
    """It is cut where one tensor carries everything, and the monitors' rows are not in the way."""
    outcome = command("debug", monitored_run, "-o", tmp_path)
    assert outcome.code == 0, outcome.out + outcome.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "DIR: is missing"),
        (("run",), "VALUES: is missing"),
        (("run", "v.npy", "--max-saturation", "many"), "--max-saturation many"),
        (("run", "v.npy", "--max-drift", "0"), "--max-drift"),
        (("nowhere", "v.npy"), "the graph of this run has no range output"),
    ],
)
def test_wrong_usage_is_told(command: Command, words: tuple[str, ...], message: str) -> None:
    """The option or the file, with exit code 1."""
    outcome = command("monitor", *words)
    assert outcome.code == 1
    assert message in outcome.err
