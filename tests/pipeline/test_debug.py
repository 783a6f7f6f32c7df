"""`fptq-export debug`: planted faults are found and their layer is named, healthy runs are called healthy."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.cli import main
from fptq_export.debug.report import DebugReport, Fault
from fptq_export.graph_io import data_path, lazy_tensor, load_graph, save_graph, write_weights
from fptq_export.packing import packed_from_int4
from fptq_export.policy import arrays_path, read_policy
from tests.pipeline.conftest import SMALL, Command
from tests.support.polygraphy import run_polygraphy

RUN = (*SMALL, "--target", "onnx", "--no-verify", "--group-size", "32")
"""Without an engine; several groups a row, so that scales can be shifted."""
QUICK = ("--seq", "64", "--no-leave-one-out")
UP, GATE, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("up", "gate", "down"))
NORM = "model.layers.1.post_attention_layernorm.weight"
INT4_PAIR = 2
KEPT = 0.01
"""Of a KL divergence: a layer is kept in FP32 by one graph and in FP16 by the other, which flips some INT8 codes of the
layers behind it, next to rounding boundaries. Measured: 1e-4."""
SEGMENTS = 1e-5
"""Of a sum of log likelihoods: hidden states are rounded to FP16 between segments, where ONNX Runtime keeps them in
FP32 inside a graph. That is 2^-11 of a logit's spread of some 0.1, of either sign, for each of 63 tokens with 6.3 nats:
2^-11 x 0.1 / 6.3 / 63^0.5 = 1e-6. Measured: 3e-7."""

Array = NDArray[Any]
Change = Callable[[Array], Array]


@pytest.fixture(scope="module")
def equalized_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every fold site equalized by LAE, every input static. Not to be changed: copy it."""
    run = tmp_path_factory.mktemp("equalized") / "run"
    assert main([str(tiny_llama_dir), "-o", str(run), *RUN, "--equalizer", "lae"]) == 0
    logging.disable(logging.NOTSET)
    return run


@pytest.fixture
def broken(equalized_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(equalized_run, tmp_path / "run"))


def diagnose(command: Command, run: Path, *words: object) -> tuple[int, DebugReport, str]:
    """Exit code, report and printed text."""
    done = command("debug", run, *words)
    assert (run / "debug.json").is_file(), done.err
    return done.code, DebugReport.model_validate_json((run / "debug.json").read_text()), done.out


def change(run: Path, name: str, make: Change) -> None:
    """Replace an initializer of the W4A8 graph; `make` gets INT4 codes as int8 [in, out]."""
    path = run / "model.w4a8.onnx"
    model = load_graph(path)
    value = model.graph.initializers[name]
    assert value.const_value is not None
    before = value.const_value.numpy()
    is_int4 = value.dtype == ir.DataType.INT4
    after = make(before.astype(np.int8) if is_int4 else before.copy())
    assert after.shape == before.shape
    assert not np.array_equal(after, before), "the fault changes nothing"
    stored = packed_from_int4(after.reshape(-1)) if is_int4 else after.astype(before.dtype)
    value.const_value = lazy_tensor(name, value.const_value.dtype, before.shape, lambda: stored)
    write_weights(model, data_path(path))
    save_graph(model, path)


def array_of(run: Path, name: str) -> Array:
    """An array of the run's policy."""
    from fptq_export.policy import PolicyArrays

    return PolicyArrays(arrays_path(run / "policy.json")).read(name)


def site_scale(run: Path, path: str) -> Array:
    """The equalization scale of a linear's input."""
    site = read_policy(run / "policy.json").layers[path].site
    return array_of(run, f"{site}.equalization")


def faults(report: DebugReport, path: str, kind: str) -> list[Fault]:
    """Faults of a layer, of one kind."""
    return [fault for fault in report.layers[path].faults if fault.kind == kind]


def assert_only(code: int, report: DebugReport, out: str, path: str) -> None:
    """The layer is named, alone, and the exit code says so."""
    assert code == 3
    assert report.bad_layers == (path,), {name: report.layers[name].faults for name in report.bad_layers}
    assert f"first bad layer: {path} (1 bad)" in out


HEALTHY = {
    "gptq-search-signed": ("--weight-method", "gptq", "--equalizer", "search", "--signed-scales", "--plugin", "on"),
    "per-token-int8-cache": ("--v0", "0", "--v1", "0", "--kv-cache", "static", "--kv-dtype", "int8"),
    "mixed-last-token": ("--precision", "down_proj$=w8a8", "q_proj$=w4a16", "--exclude", "", "--logits", "last"),
}


@pytest.mark.parametrize("options", HEALTHY.values(), ids=HEALTHY.keys())
def test_healthy_run_is_reported_healthy(
    tiny_llama_dir: Path, tmp_path: Path, command: Command, options: tuple[str, ...]
) -> None:
    """No false alarm, whatever method, equalizer, activation, precision and form of the graph."""
    done = command(tiny_llama_dir, "-o", tmp_path / "run", *RUN, *options)
    assert done.code == 0, done.err
    code, report, out = diagnose(command, tmp_path / "run", *QUICK)
    assert {name: report.layers[name].faults for name in report.bad_layers} == {}
    assert code == 0
    assert f"healthy: {len(report.layers)} layers, none bad" in out


def test_healthy_default_and_equalized_runs(
    finished_run: Path, equalized_run: Path, tmp_path: Path, command: Command
) -> None:
    """Round-to-nearest with the paper's rule, and LAE at every site, give no false alarm."""
    for source in (finished_run / "run", equalized_run):
        run = Path(shutil.copytree(source, tmp_path / source.parent.name))
        code, report, _ = diagnose(command, run, *QUICK)
        assert {name: report.layers[name].faults for name in report.bad_layers} == {}
        assert code == 0


def test_scale_missing_in_one_consumer_is_a_wrong_fold(broken: Path, command: Command) -> None:
    """Codes of the weight without the scale that its norm is divided by: the consumer is named, its peers are not."""
    scale = site_scale(broken, UP)
    codes, scales = array_of(broken, f"{UP}.weight_codes"), array_of(broken, f"{UP}.weight_scales")
    weight = numbers(codes, scales) / scale
    groups = weight.reshape(len(weight), -1, 32)
    steps = (np.abs(groups).max(axis=2, keepdims=True) / 7).astype(np.float16)
    unfolded = np.clip(np.rint(groups / steps), -8, 7).reshape(weight.shape)
    change(broken, f"{UP}.weight_codes", lambda _: unfolded.T.astype(np.int8))
    change(broken, f"{UP}.weight_scales", lambda _: steps[..., 0].T)
    code, report, out = diagnose(command, broken, *QUICK)
    assert_only(code, report, out, UP)
    assert [fault.message.split(" of ")[0] for fault in faults(report, UP, "fold")] == ["the weight lacks the scale"]
    assert faults(report, UP, "error")


def test_undivided_norm_is_a_wrong_fold_of_its_first_consumer(broken: Path, command: Command) -> None:
    """The producer keeps its scale: both consumers read a wrong input, and the first bad layer is the first of them."""
    change(broken, NORM, lambda norm: norm * site_scale(broken, UP))
    code, report, _ = diagnose(command, broken, *QUICK)
    assert code == 3
    assert report.bad_layers == (GATE, UP)
    assert "is not divided by the scale" in faults(report, GATE, "fold")[0].message


@pytest.mark.parametrize("axis", [0, 1], ids=["along-input", "along-output"])
def test_swapped_nibbles_are_found(broken: Path, command: Command, axis: int) -> None:
    """The two codes of every byte change places: the layer is named, and what was done to it."""

    def swap(codes: Array) -> Array:
        pairs = np.moveaxis(codes, axis, -1).reshape(-1, INT4_PAIR)[:, ::-1]
        shape = np.moveaxis(codes, axis, -1).shape
        return np.moveaxis(pairs.reshape(shape), -1, axis)

    change(broken, f"{DOWN}.weight_codes", swap)
    code, report, out = diagnose(command, broken, *QUICK)
    assert_only(code, report, out, DOWN)
    assert "nibbles" in faults(report, DOWN, "codes")[1].message


def test_one_swapped_byte_is_found(broken: Path, command: Command) -> None:
    """Two codes of 8192 in each other's place: no error shows it, so codes are compared with the policy's."""

    def swap(codes: Array) -> Array:
        different = np.nonzero(codes[:, 0] != codes[:, 1])[0][0]
        codes[different, :INT4_PAIR] = codes[different, :INT4_PAIR][::-1]
        return codes

    change(broken, f"{DOWN}.weight_codes", swap)
    code, report, out = diagnose(command, broken, *QUICK)
    assert_only(code, report, out, DOWN)
    (fault,) = report.layers[DOWN].faults
    assert fault.message.startswith("2 of 8,192 codes are not those of policy.safetensors (first at input ")


def test_group_scales_shifted_by_one_group_are_found(broken: Path, command: Command) -> None:
    """Every group has its neighbour's scale: the layer is named, and the shift."""
    change(broken, f"{DOWN}.weight_scales", lambda scales: np.roll(scales, 1, axis=0))
    code, report, out = diagnose(command, broken, *QUICK)
    assert_only(code, report, out, DOWN)
    assert faults(report, DOWN, "group_scales")[1].message == "each group has the scale of the previous one"


@pytest.mark.parametrize("factor", [0.1, 10.0], ids=["too-small", "too-large"])
def test_static_scale_ten_times_off_is_found(broken: Path, command: Command, factor: float) -> None:
    """Also where policy.json says the same wrong number: inputs saturate, or use a tenth of the range."""
    change(broken, f"{DOWN}.activation_scale", lambda scale: scale * np.float32(factor))
    policy = json.loads((broken / "policy.json").read_text())
    wrong = np.float32(policy["layers"][DOWN]["activation_scale"]) * np.float32(factor)
    policy["layers"][DOWN]["activation_scale"] = float(wrong)
    (broken / "policy.json").write_text(json.dumps(policy))
    code, report, out = diagnose(command, broken, *QUICK)
    assert_only(code, report, out, DOWN)
    (fault,) = faults(report, DOWN, "activation_scale")
    assert ("saturate" in fault.message) == (factor < 1)
    assert report.changed_files == ("policy.json", "model.w4a8.onnx")


def test_fp16_overflow_is_found(tiny_llama_dir: Path, tmp_path: Path, command: Command) -> None:
    """A product that FP32 holds and FP16 does not: the layer that reads it is named, and none behind it."""
    from safetensors.numpy import load_file, save_file

    model = Path(shutil.copytree(tiny_llama_dir, tmp_path / "hot"))
    tensors = load_file(model / "model.safetensors")
    tensors[f"{UP}.weight"] *= np.float32(3e4)
    tensors[f"{GATE}.weight"] *= np.float32(3e2)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    done = command(model, "-o", tmp_path / "run", *RUN)
    assert done.code == 0, done.err
    code, report, out = diagnose(command, tmp_path / "run", *QUICK)
    assert_only(code, report, out, DOWN)
    (fault,) = faults(report, DOWN, "overflow")
    assert "in FP32, and FLOAT16 ends at 65,504" in fault.message


def test_layer_in_float_is_that_of_a_run_that_excludes_it(
    tiny_llama_dir: Path, broken: Path, tmp_path: Path, command: Command
) -> None:
    """Leave-one-out: a broken layer gains most by far, and without it the graph is as close as one that excludes it."""
    change(broken, f"{GATE}.weight_scales", lambda scales: scales * np.float16(-3))
    _, report, _ = diagnose(command, broken, "--seq", "64")
    gains = {path: layer.leave_one_out.kl_gain or 0.0 for path, layer in report.layers.items() if layer.leave_one_out}
    assert list(gains) == list(report.layers)
    assert max(gains, key=gains.__getitem__) == GATE
    words = (*RUN, "--equalizer", "lae", "--exclude", "lm_head", GATE)
    assert command(tiny_llama_dir, "-o", tmp_path / "without", *words).code == 0
    _, without, _ = diagnose(command, tmp_path / "without", *QUICK)
    assert report.graph_kl is not None
    assert gains[GATE] > report.graph_kl / 2
    assert without.graph_kl == pytest.approx(report.graph_kl - gains[GATE], rel=KEPT, abs=0)


def test_perplexity_is_that_of_the_whole_graph(equalized_run: Path, tmp_path: Path, command: Command) -> None:
    """Segments in a row compute what the file computes as a whole."""
    from fptq_export.debug.opened import open_run
    from fptq_export.debug.options import DebugOptions
    from fptq_export.progress import NoProgress
    from fptq_export.verify.perplexity import nll_from_logits
    from fptq_export.verify.sessions import OnnxCausalSession

    run = Path(shutil.copytree(equalized_run, tmp_path / "run"))
    _, report, _ = diagnose(command, run, *QUICK)
    tokens = open_run(DebugOptions(source=run, seq=64), NoProgress()).batches.tokens
    logits, _ = OnnxCausalSession(run / "model.w4a8.onnx", threads=1).prefill(tokens)
    assert report.graph_perplexity is not None
    whole, count = nll_from_logits(logits, tokens)
    assert report.graph_perplexity.tokens == count
    assert abs(report.graph_perplexity.nll_sum / whole - 1) < SEGMENTS


def test_polygraphy_runs_a_layer_that_was_cut_out(equalized_run: Path, tmp_path: Path, command: Command) -> None:
    """The real Polygraphy reads graph, input and reference output, and finds them close but not equal."""
    done = command("debug", equalized_run, "-o", tmp_path, "--cut", DOWN, *QUICK)
    assert done.code == 0, done.err
    words = done.out.split()
    assert words[:2] == ["polygraphy", "run"]
    compared = run_polygraphy(*words[1:], directory=tmp_path)
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "PASSED" in compared.stdout
    assert not (equalized_run / "debug.json").exists()


def numbers(codes: Array, scales: Array) -> Array:
    """Packed INT4 codes and group scales -> float32 [out, in]."""
    from fptq_export.packing import int4_from_packed

    grouped = int4_from_packed(codes).astype(np.float32).reshape(*scales.shape, -1)
    return (grouped * scales[..., None].astype(np.float32)).reshape(len(codes), -1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "DIR: is missing"),
        (("--seq", "1"), "--seq"),
        (("--cut", "model.layers.1.mlp.no_proj"), "is no quantized layer of the run"),
    ],
)
def test_wrong_options_are_refused(equalized_run: Path, command: Command, words: tuple[str, ...], message: str) -> None:
    """Each with its cause, before anything is measured."""
    done = command("debug", *((equalized_run, *words) if words else ()))
    assert done.code == 1
    assert message in done.err
    assert not (equalized_run / "debug.json").exists()


@pytest.mark.parametrize(("option", "value"), [("model", "graph.onnx"), ("dtype", "bf16")])
def test_runs_that_cannot_be_walked_are_refused(broken: Path, command: Command, option: str, value: str) -> None:
    """ONNX graphs have no blocks, and ONNX Runtime no BF16 kernels; another command is offered."""
    manifest = json.loads((broken / "manifest.json").read_text())
    manifest["options"][option] = value
    (broken / "manifest.json").write_text(json.dumps(manifest))
    done = command("debug", broken)
    assert done.code == 1
    assert "fptq-export verify DIR" in done.err


def test_directory_without_a_run_is_refused(tmp_path: Path, command: Command) -> None:
    """A directory that no run wrote is named."""
    done = command("debug", tmp_path)
    assert done.code == 1
    assert "is not a run directory (no manifest.json)" in done.err
