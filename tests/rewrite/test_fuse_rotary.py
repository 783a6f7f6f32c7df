from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.fuse_rotary import FuseRotary
from tests.support.graphs import by_type, graph_from_text
from tests.support.traced import Traced, run

HALF = 4
ROUNDING = 4 * 2.0**-24
"""Relative to the two products: each is rounded, and so is their sum."""
ANGLES = "a = Concat<axis = -1>(f, f) c0 = Cos(a) s0 = Sin(a) "
ROTATED = (
    "c = Unsqueeze(c0, one) s = Unsqueeze(s0, one) xc = Mul(x, c) lo = Slice(x, zero, half, three, one) "
    "hi = Slice(x, half, end, three, one) n = Neg(hi) r = Concat<axis = -1>(n, lo) rs = Mul(r, s) y = Add(xc, rs)"
)
PLAIN = ANGLES + ROTATED
CONSTANTS = (
    "int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[1] half = {4}, "
    "int64[1] quarter = {2}, int64[1] end = {9223372036854775807}, float factor = {1.25}"
)


def rotary_graph(body: str) -> ir.Model:
    """A graph of x [batch, 2, sequence, 8] and angles f, g [batch, sequence, 4] -> y of the shape of x."""
    return graph_from_text(
        "rotary (float[batch,2,sequence,8] x, float[batch,sequence,4] f, float[batch,sequence,4] g) => "
        f"(float[batch,2,sequence,8] y) <{CONSTANTS}> {{ {body} }}"
    )


def result(model: ir.Model, path: Path) -> NDArray[np.float32]:
    """What a graph makes of random numbers."""
    save_graph(model, path)
    rng = np.random.default_rng(0)
    x, f, g = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 2, 3, 8), (2, 3, 4), (2, 3, 4)))
    given = {value.name for value in model.graph.inputs}
    found: NDArray[np.float32] = run(path, {k: v for k, v in {"x": x, "f": f, "g": g}.items() if k in given})["y"]
    return found


@pytest.mark.parametrize(
    "body",
    [
        PLAIN,
        PLAIN.replace("Mul(x, c)", "Mul(c, x)").replace("Add(xc, rs)", "Add(rs, xc)").replace("Mul(r, s)", "Mul(s, r)"),
        PLAIN.replace("c0 = Cos(a) s0 = Sin(a)", "c1 = Cos(a) s1 = Sin(a) c0 = Mul(c1, factor) s0 = Mul(factor, s1)"),
    ],
    ids=["plain", "operands swapped", "scaled"],
)
def test_a_rotation_becomes_one_operator(body: str, tmp_path: Path) -> None:
    """The same numbers; angles are computed once, for half a head."""
    before = result(rotary_graph(body), tmp_path / "before.onnx")
    model = rotary_graph(body)
    fuse = FuseRotary()
    assert fuse(model).modified
    assert fuse.fused == 1
    node = by_type(model, "RotaryEmbedding")
    assert all(value is not None and value.shape is not None and value.shape[-1] == HALF for value in node.inputs[1:])
    assert {node.op_type for node in model.graph}.isdisjoint({"Neg", "Slice", "Concat", "Unsqueeze"})
    after = result(model, tmp_path / "after.onnx")
    np.testing.assert_allclose(after, before, rtol=0.0, atol=ROUNDING * 1.25 * 8.0)  # |x| < 4, two products


def test_queries_and_keys_of_all_layers_share_their_angles(llama_fp32: Traced) -> None:
    """Two rotations a layer, one cosine and one sine of half a head for all of them."""
    model = load_graph(llama_fp32.model)
    fuse = FuseRotary()
    fuse(model)
    assert fuse.fused == 4
    rotations = [node for node in model.graph if node.op_type == "RotaryEmbedding"]
    assert len({tuple(node.inputs[1:]) for node in rotations}) == 1


@pytest.mark.parametrize(
    "body",
    [
        PLAIN.replace("Concat<axis = -1>(f, f)", "Concat<axis = -1>(f, g)"),
        PLAIN.replace("Concat<axis = -1>(n, lo)", "Concat<axis = -1>(lo, n)"),
        PLAIN.replace("Neg(hi)", "Identity(hi)"),
        PLAIN.replace("xc = Mul(x, c)", "z = Relu(x) xc = Mul(z, c)"),
        PLAIN.replace("zero, half", "zero, quarter").replace("half, end", "quarter, end"),
        PLAIN.replace("Add(xc, rs)", "Sub(xc, rs)"),
        PLAIN.replace("c0 = Cos(a)", "c1 = Cos(a) c0 = Relu(c1)"),
    ],
    ids=["two angles", "halves swapped", "no sign", "another tensor", "a quarter", "difference", "cut cosines"],
)
def test_what_is_no_rotation_of_halves_is_left_alone(body: str) -> None:
    """Each differs from the rotation in one place."""
    model = rotary_graph(body)
    before = [node.op_type for node in model.graph]
    assert not FuseRotary()(model).modified
    assert [node.op_type for node in model.graph] == before


def test_a_sum_of_products_that_is_no_rotation_is_left_alone(opt_fp32: Traced) -> None:
    """OPT adds learned positions: nothing of it is a rotation."""
    assert not FuseRotary()(load_graph(opt_fp32.model)).modified
