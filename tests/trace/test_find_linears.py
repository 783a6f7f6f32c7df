from __future__ import annotations

import onnx_ir as ir
import pytest

from fptq_export.trace.find_linears import find_linears, name_linear_nodes, only_reader

SCOPES = "pkg.torch.onnx.name_scopes"
CONSTANTS = (
    "<float[4, 2] W = {1, 1, 1, 1, 1, 1, 1, 1}, float[2, 4] T = {1, 1, 1, 1, 1, 1, 1, 1}, float[2] b = {1, 1},"
    " float[1, 2] row = {1, 1}>"
)


def _model(nodes: str, outputs: str = "y", owner: str = "wrapped.model.fc") -> ir.Model:
    """A graph whose nodes all belong to one module."""
    promised = ", ".join(f"float[B, S, n_{name}] {name}" for name in outputs.split(", "))
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[B, S, 4] x) => ({promised}) {CONSTANTS} {{ {nodes} }}'
    )
    for node in model.graph:
        node.metadata_props[SCOPES] = repr(["", "wrapped", "wrapped.model", owner, f"{node.op_type}_1"])
    return model


def _reason(nodes: str, outputs: str = "y", shape: tuple[int, int] = (4, 2)) -> str:
    found, reasons = find_linears(_model(nodes, outputs), {"model.fc": shape})
    assert found == {}
    return reasons["model.fc"]


def test_linear_is_found_with_weight_and_bias() -> None:
    """MatMul and Add of one module are one linear; the wrapper of the trace is no part of its path."""
    found, reasons = find_linears(_model("m = MatMul(x, W) y = Add(m, b)"), {"model.fc": (4, 2)})
    linear = found["model.fc"]
    assert reasons == {}
    assert (linear.weight.name, linear.input.name, linear.output.name) == ("W", "x", "y")
    assert linear.bias is not None
    assert linear.bias.name == "b"
    assert linear.transpose is None


def test_transposed_weight_is_found_through_its_transpose() -> None:
    """A weight that stays [out, in] is the initializer, not the Transpose's output."""
    found, _ = find_linears(_model("t = Transpose<perm = [1, 0]>(T) y = MatMul(x, t)"), {"model.fc": (4, 2)})
    linear = found["model.fc"]
    assert linear.weight.name == "T"
    assert linear.transpose is not None


def test_nodes_are_named_after_the_module() -> None:
    """MatMul, Add and Transpose carry the torch path."""
    model = _model("t = Transpose<perm = [1, 0]>(T) m = MatMul(x, t) y = Add(m, b)")
    found, _ = find_linears(model, {"model.fc": (4, 2)})
    name_linear_nodes(model, found)
    assert [node.name for node in model.graph] == ["model.fc/Transpose", "model.fc/MatMul", "model.fc/Add"]


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("m = MatMul(x, W) y = Add(m, row)", "y"),
        ("m = MatMul(x, W) y = Add(m, m)", "y"),
        ("m = MatMul(x, W) y = Add(m, b) z = Relu(m)", "y, z"),
        ("m = MatMul(x, W) y = Add(m, b)", "y, m"),
        ("m = MatMul(x, W) y = Mul(m, b)", "y"),
    ],
    ids=["another shape", "no constant", "read before the bias", "given out before the bias", "no Add"],
)
def test_what_is_no_bias_is_left_out(nodes: str, outputs: str) -> None:
    """A linear without a plain bias ends at its MatMul."""
    found, _ = find_linears(_model(nodes, outputs), {"model.fc": (4, 2)})
    assert found["model.fc"].bias is None
    assert found["model.fc"].output is found["model.fc"].matmul.outputs[0]


def test_add_of_another_module_is_no_bias() -> None:
    """A residual scale added by the parent module is not this linear's bias."""
    model = _model("m = MatMul(x, W) y = Add(m, b)")
    list(model.graph)[1].metadata_props[SCOPES] = repr(["", "wrapped", "wrapped.model", "add_1"])
    found, _ = find_linears(model, {"model.fc": (4, 2)})
    assert found["model.fc"].bias is None


def test_path_through_the_first_modules_of_a_list_is_its_own() -> None:
    """The exporter writes `layers[:2]` into the path of a layer that a model reaches so."""
    model = _model("m = MatMul(x, W) y = Add(m, b)")
    for node in model.graph:
        path = "wrapped.layers.slice(None, 2, None).0.fc"
        node.metadata_props[SCOPES] = repr(["", "wrapped", path, node.op_type])
    found, _ = find_linears(model, {"layers.0.fc": (4, 2)})
    assert found["layers.0.fc"].bias is not None


@pytest.mark.parametrize("part", ["slice(1, 2, None)", "slice(None, 2, 2)"])
def test_path_through_other_modules_of_a_list_is_reported(part: str) -> None:
    """Behind `layers[1:]` the numbers are not those of the list: no linear is guessed."""
    model = _model("m = MatMul(x, W) y = Add(m, b)")
    for node in model.graph:
        node.metadata_props[SCOPES] = repr(["", "wrapped", f"wrapped.layers.{part}.0.fc", node.op_type])
    found, reasons = find_linears(model, {"layers.0.fc": (4, 2)})
    assert found == {}
    assert "no MatMul" in reasons["layers.0.fc"]


def test_linear_without_a_node_is_reported() -> None:
    """A module that the traced pass never calls (another expert) keeps its precision and says why."""
    assert "no MatMul" in _reason("y = Relu(x)")


def test_linear_called_twice_is_reported() -> None:
    """A module called twice has two inputs: one scale would not fit both."""
    assert "2 times" in _reason("m = MatMul(x, W) r = Relu(x) z = MatMul(r, W) y = Add(m, z)")


def test_computed_weight_is_reported() -> None:
    """A weight that the graph computes cannot become INT4 codes."""
    assert "not a constant" in _reason("s = Relu(W) y = MatMul(x, s)")


def test_wrong_shape_is_reported() -> None:
    """A constant of another shape is not the module's weight."""
    assert "shape [4, 2]" in _reason("y = MatMul(x, W)", shape=(4, 3))


def test_scaled_gemm_is_reported() -> None:
    """Gemm with alpha is no plain linear, and `expand_gemm` leaves it."""
    assert "Gemm" in _reason("y = Gemm<alpha = 2.0>(x, W, b)")


def test_only_reader() -> None:
    """One use by one node counts; two uses, none, or leaving the graph do not."""
    model = _model("a = Relu(x) c = Add(a, a) d = Relu(c) y = Relu(d) z = Relu(d)", outputs="y, z")
    a, c, d, y, _ = (node.outputs[0] for node in model.graph)
    assert only_reader(c) is d.producer()
    assert only_reader(a) is None
    assert only_reader(d) is None
    assert only_reader(y) is None
