"""Equal constants that an exporter merged are taken apart where that lets a norm be equalized, and nowhere else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from fptq_export.trace.clone_shared_vectors import clone_shared_vectors
from tests.support.onnx_graphs import GraphBuilder

NORM = ("norm1", "norm2")


def graph_of(op_type: str, constant: tuple[int, ...], x: tuple[int, ...]) -> ir.Model:
    """Two nodes that read one constant."""
    graph = GraphBuilder()
    weight = graph.constant("w", np.full(constant, 1.5, np.float32))
    h = graph.op(op_type, ["x", weight], NORM[0])
    graph.op(op_type, [h, weight], NORM[1], "y")
    return ir.from_proto(graph.model({"x": list(x)}, {"y": list(x)}, opset=21))


@pytest.mark.parametrize("op_type", ["LayerNormalization", "Mul", "Add"])
@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_each_reader_gets_its_own_vector(op_type: str, shape: tuple[int, ...]) -> None:
    """With the same values; the first keeps the original."""
    model = graph_of(op_type, shape, (4, 8))
    assert clone_shared_vectors(model)
    first, second = (node.inputs[1] for node in model.graph)
    assert first is model.graph.initializers["w"]
    assert second is model.graph.initializers["w.1"]
    before, after = (model.graph.initializers[name].const_value for name in ("w", "w.1"))
    assert before is not None
    assert after is not None
    assert np.array_equal(before.numpy(), after.numpy())
    assert not clone_shared_vectors(model)


@pytest.mark.parametrize(
    ("op_type", "constant", "x"),
    [("MatMul", (8, 8), (4, 8)), ("Mul", (), (4, 8)), ("Mul", (4, 8), (4, 8)), ("Sub", (8,), (4, 8))],
    ids=["matrix", "scalar", "not a vector", "other reader"],
)
def test_other_constants_stay_shared(op_type: str, constant: tuple[int, ...], x: tuple[int, ...]) -> None:
    """A copy of them would bring nothing."""
    model = graph_of(op_type, constant, x)
    assert not clone_shared_vectors(model)
    assert set(model.graph.initializers) == {"w"}


def test_vector_with_one_reader_stays() -> None:
    """There is nothing to take apart."""
    graph = GraphBuilder()
    graph.op("Mul", ["x", graph.weight("w", 8)], "norm", "y")
    model = ir.from_proto(graph.model({"x": [4, 8]}, {"y": [4, 8]}, opset=21))
    assert not clone_shared_vectors(model)
