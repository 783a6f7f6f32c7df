from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.graph_io import save_graph
from fptq_export.rewrite.fuse_attention import FuseAttention
from tests.support.graphs import by_type, graph_from_text
from tests.support.traced import run

FLOAT = frozenset({ir.DataType.FLOAT})
TOKENS, KEYS, SIZE = 3, 5, 8
ROUNDING = (SIZE + KEYS + 16) * 2.0**-24
"""Relative to the largest value: sums of 8 and 5 products in another order, an exponential, a division, the scale."""
REPEATED = (
    "ku = Unsqueeze(k, two) ke = Expand(ku, wide) kr = Reshape(ke, joined) "
    "vu = Unsqueeze(v, two) ve = Expand(vu, wide) vr = Reshape(ve, joined) "
)
SCORES = "kt = Transpose<perm = [0, 1, 3, 2]>(kr) m = MatMul(q, kt) s = Mul(m, scale) "
MIXED = "b = Where(visible, zero, low) a = Add(s, b) p = Softmax<axis = -1>(a) y = MatMul(p, vr)"
ATTENTION = REPEATED + SCORES + MIXED
PLAIN = ATTENTION.removeprefix(REPEATED).replace("kr", "k").replace("vr", "v")
CONSTANTS = (
    "int64[1] two = {2}, int64[5] wide = {2, 2, 2, 5, 8}, int64[4] joined = {2, 4, 5, 8}, float scale = {0.25}, "
    "float zero = {0.0}, float low = {-3.4028234663852886e+38}, float one = {1.0}, float cap = {5.0}"
)


def attention_graph(body: str, heads: int = 2, outputs: str = "") -> ir.Model:
    """Four heads of queries q [2, 4, 3, 8], k and v [2, heads, 5, 8], visible [2, 1, 3, 5] -> y [2, 4, 3, 8]."""
    return graph_from_text(
        f"attention (float[2,4,3,8] q, float[2,{heads},5,8] k, float[2,{heads},5,8] v, bool[2,1,3,5] visible, "
        f"float[2,4,3,5] bias) => (float[2,4,3,8] y{outputs}) <{CONSTANTS}> {{ {body} }}"
    )


def result(model: ir.Model, path: Path, heads: int) -> NDArray[np.float32]:
    """What a graph makes of random numbers under a causal mask."""
    save_graph(model, path)
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 3, 8), "k": (2, heads, 5, 8), "v": (2, heads, 5, 8), "bias": (2, 4, 3, 5)}
    feed = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    visible = np.tril(np.ones((TOKENS, KEYS), bool), KEYS - TOKENS)
    found: NDArray[np.float32] = run(path, {**feed, "visible": np.tile(visible, (2, 1, 1, 1))})["y"]
    return found


@pytest.mark.parametrize(
    ("body", "heads"),
    [
        (ATTENTION, 2),
        (PLAIN, 4),
        (PLAIN, 1),
        (ATTENTION.replace("Mul(m, scale)", "Div(m, cap)"), 2),
        (ATTENTION.replace("m = MatMul(q, kt) s = Mul(m, scale)", "s = MatMul(q, kt)"), 2),
        (ATTENTION.replace("Add(s, b)", "Add(b, s)"), 2),
        (
            ATTENTION.replace(
                "p = Softmax<axis = -1>(a)", "ac = Cast<to = 1>(a) pc = Softmax(ac) p = Cast<to = 1>(pc)"
            ),
            2,
        ),
    ],
    ids=["grouped", "as many heads", "one head", "divided", "scaled before", "mask first", "with casts"],
)
def test_attention_becomes_one_operator(body: str, heads: int, tmp_path: Path) -> None:
    """The same numbers; keys and values are handed over without their repetition."""
    before = result(attention_graph(body, heads), tmp_path / "before.onnx", heads)
    model = attention_graph(body, heads)
    fuse = FuseAttention(FLOAT)
    assert fuse(model).modified
    assert (fuse.fused, fuse.left_alone) == (1, {})
    node = by_type(model, "Attention")
    assert [value.name for value in node.inputs if value is not None] == ["q", "k", "v", "visible"]
    assert len(model.graph) == 1
    after = result(model, tmp_path / "after.onnx", heads)
    np.testing.assert_allclose(after, before, rtol=0.0, atol=ROUNDING * np.abs(before).max())


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (ATTENTION.replace("a = Add(s, b)", "d = Div(s, cap) t = Tanh(d) u = Mul(t, cap) a = Add(u, b)"), "", "Tanh"),
        (ATTENTION.replace("a = Add(s, b)", "z = Add(s, bias) a = Add(z, b)"), "", "through Add"),
        (ATTENTION.replace("Where(visible, zero, low)", "Where(visible, one, low)"), "", "its mask is not"),
        (ATTENTION.replace("Where(visible, zero, low)", "Where(visible, zero, one)"), "", "its mask is not"),
        (ATTENTION.replace("Add(s, b)", "Add(s, bias)"), "", "its mask is not"),
        (ATTENTION.replace("a = Add(s, b)", "a = Identity(s)"), "", "scores plus a mask"),
        (ATTENTION.replace("axis = -1", "axis = 2"), "", "does not run over the keys"),
        (ATTENTION + " r = Neg(p)", ", float[2,4,3,5] r", "probabilities are read"),
        (ATTENTION + " r = Neg(a)", ", float[2,4,3,5] r", "scores plus a mask"),
        (ATTENTION + " r = Neg(m)", ", float[2,4,3,5] r", "its scores go through"),
        (ATTENTION.replace("Mul(m, scale)", "Mul(m, bias)"), "", "no constant"),
    ],
    ids=[
        "soft cap",
        "ALiBi",
        "mask adds one",
        "mask hides nothing",
        "mask of numbers",
        "no mask",
        "over the queries",
        "probabilities read",
        "masked scores read",
        "scores read",
        "scale of every head",
    ],
)
def test_what_the_operator_cannot_say_is_left_alone(body: str, outputs: str, reason: str) -> None:
    """Each differs from attention in one place; the reason is kept for the report."""
    model = attention_graph(body, outputs=outputs)
    before = [node.op_type for node in model.graph]
    fuse = FuseAttention(FLOAT)
    assert not fuse(model).modified
    assert [node.op_type for node in model.graph] == before
    ((_, found),) = fuse.left_alone.items()
    assert reason in found


def test_float32_is_left_alone_by_default() -> None:
    """TensorRT for RTX has no kernel for it and does not break the operator up: such an engine would not build."""
    fuse = FuseAttention()
    assert not fuse(attention_graph(ATTENTION)).modified
    assert "no kernel for attention in FLOAT" in next(iter(fuse.left_alone.values()))


def test_a_softmax_of_another_kind_is_not_reported() -> None:
    """The router of a mixture of experts has a softmax, and no attention."""
    model = graph_from_text("router (float[2,3,8] x) => (float[2,3,8] y) { y = Softmax<axis = -1>(x) }")
    fuse = FuseAttention(FLOAT)
    assert not fuse(model).modified
    assert fuse.left_alone == {}
