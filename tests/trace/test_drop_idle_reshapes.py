from __future__ import annotations

import onnx_ir as ir
import pytest

from fptq_export.trace.drop_idle_reshapes import drop_idle_reshapes

SHAPES = {
    "tokens of unknown number": ("[n, 4]", "[m, 4]"),
    "all sizes known": ("[2, 3, 4]", "[2, 3, 4]"),
    "rank one": ("[n]", "[m]"),
}
OTHER_SHAPES = {
    "other rank": ("[n, s, 4]", "[m, 4]"),
    "last size unknown too": ("[n, c]", "[m, d]"),
    "last size another": ("[6, 4]", "[3, 8]"),
    "two unknown sizes": ("[n, s, 4]", "[m, t, 4]"),
    "no elements": ("[0, 4]", "[m, 4]"),
}


def graph(before: str, after: str, reader: str = "y = Relu(r)") -> ir.Model:
    """Input x -> Reshape -> r -> Relu -> y."""
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float{before} x, int64[k] shape) => (float[q] y) {{ r = Reshape(x, shape) {reader} }}"""
    )
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    sizes = (part.strip() for part in after.strip("[]").split(","))
    reshape.outputs[0].shape = ir.Shape([int(size) if size.isdigit() else size for size in sizes])
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


@pytest.mark.parametrize("case", SHAPES)
def test_reshape_that_changes_nothing_is_dropped(case: str) -> None:
    """Its readers read what it read."""
    model = graph(*SHAPES[case])
    assert drop_idle_reshapes(model)
    assert operators(model) == ["Relu"]
    (relu,) = model.graph
    assert relu.inputs[0] is model.graph.inputs[0]


@pytest.mark.parametrize("case", OTHER_SHAPES)
def test_reshape_that_may_change_something_is_left_alone(case: str) -> None:
    """Another rank, sizes that are not known to be equal, or none at all."""
    model = graph(*OTHER_SHAPES[case])
    assert not drop_idle_reshapes(model)
    assert operators(model) == ["Reshape", "Relu"]


def test_reshape_that_gives_an_output_is_left_alone() -> None:
    """The output keeps its name and its producer."""
    model = graph("[n, 4]", "[m, 4]", "y = Reshape(r, shape)")
    last = model.graph.node(1)
    last.outputs[0].shape = ir.Shape(["p", 4])
    assert drop_idle_reshapes(model)
    assert operators(model) == ["Reshape"]
    assert model.graph.outputs[0].producer() is last
