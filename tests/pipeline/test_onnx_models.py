"""Any ONNX graph on the whole road: the same policy, rewrites and proofs, with its own data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from fptq_export.build.layer_list import layers_from_log
from fptq_export.cli import main
from fptq_export.files import read_json_model
from fptq_export.numerics import equalization_from_absmax, quantize_weight_rtn, weight_scale_rtn
from fptq_export.package.manifest import Manifest
from fptq_export.packing import int4_from_packed
from fptq_export.policy import PolicyArrays, read_policy
from fptq_export.sites import read_sites
from fptq_export.verify.graph_report import GraphReport
from tests.pipeline.conftest import Command, Outcome
from tests.support.onnx_graphs import GraphBuilder, mlp_graph, save_inputs, unet_graph
from tests.support.traced import run

ONNX_FILES = {
    *("manifest.json", "model.onnx", "model.onnx.data", "model.qdq.onnx", "model.w4a8.onnx", "model.w4a8.onnx.data"),
    *("policy.json", "policy.safetensors", "sites.json", "stats.safetensors", "verify.json"),
}
NORMALIZED = 2.0**-16
"""A LayerNorm over 64 channels in float32 and in float64, relative; its largest outputs lose the fewest digits."""


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`mlp.onnx`, `mlp.npz`, and `run/` of a finished run without an engine. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("mlp")
    onnx.save(mlp_graph(), str(directory / "mlp.onnx"))
    save_inputs(directory / "mlp.npz", 48, 64)
    words = ["mlp.onnx", "--calib-data", "mlp.npz", "-o", "run"]
    assert main([str(directory / word) if not word.startswith("-") else word for word in words]) == 0
    return directory


@pytest.fixture
def mlp_copy(mlp: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(mlp, tmp_path / "copy"))


def run_in(directory: Path, command: Command, *words: object, model: str = "mlp.onnx") -> Outcome:
    """The command on a model of a directory, with its run directory there."""
    return command(directory / model, "-o", directory / "run", *words)


def assert_refused(outcome: Outcome, *fragments: str) -> None:
    """Exit code 1, one error with a next step, every fragment in it, no traceback."""
    assert outcome.code == 1, outcome.err
    assert outcome.err.count("error: ") == 1
    assert "->" in outcome.err
    for fragment in fragments:
        assert fragment in outcome.err, outcome.err


def test_run_leaves_the_files_of_every_run(mlp: Path) -> None:
    """What other verbs and tools read is there under the names they know, and nothing of a tokenizer."""
    assert {path.name for path in (mlp / "run").iterdir() if path.name != ".lock"} == ONNX_FILES


def test_measured_maxima_and_tiers_are_those_of_the_rule(mlp: Path) -> None:
    """The norm's outliers lie between v0 and v1: equalized at the norm; the hidden layer is static."""
    policy, arrays = read_policy(mlp / "run" / "policy.json"), PolicyArrays(mlp / "run" / "policy.safetensors")
    assert {path: layer.activation for path, layer in policy.layers.items()} == {"fc1": "lae_static", "fc2": "static"}
    x = np.load(mlp / "mlp.npz")["x"].astype(np.float64)
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in mlp_graph().graph.initializer}
    normal = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    expected = np.abs(normal * weights["norm.weight"] + weights["norm.bias"]).max(axis=0)
    measured = arrays.read("fc1.input_absmax")
    assert np.abs(measured - expected).max() <= NORMALIZED * expected.max()
    assert policy.layers["fc1"].input_absmax == measured.max()


@pytest.mark.parametrize("path", ["fc1", "fc2"])
def test_codes_are_those_of_the_contract(mlp: Path, path: str) -> None:
    """Bit for bit, of the equalized weight where the input is equalized."""
    layer = read_policy(mlp / "run" / "policy.json").layers[path]
    arrays = PolicyArrays(mlp / "run" / "policy.safetensors")
    weights = {item.name: onnx.numpy_helper.to_array(item) for item in mlp_graph().graph.initializer}
    weight = weights["fc1.weight"].T if path == "fc1" else weights["fc2.weight"]
    if path == "fc1":
        weight = weight * equalization_from_absmax(arrays.read("fc1.input_absmax")).astype(np.float32)
    assert layer.group_size is not None
    scale = weight_scale_rtn(weight, layer.group_size)
    assert np.array_equal(arrays.read(f"{path}.weight_scales"), scale)
    codes = int4_from_packed(arrays.read(f"{path}.weight_codes"))
    assert np.array_equal(codes, quantize_weight_rtn(weight, scale, layer.group_size))


def test_second_run_does_nothing_and_new_data_calibrates_again(mlp_copy: Path, command: Command) -> None:
    """A stage depends on the content of the files it reads, not on their names."""
    data = ("--calib-data", mlp_copy / "mlp.npz")
    first = run_in(mlp_copy, command, *data)  # at its new place
    assert first.code == 0, first.err
    second = run_in(mlp_copy, command, *data)
    assert second.err.count("up to date") == 7
    assert "output 'y' on mlp.npz: 1 batch: cosine, SQNR" in second.out
    save_inputs(mlp_copy / "mlp.npz", 16, 64, seed=2)
    third = run_in(mlp_copy, command, *data)
    assert "calibrate: up to date" not in third.err
    assert "trace: up to date" in third.err


def test_held_out_data_and_the_gate(mlp_copy: Path, command: Command) -> None:
    """`--eval-data` is compared on, and an output below `--min-cosine` ends with exit code 3."""
    save_inputs(mlp_copy / "other.npz", 8, 64, seed=9)
    data = ("--calib-data", mlp_copy / "mlp.npz", "--eval-data", mlp_copy / "other.npz")
    assert run_in(mlp_copy, command, *data, "--min-cosine", "0.9").code == 0
    report = read_json_model(mlp_copy / "run" / "verify.json", GraphReport)
    assert (report.held_out, report.batches, report.reference) == (True, 1, "mlp.onnx")
    assert report.outputs[0].elements == 8 * 32
    refused = run_in(mlp_copy, command, *data, "--min-cosine", "1")
    assert refused.code == 3
    assert "the limit is 1.0000" in refused.err


def test_error_feedback_uses_the_measured_products(mlp_copy: Path, command: Command) -> None:
    """GPTQ and a searched equalizer read `hessians.safetensors`; the output is nearer than round-to-nearest."""
    before = read_json_model(mlp_copy / "run" / "verify.json", GraphReport).outputs[0].sqnr_db
    methods = ("--weight-method", "gptq", "--equalizer", "search")
    outcome = run_in(mlp_copy, command, "--calib-data", mlp_copy / "mlp.npz", *methods)
    assert outcome.code == 0, outcome.err
    after = read_json_model(mlp_copy / "run" / "verify.json", GraphReport).outputs[0].sqnr_db
    assert before is not None
    assert after is not None
    assert after > before
    assert (mlp_copy / "run" / "hessians.safetensors").is_file()


def test_edited_policy_is_replayed_without_calibration(mlp_copy: Path, command: Command) -> None:
    """A layer that a person set to float is float, and no data is needed."""
    path = mlp_copy / "run" / "policy.json"
    policy = json.loads(path.read_text())
    entry = policy["layers"]["fc2"]
    entry.update(precision="float", activation=None, activation_scale=None, group_size=None, weight_method=None)
    path.write_text(json.dumps(policy))
    outcome = run_in(mlp_copy, command, "--policy", path, "--no-verify")
    assert outcome.code == 0, outcome.err
    assert read_policy(path).layers["fc2"].precision == "float"
    operators = [node.op_type for node in onnx.load(mlp_copy / "run" / "model.w4a8.onnx").graph.node]
    assert operators.count("MatMul") == 1


def unet_in(directory: Path) -> None:
    """`unet.onnx` and `unet.npz`: two samples for a graph of batch 1."""
    onnx.save(unet_graph(), str(directory / "unet.onnx"))
    save_inputs(directory / "unet.npz", 2, 4, 16, 16)


def test_engine_of_a_unet_runs_what_the_policy_says(tmp_path: Path, command: Command) -> None:
    """INT4 in the MatMul, INT8 in every convolution, also in those that were transposed."""
    unet_in(tmp_path)
    engine = tmp_path / "unet.plan"
    words = ("--calib-data", tmp_path / "unet.npz", "--engine", engine, "--compute-capability", "8.0")
    outcome = run_in(tmp_path, command, *words, "--min-cosine", "0.99", model="unet.onnx")
    assert outcome.code == 0, outcome.err
    build = read_json_model(tmp_path / "run" / "manifest.json", Manifest).stages["build"].summary
    assert (build["quantized_linears"], build["int8_convolutions"]) == (1, 4)
    assert build["float_convolutions"] == []
    assert build["verdicts"] == {"proven": 5}
    layers = {layer.name: layer for layer in layers_from_log(tmp_path / "run" / "build.log")}
    shapes = {"down1": (16, 4, 3, 3), "down2": (32, 16, 3, 3), "up1": (64, 32, 1, 1), "up2": (16, 32, 1, 1)}
    for path, shape in shapes.items():
        (layer,) = (layer for name, layer in layers.items() if name.startswith(f"{path}/Conv"))
        assert [tensor.datatype for tensor in layer.inputs] == ["Int8"]
        assert ("Int8", shape) in [(constant.datatype, constant.dims) for constant in layer.constants]
    assert engine.stat().st_size > 0


def test_convolutions_are_chosen_and_replayed_by_patterns(tmp_path: Path, command: Command) -> None:
    """A pattern keeps one float; a replay that leaves a scale open gets it back; one that cannot run is refused."""
    unet_in(tmp_path)
    words = ("--calib-data", tmp_path / "unet.npz", "--precision", "up2=float", "--target", "onnx")
    outcome = run_in(tmp_path, command, *words, model="unet.onnx")
    assert outcome.code == 0, outcome.err
    assert "1 float, 3 w8a8" in outcome.out
    path = tmp_path / "run" / "policy.json"
    text = path.read_text()
    policy = json.loads(text)
    scale = policy["convolutions"]["down1"]["activation_scale"]
    policy["convolutions"]["down1"]["activation_scale"] = None
    path.write_text(json.dumps(policy))
    assert run_in(tmp_path, command, "--policy", path, "--no-verify", model="unet.onnx").code == 0
    assert read_policy(path).convolutions["down1"].activation_scale == scale
    policy["convolutions"]["down1"]["weight_shape"] = [1, 2]
    policy["convolutions"]["other"] = policy["convolutions"].pop("down2")
    path.write_text(json.dumps(policy))
    outcome = run_in(tmp_path, command, "--policy", path, "--no-verify", model="unet.onnx")
    assert_refused(outcome, "$.convolutions.down1.weight_shape", "missing; every convolution", "$.convolutions.other")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (("--precision", "down=w4a8"), ("down1 is a convolution, and those run w8a8 or float",)),
        (("--exclude", "nothing"), ("matches no linear of the model",)),
    ],
)
def test_pattern_that_cannot_be_is_refused(
    words: tuple[str, ...], fragments: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    """Patterns speak of linears and convolutions alike."""
    unet_in(tmp_path)
    outcome = run_in(tmp_path, command, "--calib-data", tmp_path / "unet.npz", *words, model="unet.onnx")
    assert_refused(outcome, *fragments)


def test_options_without_a_meaning_are_refused_together(mlp: Path, tmp_path: Path, command: Command) -> None:
    """Before anything is read, each with its reason."""
    words = ("--dtype", "fp32", "--rotate", "--calib-seq", "64", "--policy", "auto", "--max-ppl-increase", "3%")
    outcome = command(mlp / "mlp.onnx", "-o", tmp_path / "run", *words)
    reasons = (
        "a graph keeps its own types",
        "graphs are not rotated",
        "all of --calib-data is used",
        "use --min-cosine",
    )
    assert_refused(outcome, "6 problems", "--calib-data", "is missing", "--policy auto", *reasons)


def test_data_for_a_torch_model_is_refused(tiny_llama_dir: Path, mlp: Path, tmp_path: Path, command: Command) -> None:
    """Arrays belong to graphs."""
    outcome = command(tiny_llama_dir, "-o", tmp_path / "run", "--calib-data", mlp / "mlp.npz")
    assert_refused(outcome, "--calib-data", "is for .onnx models and speech; use --calib-dataset")


def shared_weight() -> onnx.ModelProto:
    """A norm with outliers before a linear whose weight a look-up and the body of an If read too."""
    graph = GraphBuilder()
    gain = np.ones(64, np.float32)
    gain[5] = 20.0
    norm = graph.op("LayerNormalization", ["x", graph.constant("gain", gain)], "norm", axis=-1)
    graph.op("MatMul", [norm, graph.weight("fc.weight", 64, 64)], "fc", "y")
    graph.op("Gather", ["fc.weight", graph.op("ArgMax", ["x"], "ids", axis=1, keepdims=0)], "look_up", "rows")
    output = [helper.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, ["batch", 64])]
    bodies = {
        f"{branch}_branch": helper.make_graph(
            [helper.make_node(op, inputs, ["inner"], name=branch)], branch, [], output
        )
        for branch, op, inputs in (("then", "MatMul", ["x", "fc.weight"]), ("else", "Identity", ["x"]))
    }
    total = graph.op("ReduceSum", ["x"], "total", keepdims=0)
    graph.op(
        "If", [graph.op("Less", [total, graph.constant("limit", np.float32(1e6))], "less")], "choose", "z", **bodies
    )
    rows: list[int | str] = ["batch", 64]
    return graph.model({"x": rows}, {"y": rows, "rows": rows, "z": rows})


def test_weight_with_unquantized_readers_is_cloned(tmp_path: Path, command: Command) -> None:
    """Folding and quantizing change the linear alone: look-up and branch give the bits of the user's file."""
    onnx.save(shared_weight(), str(tmp_path / "mlp.onnx"))
    data = save_inputs(tmp_path / "x.npz", 8, 64)
    outcome = run_in(tmp_path, command, "--calib-data", data)
    assert outcome.code == 0, outcome.err
    policy = read_policy(tmp_path / "run" / "policy.json")
    assert {path: layer.activation for path, layer in policy.layers.items()} == {"fc": "lae_static", "then": None}
    assert "inside If node 'choose'" in policy.layers["then"].reason
    feed = {"x": np.load(data)["x"]}
    before, after = (run(path, feed) for path in (tmp_path / "mlp.onnx", tmp_path / "run" / "model.w4a8.onnx"))
    assert all(np.array_equal(before[name], after[name]) for name in ("rows", "z"))
    assert not np.array_equal(before["y"], after["y"])


def custom_operator() -> onnx.ModelProto:
    """An operator that nobody knows."""
    graph = GraphBuilder()
    graph.op("Swish", [graph.op("MatMul", ["x", graph.weight("w", 64, 64)], "fc")], "odd", "y", domain="acme")
    model = graph.model({"x": ["batch", 64]}, {"y": ["batch", 64]})
    model.opset_import.append(helper.make_opsetid("acme", 1))
    return model


def missing_opset() -> onnx.ModelProto:
    """A graph that does not say what its operators mean."""
    model = mlp_graph()
    del model.opset_import[:]
    return model


@pytest.mark.parametrize(
    ("name", "fragments"),
    [
        ("custom operator", ("custom operator acme::Swish", "graph.node 'odd'")),
        ("missing opset", ("mlp.onnx: has operators of ai.onnx, but opset_import does not give",)),
        ("missing file", ("mlp.onnx: no such file",)),
        ("wrong key", ("the graph has no such input @", "is missing @", "the graph takes x: float32 [batch, 64]")),
        ("wrong shape", ("dimension 1 is 65, the graph fixes it to 64", "x.npz: x")),
        ("nan", ("has NaN or infinite values", "x.npz: x")),
        ("no layers", ("has no MatMul, Gemm or Conv that could be quantized",)),
    ],
)
def test_bad_input_is_refused_before_calibration(
    name: str, fragments: tuple[str, ...], tmp_path: Path, command: Command
) -> None:
    """One clear error that names the file and the place; nothing is calibrated."""
    graphs = {"custom operator": custom_operator, "missing opset": missing_opset}
    model = graphs.get(name, mlp_graph)()
    if name == "no layers":
        graph = GraphBuilder()
        graph.op("Relu", ["x"], "relu", "y")
        model = graph.model({"x": ["batch", 64]}, {"y": ["batch", 64]})
    if name != "missing file":
        onnx.save(model, str(tmp_path / "mlp.onnx"))
    x = np.ones((4, 65 if name == "wrong shape" else 64), np.float32)
    if name == "nan":
        x[2, 3] = np.nan
    np.savez(tmp_path / "x.npz", allow_pickle=False, **{"z" if name == "wrong key" else "x": x})
    outcome = run_in(tmp_path, command, "--calib-data", tmp_path / "x.npz")
    assert_refused(outcome, *fragments)
    assert not (tmp_path / "run" / "stats.safetensors").exists()


def test_graph_with_duplicate_node_names_is_exported(tmp_path: Path, command: Command) -> None:
    """Nodes are told apart; the policy names both layers."""
    model = mlp_graph()
    for node in model.graph.node:
        node.name = "same"
    for item in model.graph.initializer:
        if item.name == "fc1.weight":
            item.name = "onnx::MatMul_7"
    for node in model.graph.node:
        node.input[:] = ["onnx::MatMul_7" if name == "fc1.weight" else name for name in node.input]
    onnx.save(model, str(tmp_path / "mlp.onnx"))
    save_inputs(tmp_path / "x.npz", 16, 64)
    outcome = run_in(tmp_path, command, "--calib-data", tmp_path / "x.npz")
    assert outcome.code == 0, outcome.err
    assert set(read_policy(tmp_path / "run" / "policy.json").layers) == {"same_1", "fc2"}
    assert len(read_sites(tmp_path / "run" / "sites.json").linears) == 2
