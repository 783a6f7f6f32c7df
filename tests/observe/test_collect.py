"""Statistics that a graph reduces inside itself are those of its tensors, over all batches and rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph
from fptq_export.observe import collect
from fptq_export.observe.collect import observe_graph
from fptq_export.observe.data import GraphData, data_from_path, inputs_from_graph
from fptq_export.observe.instrument import WatchedTensor
from fptq_export.progress import NoProgress
from fptq_export.verify.graph_session import OnnxGraphSession
from tests.support.onnx_graphs import GraphBuilder

PRODUCTS = 2.0**-18
"""Of a sum of 48 products in float32, in another order, relative to the sum of their magnitudes."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X [batch, 4, 8] -> h = -2 x -> y, and an operator after h that would fail if it ran."""
    builder = GraphBuilder()
    builder.op("Mul", ["x", builder.constant("factor", np.float32(-2))], "scale", "h")
    builder.op("Reshape", ["h", builder.constant("shape", np.array([5, 7]))], "fails", "y")
    path = tmp_path_factory.mktemp("observe") / "model.onnx"
    onnx.save(builder.model({"x": ["batch", 4, 8]}, {"y": [5, 7]}, opset=21), str(path))
    return path


def batches(directory: Path, *values: NDArray[np.float32], model: Path) -> GraphData:
    """Data of one batch an array."""
    for number, array in enumerate(values):
        np.savez(directory / f"{number}.npz", x=array)
    return data_from_path(directory, "--calib-data", inputs_from_graph(load_graph(model)))


@pytest.fixture
def values() -> list[NDArray[np.float32]]:
    """Two batches of different size."""
    random = np.random.default_rng(0)
    return [random.standard_normal((rows, 4, 8)).astype(np.float32) for rows in (2, 4)]


def observed(graph: Path, data: GraphData, *watched: WatchedTensor, **sink: Any) -> dict[str, NDArray[np.float32]]:
    return observe_graph(graph, watched, data, OnnxGraphSession, NoProgress(), **sink)


def test_maxima_are_exact(graph: Path, values: list[NDArray[np.float32]], tmp_path: Path) -> None:
    """By channel and over all of a tensor, bit for bit; what nobody watches is not run."""
    data = batches(tmp_path, *values, model=graph)
    found = observed(graph, data, WatchedTensor("h", 8), WatchedTensor("x", None))
    rows = np.concatenate(values).reshape(-1, 8)
    assert np.array_equal(found["h"], 2 * np.abs(rows).max(axis=0))
    assert np.array_equal(found["x"], np.abs(rows).max(keepdims=True)[0])


def test_mean_products_cover_every_row_of_every_batch(
    graph: Path, values: list[NDArray[np.float32]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x^T x over 24 rows, the same whether tensors share a pass or not."""
    data = batches(tmp_path, *values, model=graph)
    rows = np.concatenate(values).reshape(-1, 8).astype(np.float64)
    for limit in (1 << 20, 1):
        monkeypatch.setattr(collect, "_GRAM_BYTES", limit)
        grams: dict[str, NDArray[np.float32]] = {}
        watched = WatchedTensor("x", 8, gram=True), WatchedTensor("h", 8, gram=True)
        observed(graph, data, *watched, on_gram=grams.__setitem__)
        bound = PRODUCTS * (np.abs(rows).T @ np.abs(rows)) / len(rows)
        assert (np.abs(grams["x"] - rows.T @ rows / len(rows)) <= bound).all()
        assert (np.abs(grams["h"] - 4 * rows.T @ rows / len(rows)) <= 4 * bound).all()


@pytest.mark.parametrize("odd", [3e38, -3e38])
def test_overflow_inside_the_graph_is_refused(odd: float, graph: Path, tmp_path: Path) -> None:
    """A tensor that is infinite for finite inputs is named with the batch."""
    x = np.zeros((1, 4, 8), np.float32)
    x[0, 2, 3] = odd
    data = batches(tmp_path, np.zeros_like(x), x, model=graph)
    with pytest.raises(UserError, match=r"batch 1: tensor 'h' is NaN or infinite"):
        observed(graph, data, WatchedTensor("h", 8))


def test_nan_inside_the_graph_is_refused(tmp_path: Path) -> None:
    """A maximum may hide a NaN; the sum does not."""
    builder = GraphBuilder()
    builder.op("Relu", [builder.op("Sqrt", ["x"], "root", "h")], "relu", "y")
    path = tmp_path / "model.onnx"
    onnx.save(builder.model({"x": [8]}, {"y": [8]}, opset=21), str(path))
    data = tmp_path / "data"
    data.mkdir()
    x = np.ones(8, np.float32)
    x[2] = -1
    with pytest.raises(UserError, match="tensor 'h' is NaN or infinite"):
        observed(path, batches(data, x, model=path), WatchedTensor("h", 8))


def test_data_that_the_graph_cannot_run_on_is_refused(graph: Path, tmp_path: Path) -> None:
    """In the words of ONNX Runtime, with the file."""
    data = batches(tmp_path, np.zeros((1, 4, 8), np.float32), model=graph)
    with pytest.raises(UserError, match="ONNX Runtime cannot run it"):
        observed(graph, data, WatchedTensor("y", 7))


def test_half_precision_is_reduced_in_float32(tmp_path: Path) -> None:
    """A sum over many FP16 elements does not overflow."""
    x = ir.Value(name="x", shape=ir.Shape([1024, 8]), type=ir.TensorType(ir.DataType.FLOAT16))
    node = ir.Node("", "Neg", [x])
    (h,) = node.outputs
    h.name, h.dtype, h.shape = "h", ir.DataType.FLOAT16, x.shape
    path = tmp_path / "model.onnx"
    ir.save(ir.Model(ir.Graph([x], [h], nodes=[node], opset_imports={"": 21}, name="half"), ir_version=10), path)
    np.savez(tmp_path / "0.npz", x=np.full((1024, 8), 60000, np.float16))
    data = data_from_path(tmp_path / "0.npz", "--calib-data", inputs_from_graph(load_graph(path)))
    assert observed(path, data, WatchedTensor("h", 8))["h"].tolist() == [60000.0] * 8
