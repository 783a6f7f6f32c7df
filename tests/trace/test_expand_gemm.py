from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from fptq_export.graph_io import save_graph
from fptq_export.trace.expand_gemm import expand_gemm
from tests.support.traced import run

KEY = "pkg.torch.onnx.name_scopes"


def _model(node: str, outputs: str = "y") -> ir.Model:
    promised = ", ".join(f"float[T, 2] {name}" for name in outputs.split(", "))
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[T, 3] x, float[2, 3] v) => ({promised})
        <float[2, 3] W = {{1, 2, 3, 4, 5, 6}}, float[3, 2] N = {{1, 2, 3, 4, 5, 6}}, float[2] b = {{7, 8}}>
        {{ {node} }}"""
    )
    for index, entry in enumerate(model.graph):
        entry.name = f"node_{index}"
        entry.metadata_props[KEY] = "['', 'fc', 'linear']"
    return model


@pytest.mark.parametrize(
    ("node", "types"),
    [
        ("y = Gemm<transB = 1>(x, W, b)", ["Transpose", "MatMul", "Add"]),
        ("y = Gemm<transB = 1>(x, W)", ["Transpose", "MatMul"]),
        ("y = Gemm(x, N, b)", ["MatMul", "Add"]),
        ("y = Gemm<alpha = 1.0, beta = 1.0>(x, N)", ["MatMul"]),
    ],
    ids=["linear", "linear without bias", "Conv1D", "Conv1D without bias"],
)
def test_gemm_of_a_linear_becomes_matmul_and_add(node: str, types: list[str], tmp_path: Path) -> None:
    """The same numbers, bit for bit, under the same output name; each new node knows its module."""
    model = _model(node)
    feed = {"x": np.arange(12, dtype=np.float32).reshape(4, 3), "v": np.zeros((2, 3), np.float32)}
    save_graph(model, tmp_path / "before.onnx")
    assert expand_gemm(model)
    save_graph(model, tmp_path / "after.onnx")
    assert [entry.op_type for entry in model.graph] == types
    assert {entry.metadata_props[KEY] for entry in model.graph} == {"['', 'fc', 'linear']"}
    assert len({entry.name for entry in model.graph}) == len(types)
    before, after = (run(tmp_path / name, feed)["y"] for name in ("before.onnx", "after.onnx"))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "node",
    [
        "y = Gemm<alpha = 0.5>(x, N, b)",
        "y = Gemm<transB = 1, alpha = 0.5>(x, W, b)",
        "y = Gemm<transB = 1, beta = 2.0>(x, W, b)",
        "y = Gemm<transB = 1>(x, v, b)",
        "t = Transpose<perm = [1, 0]>(v) y = Gemm(x, t, b)",
        "t = Transpose<perm = [1, 0]>(x) y = Gemm<transA = 1, transB = 1>(t, W, b)",
        "y = MatMul(x, N)",
    ],
    ids=["alpha of Conv1D", "alpha", "beta", "computed weight", "computed weight of Conv1D", "transA", "no Gemm"],
)
def test_every_other_gemm_is_left_alone(node: str) -> None:
    """What is no plain linear stays one node."""
    model = _model(node)
    before = [entry.op_type for entry in model.graph]
    assert not expand_gemm(model)
    assert [entry.op_type for entry in model.graph] == before
