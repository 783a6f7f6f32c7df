from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.fuse_rms_norm import FuseRmsNorm
from tests.support.graphs import by_type, graph_from_text
from tests.support.traced import Traced, run

CHANNELS = 8
FLOAT_ERROR = (CHANNELS + 6) * 2.0**-24
"""Relative: a sum of squares in another order, its root, and five operations more, each rounded once."""
HALF_ERROR = 2 * 2.0**-10
"""Both programs round twice to FP16; a float32 value next to a boundary may fall on either side each time."""
NORM = (
    "p = Pow(x, two) m = ReduceMean<keepdims = 1>(p, last) e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r) "
    "n = Mul(x, i) y = Mul(w, n)"
)
HALF = (
    NORM.replace("(x,", "(f,")
    .replace("p = Pow", "f = Cast<to = 1>(x) p = Pow")
    .replace("y = Mul(w, n)", "h = Cast<to = 10>(n) y = Mul(w, h)")
)
CONSTANTS = "float two = {2.0}, float three = {3.0}, int64[1] last = {-1}, int64[1] first = {0}, float eps = {0.00001}"
WEIGHT = (1.5, 0.5, -2.0, 1.0, 0.25, 3.0, 1.0, 0.75)


def norm_graph(body: str, dtype: str = "float", outputs: str = "") -> ir.Model:
    """A graph of x [batch, 3, 8] -> y of the same shape, with the constants above and the weight `w` [8]."""
    # The text form takes FP16 numbers as their bits.
    numbers = WEIGHT if dtype == "float" else np.array(WEIGHT, np.float16).view(np.uint16).tolist()
    weight = ", ".join(map(str, numbers))
    return graph_from_text(
        f"norm ({dtype}[batch,3,8] x) => ({dtype}[batch,3,8] y{outputs}) "
        f"<{CONSTANTS}, {dtype}[8] w = {{{weight}}}> {{ {body} }}"
    )


def result(model: ir.Model, path: Path, dtype: type = np.float32) -> NDArray[np.float64]:
    """What a graph makes of a random x, some of it large and some of it zero."""
    save_graph(model, path)
    x = np.random.default_rng(0).normal(size=(2, 3, CHANNELS)) * np.array([1.0, 50.0, 0.0])[:, None]
    return run(path, {"x": x.astype(dtype)})["y"].astype(np.float64)


@pytest.mark.parametrize(
    ("body", "dtype", "numpy_type", "error"),
    [
        (NORM, "float", np.float32, FLOAT_ERROR),
        (NORM.replace("Mul(w, n)", "Mul(n, w)").replace("Mul(x, i)", "Mul(i, x)"), "float", np.float32, FLOAT_ERROR),
        (NORM.replace("y = Mul(w, n)", "u = Add(w, two) y = Mul(n, u)"), "float", np.float32, FLOAT_ERROR),
        (HALF, "float16", np.float16, HALF_ERROR),
    ],
    ids=["plain", "operands swapped", "computed weight", "float16"],
)
def test_a_norm_becomes_one_operator(body: str, dtype: str, numpy_type: type, error: float, tmp_path: Path) -> None:
    """Same numbers up to rounding, epsilon kept (a row of zeros stays zeros), no part of the arithmetic left."""
    before = result(norm_graph(body, dtype), tmp_path / "before.onnx", numpy_type)
    model = norm_graph(body, dtype)
    fuse = FuseRmsNorm()
    assert fuse(model).modified
    assert fuse.fused == 1
    assert {node.op_type for node in model.graph} <= {"RMSNormalization", "Add"}
    after = result(model, tmp_path / "after.onnx", numpy_type)
    np.testing.assert_allclose(after, before, rtol=error, atol=0.0)


def test_the_weight_keeps_its_name_and_the_output_its_own(llama_fp32: Traced) -> None:
    """Folds find the norm's weight by name, and linears their input: `sites.json` still describes the graph."""
    model = load_graph(llama_fp32.model)
    fuse = FuseRmsNorm()
    fuse(model)
    assert fuse.fused == 5
    read = {node.inputs[1].name for node in model.graph if node.op_type == "RMSNormalization" and node.inputs[1]}
    assert {site.id + ".weight" for site in llama_fp32.sites.fold_sites if site.kind == "norm"} <= read
    values = {output.name for node in model.graph for output in node.outputs}
    assert {linear.input for linear in llama_fp32.sites.linears} <= values


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        (NORM.replace("Pow(x, two)", "Pow(x, three)"), ""),
        (NORM.replace("(p, last)", "(p, first)"), ""),
        (NORM.replace("Mul(x, i)", "Mul(p, i)"), ""),
        (NORM.replace("n = Mul(x, i) y = Mul(w, n)", "y = Mul(x, i)"), ""),
        (NORM.replace("r = Sqrt(e)", "r = Exp(e)"), ""),
        (NORM + " z = Neg(i)", ", float[batch,3,1] z"),
        (NORM + " z = Neg(n)", ", float[batch,3,8] z"),
        (NORM.replace("y = Mul(w, n)", "u = Unsqueeze(w, first) y = Mul(u, n)"), ""),
    ],
    ids=[
        "cube",
        "over the batch",
        "of another tensor",
        "without a weight",
        "no root",
        "scale read elsewhere",
        "normalized read elsewhere",
        "weight of two dimensions",
    ],
)
def test_what_is_no_rms_norm_is_left_alone(body: str, outputs: str) -> None:
    """Each differs from the norm in one place."""
    model = norm_graph(body, outputs=outputs)
    before = [node.op_type for node in model.graph]
    assert not FuseRmsNorm()(model).modified
    assert [node.op_type for node in model.graph] == before


def test_a_narrower_type_than_x_had_is_left_alone() -> None:
    """The operator rounds to the type of x: a norm cast to another one would round elsewhere."""
    body = HALF.replace("h = Cast<to = 10>(n) y = Mul(w, h)", "h = Cast<to = 16>(n) k = Cast<to = 10>(h) y = Mul(w, k)")
    assert not FuseRmsNorm()(norm_graph(body, "float16")).modified


def test_layer_norm_is_left_alone(opt_fp32: Traced) -> None:
    """OPT's norms subtract the mean."""
    model = load_graph(opt_fp32.model)
    assert not FuseRmsNorm()(model).modified
    assert any(node.op_type == "LayerNormalization" for node in model.graph)


def test_the_operator_reads_x_before_its_cast() -> None:
    """FP16: one operator of the graph's type, with float32 inside, and no cast around it."""
    model = norm_graph(HALF, "float16")
    FuseRmsNorm()(model)
    node = by_type(model, "RMSNormalization")
    assert [value.name for value in node.inputs if value is not None] == ["x", "w"]
    assert node.attributes.get_int("stash_type", 0) == ir.DataType.FLOAT
