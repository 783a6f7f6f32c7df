"""Graphs that users bring: which of their layers are found, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from fptq_export.errors import UserError
from fptq_export.progress import NoProgress
from fptq_export.sites import FoldSite, Sites
from fptq_export.trace import from_onnx
from fptq_export.trace.from_onnx import trace_onnx
from tests.support.onnx_graphs import GraphBuilder, mlp_graph, unet_graph
from tests.support.traced import Traced, run

UPGRADED = 2.0**-20
"""Relative to the largest output: the same float32 operations, which ONNX Runtime may fuse in another way."""
IMAGE: dict[str, list[int | str]] = {"x": [1, 4, 8, 8]}


def traced(proto: onnx.ModelProto, directory: Path, **external: Any) -> tuple[Path, Sites]:
    """Write a user's file and trace it; returns `model.onnx` and its sites."""
    source = directory / "user.onnx"
    onnx.save(proto, str(source), **external)
    model = directory / "model.onnx"
    return model, trace_onnx(source, model, directory / "sites.json", NoProgress())


def one_node(*inputs: str, op_type: str = "MatMul", output: str = "y", **attributes: Any) -> GraphBuilder:
    """A graph with one node."""
    graph = GraphBuilder()
    graph.op(op_type, list(inputs), "node", output, **attributes)
    return graph


def outputs_of(path: Path, *shape: int) -> dict[str, NDArray[np.float32]]:
    """What a graph makes of one random x."""
    return run(path, {"x": np.random.default_rng(3).standard_normal(shape).astype(np.float32)})


def test_linears_and_their_fold_sites_are_found(tmp_path: Path) -> None:
    """MatMul and Gemm become linears named after their weights, with biases, behind a norm and behind a ReLU."""
    _, sites = traced(mlp_graph(), tmp_path)
    assert [(item.path, item.in_features, item.out_features, item.bias) for item in sites.linears] == [
        ("fc1", 64, 128, "fc1.bias"),
        ("fc2", 128, 32, "fc2.bias"),
    ]
    assert {site.id: (site.kind, site.consumers) for site in sites.fold_sites} == {
        "norm": ("norm", ("fc1",)),
        "fc1": ("relu_mlp", ("fc2",)),
    }


def test_convolutions_are_found_beside_linears(tmp_path: Path) -> None:
    """Conv and ConvTranspose with constant weights, with the axis that runs along output channels."""
    _, sites = traced(unet_graph(), tmp_path)
    assert [item.path for item in sites.linears] == ["mix"]
    assert {item.path: (item.weight_shape[item.channel_axis], item.float_reason) for item in sites.convolutions} == {
        "down1": (16, None),
        "down2": (32, None),
        "up1": (16, None),
        "up2": (4, None),
    }


@pytest.mark.parametrize(("graph", "shape"), [(mlp_graph, (5, 64)), (unet_graph, (1, 4, 16, 16))], ids=["mlp", "unet"])
def test_the_prepared_graph_computes_the_same(
    graph: Callable[[], onnx.ModelProto], shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Upgrading, folding and renaming change no number, and the opset is the one of traced models."""
    model, _ = traced(graph(), tmp_path)
    assert onnx.load(model, load_external_data=False).opset_import[0].version == 21
    before, after = (outputs_of(path, *shape)["y"] for path in (tmp_path / "user.onnx", model))
    assert np.abs(after - before).max() <= UPGRADED * np.abs(before).max()


def test_external_weights_are_read_and_stay_external(tmp_path: Path) -> None:
    """The graph file holds no matrix, and the user's files are not touched."""
    model, sites = traced(mlp_graph(), tmp_path, save_as_external_data=True, location="user.data", size_threshold=0)
    (weight,) = (
        item for item in onnx.load(model, load_external_data=False).graph.initializer if item.name == "fc1.weight"
    )
    assert weight.data_location == TensorProto.EXTERNAL
    assert len(sites.linears) == 2
    assert (tmp_path / "user.data").stat().st_size > 4 * 64 * 128


def test_weights_inside_the_file_may_be_put_on_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same files come out, and nothing else stays."""
    expected, _ = traced(mlp_graph(), tmp_path)
    monkeypatch.setattr(from_onnx, "_INLINE_BYTES", 0)
    other = tmp_path / "other"
    other.mkdir()
    model, _ = traced(mlp_graph(), other)
    for name in ("model.onnx", "model.onnx.data"):
        assert model.with_name(name).read_bytes() == expected.with_name(name).read_bytes()
    assert {path.name for path in other.iterdir()} == {"user.onnx", "model.onnx", "model.onnx.data", "sites.json"}


def test_weight_that_constants_give_is_folded(tmp_path: Path) -> None:
    """A weight that is the product of two constants is a constant weight."""
    graph = GraphBuilder()
    scaled = graph.op("Mul", [graph.weight("w", 32, 16), graph.constant("two", np.float32(2))], "scale")
    graph.op("MatMul", ["x", scaled], "fc/MatMul", "y")
    _, sites = traced(graph.model({"x": [3, 32]}, {"y": [3, 16]}), tmp_path)
    assert [item.path for item in sites.linears] == ["fc"]


def test_large_weight_is_transposed_and_not_loaded_for_folding(tmp_path: Path) -> None:
    """A Transpose of a weight above the folding limit becomes the weight as the MatMul reads it, under its name."""
    graph = GraphBuilder()
    graph.op("MatMul", ["x", graph.op("Transpose", [graph.weight("fc.weight", 300, 64)], "t", perm=[1, 0])], "m", "y")
    model, sites = traced(graph.model({"x": [3, 64]}, {"y": [3, 300]}), tmp_path)
    assert [(item.path, item.weight_transposed) for item in sites.linears] == [("fc", False)]
    assert [node.op_type for node in onnx.load(model, load_external_data=False).graph.node] == ["MatMul"]


@pytest.mark.parametrize(
    ("name", "scopes", "path"),
    [
        ("/enc/fc/MatMul", "", "enc/fc"),
        ("/enc/fc/MatMul_3", "", "enc/fc"),
        ("node_MatMul_12", "", "node_MatMul_12"),
        ("node_MatMul_12", "['', 'enc.fc', 'linear']", "enc.fc"),
        ("a b[0]/MatMul", "", "a_b_0"),
        ("", "", "node"),
    ],
)
def test_layer_is_named_by_what_is_known_of_it(name: str, scopes: str, path: str, tmp_path: Path) -> None:
    """The module that torch's exporter notes, or the node's name without its operator."""
    graph = GraphBuilder()
    graph.op("MatMul", ["x", graph.weight("val_3", 32, 16)], name, "y")
    if scopes:
        graph.nodes[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    _, sites = traced(graph.model({"x": [3, 32]}, {"y": [3, 16]}), tmp_path)
    assert [item.path for item in sites.linears] == [path]


def test_duplicate_node_names_become_unique(tmp_path: Path) -> None:
    """Nodes of one name, or of none, are told apart; so are layers that would have one path."""
    graph = GraphBuilder()
    graph.op("MatMul", ["x", graph.weight("a", 32, 32)], "same/MatMul", "h")
    graph.op("MatMul", ["h", graph.weight("b", 32, 32)], "same/MatMul", "z")
    graph.op("Relu", ["z"], "", "y")
    model, sites = traced(graph.model({"x": [3, 32]}, {"y": [3, 32]}), tmp_path)
    assert [item.path for item in sites.linears] == ["same", "same_1"]
    names = [node.name for node in onnx.load(model, load_external_data=False).graph.node]
    assert len(names) == len(set(names)) == 3
    assert all(names)


def computed_weight() -> onnx.ModelProto:
    """A Conv whose weight is an input of the graph, beside a Conv with a constant one."""
    graph = GraphBuilder()
    graph.op("Conv", [graph.op("Conv", ["x", "w"], "conv"), graph.weight("ok.weight", 2, 4, 1, 1)], "ok", "y")
    return graph.model({**IMAGE, "w": [4, 4, 3, 3]}, {"y": [1, 2, 6, 6]})


def grouped_transpose() -> onnx.ModelProto:
    """A ConvTranspose in two groups: output channels are no axis of its weight."""
    graph = GraphBuilder()
    graph.op("ConvTranspose", ["x", graph.weight("conv.weight", 4, 3, 2, 2)], "conv", "y", group=2)
    return graph.model(IMAGE, {"y": [1, 6, 9, 9]})


@pytest.mark.parametrize(
    ("graph", "fragment"), [(computed_weight, "computed in the graph"), (grouped_transpose, "2 groups")]
)
def test_convolution_that_stays_float_says_why(
    graph: Callable[[], onnx.ModelProto], fragment: str, tmp_path: Path
) -> None:
    """It is listed, with its reason."""
    _, sites = traced(graph(), tmp_path)
    assert fragment in (sites.convolutions[0].float_reason or "")
    assert all(item.float_reason is None for item in sites.convolutions[1:])


def test_product_of_two_tensors_is_no_linear(tmp_path: Path) -> None:
    """Attention scores have no weight: the linear beside them is the only layer, and its norm is no fold site."""
    graph = GraphBuilder()
    h = graph.op("MatMul", ["x", graph.weight("q.weight", 32, 32)], "q")
    graph.op("MatMul", [h, graph.op("Transpose", ["x"], "t", perm=[1, 0])], "scores", "y")
    _, sites = traced(graph.model({"x": [4, 32]}, {"y": [4, 4]}), tmp_path)
    assert [item.path for item in sites.linears] == ["q"]
    assert sites.unmatched == ()


def beside_a_linear(graph: GraphBuilder, **outputs: list[int | str]) -> onnx.ModelProto:
    """Add a linear that can be quantized, so that the graph has one."""
    graph.op("MatMul", ["x", graph.weight("ok.weight", 32, 32)], "ok", "ok_y")
    return graph.model({"x": [32, 32]}, {**outputs, "ok_y": [32, 32]})


def left_weight() -> onnx.ModelProto:
    """W x."""
    graph = one_node("w", "x")
    graph.weight("w", 16, 32)
    return beside_a_linear(graph, y=[16, 32])


def scaled_gemm() -> onnx.ModelProto:
    """0.5 x W."""
    graph = one_node("x", "w", op_type="Gemm", alpha=0.5)
    graph.weight("w", 32, 16)
    return beside_a_linear(graph, y=[32, 16])


def stacked_weight() -> onnx.ModelProto:
    """X times each of three matrices."""
    graph = one_node("x", "w")
    graph.weight("w", 3, 32, 16)
    return beside_a_linear(graph, y=[3, 32, 16])


@pytest.mark.parametrize(
    ("graph", "fragment", "features"),
    [
        (left_weight, "left operand", (32, 16)),
        (scaled_gemm, "scales its operands", (32, 16)),
        (stacked_weight, "[3, 32, 16] is no matrix", (32, 16)),
    ],
)
def test_product_that_stays_float_says_why(
    graph: Callable[[], onnx.ModelProto], fragment: str, features: tuple[int, int], tmp_path: Path
) -> None:
    """It is listed with its reason and its sizes, and its node is as it was."""
    _, sites = traced(graph(), tmp_path)
    (unmatched,) = sites.unmatched
    assert fragment in unmatched.reason
    assert (unmatched.in_features, unmatched.out_features) == features
    assert [item.path for item in sites.linears] == ["ok"]


def test_linears_inside_a_branch_stay_float(tmp_path: Path) -> None:
    """The body of an If is not rewritten; a norm that it reads too is no fold site, a weight that it reads is kept."""
    graph = GraphBuilder()
    norm = graph.op("Mul", ["x", graph.weight("norm.weight", 32)], "norm")
    graph.op("MatMul", [norm, graph.weight("fc.weight", 32, 32)], "fc", "h")
    output = helper.make_tensor_value_info("branch", TensorProto.FLOAT, [4, 32])
    then = helper.make_graph(
        [helper.make_node("MatMul", [norm, "fc.weight"], ["branch"], name="in")], "then", [], [output]
    )
    other = helper.make_graph([helper.make_node("Identity", ["h"], ["branch"], name="id")], "else", [], [output])
    total = graph.op("ReduceSum", ["h"], "total", keepdims=0)
    positive = graph.op("Greater", [total, graph.constant("zero", np.float32(0))], "positive")
    graph.op("If", [positive], "choose", "y", then_branch=then, else_branch=other)
    _, sites = traced(graph.model({"x": [4, 32]}, {"y": [4, 32]}), tmp_path)
    (unmatched,) = sites.unmatched
    assert "inside If node 'choose'" in unmatched.reason
    assert "also read by" in (sites.linear("fc").no_site_reason or "")


def test_random_numbers_are_not_folded(tmp_path: Path) -> None:
    """A node without inputs is not constant when it draws numbers."""
    graph = GraphBuilder()
    noise = graph.op("RandomNormal", [], "noise", shape=[4, 32], dtype=TensorProto.FLOAT)
    graph.op("Add", [graph.op("MatMul", ["x", graph.weight("w", 32, 32)], "fc"), noise], "add", "y")
    model, _ = traced(graph.model({"x": [4, 32]}, {"y": [4, 32]}), tmp_path)
    assert "RandomNormal" in [node.op_type for node in onnx.load(model, load_external_data=False).graph.node]


def test_shared_constant_keeps_its_value_for_every_reader(tmp_path: Path) -> None:
    """Folding casts of shapes does not turn a float constant into an integer under its other readers."""
    graph = GraphBuilder()
    half = graph.constant("half", np.array([0.5], np.float32))
    size = graph.op("Cast", [graph.op("Shape", ["x"], "shape", start=0, end=1)], "float", to=TensorProto.FLOAT)
    halved = graph.op("Cast", [graph.op("Mul", [size, half], "mul")], "int", to=TensorProto.INT64)
    fc = graph.op("MatMul", ["x", graph.weight("w", 32, 32)], "fc")
    first = graph.op(
        "Slice", [fc, graph.constant("start", np.array([0])), halved, graph.constant("axis", np.array([0]))], "slice"
    )
    graph.op("Mul", [first, half], "scale", "y")
    model, _ = traced(graph.model({"x": [4, 32]}, {"y": ["half", 32]}), tmp_path)
    before, after = (outputs_of(path, 4, 32)["y"] for path in (tmp_path / "user.onnx", model))
    assert before.shape == after.shape == (2, 32)
    assert np.abs(after - before).max() <= UPGRADED * np.abs(before).max()


def test_graph_without_layers_is_refused(tmp_path: Path) -> None:
    """There is nothing to quantize, and the error names the file."""
    with pytest.raises(UserError, match=r"user\.onnx: has no MatMul, Gemm or Conv that could be quantized"):
        traced(one_node("x", op_type="Relu").model({"x": [3]}, {"y": [3]}), tmp_path)


@pytest.mark.parametrize("name", ["llama_fp32", "opt_fp32"])
def test_traced_model_as_a_users_graph_gives_the_same_sites(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Discovery by operators finds what discovery by torch modules found: linears, biases, fold sites, reasons."""
    model: Traced = request.getfixturevalue(name)
    sites = trace_onnx(model.model, tmp_path / "model.onnx", tmp_path / "sites.json", NoProgress())

    def known(found: Sites) -> set[tuple[object, ...]]:
        return {(item.path, item.bias, item.in_features, item.out_features, item.site) for item in found.linears}

    def in_any_order(found: Sites) -> set[FoldSite]:
        return {site.model_copy(update={"consumers": tuple(sorted(site.consumers))}) for site in found.fold_sites}

    assert known(sites) == known(model.sites)
    assert in_any_order(sites) == in_any_order(model.sites)


def test_interface_stays(tmp_path: Path) -> None:
    """Names, types and shapes of inputs and outputs, symbols too."""
    model, _ = traced(mlp_graph(), tmp_path)
    graph = ir.load(model).graph
    assert [(value.name, str(value.shape)) for value in (*graph.inputs, *graph.outputs)] == [
        ("x", "[batch,64]"),
        ("y", "[batch,32]"),
    ]
