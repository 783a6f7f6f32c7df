"""Rows of a fused matrix are found where they are one range that nothing else reads, and nowhere else."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from fptq_export.sites import FoldSite, Producer
from fptq_export.trace.find_fold_sites import fold_site_or_reason
from tests.trace.test_find_fold_sites import _linears

CHANNELS = 4
SHAPES = {"flat": "3, 12", "back": "1, 3, 12", "heads": "1, 3, 4, 3", "sizes": "4, 8"}


def _model(nodes: str, outputs: str) -> ir.Model:
    """A graph of u and r [1, 3, 4] and a matrix F [4, 12] with bias Fb, with inferred shapes."""
    constants = [
        f"float[{CHANNELS}, {columns}] {name} = {{{', '.join(['1'] * (CHANNELS * columns))}}}"
        for name, columns in (("F", 12), ("W", 2))
    ]
    constants += [f"float[12] Fb = {{{', '.join(['1'] * 12)}}}"]
    constants += [f"int64[{len(dims.split(','))}] {name} = {{{dims}}}" for name, dims in SHAPES.items()]
    constants += [f"int64[1] n{number} = {{{number}}}" for number in (0, 1, 2, 3, 4, 5, 8, 12, 99)]
    constants += ["int64[1] last = {-1}", "int64[1] minus4 = {-4}"]
    promised = ", ".join(f"float {name}" for name in outputs.split(", "))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 3, {CHANNELS}] u, float[1, 3, {CHANNELS}] r, int64[1] given) => ({promised})
        <{", ".join(constants)}> {{ {nodes} }}"""
    )
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def _site(nodes: str, outputs: str = "y") -> FoldSite | str:
    """What is found for the tensor x."""
    linears = _linears(_model(nodes, outputs))
    readers = [linear for linear in linears.values() if linear.input.name == "x"]
    assert readers
    return fold_site_or_reason(readers[0].input, readers, linears)


USE = " x = Mul(r, up) y = MatMul(x, W)"
SPLIT = "f = MatMul(u, F) a, up, c = Split<axis = 2, num_outputs = 3>(f)"
SLICE = "f = MatMul(u, F) up = Slice(f, n4, n8, n2, n1)"
MUST_FIND = {
    "middle of a Split": (SPLIT, (4, 8)),
    "Split along the last axis": (SPLIT.replace("axis = 2", "axis = -1"), (4, 8)),
    "Split by sizes": ("f = MatMul(u, F) up, c = Split<axis = 2>(f, sizes)", (0, 4)),
    "Slice": (SLICE, (4, 8)),
    "Slice without step": (SLICE.replace(", n1)", ")"), (4, 8)),
    "Slice from the end": (SLICE.replace("n4, n8, n2", "minus4, n99, last"), (8, 12)),
    "beside another Slice": (SLICE + " b = Slice(f, n8, n12, n2, n1) z = Neg(b)", (4, 8)),
    "beside a reader of the shape": (SLICE + " z = Shape(f)", (4, 8)),
    "behind reshapes that keep the channels": (
        "f = MatMul(u, F) g = Reshape(f, flat) h = Reshape(g, back) up = Slice(h, n4, n8, n2, n1)", (4, 8)
    ),
}  # fmt: skip


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("case", MUST_FIND)
def test_parts_of_a_linear_are_found(case: str, bias: bool) -> None:
    """The rows, and the same part of the bias; the site is named after both."""
    nodes, span = MUST_FIND[case]
    if bias:
        nodes = nodes.replace("f = MatMul(u, F)", "l = MatMul(u, F) f = Add(l, Fb)")
    site = _site(nodes + USE, outputs="y, z" if " z = " in nodes else "y")
    assert isinstance(site, FoldSite), site
    assert (site.kind, site.channels, site.producer_linear) == ("gated_mlp", CHANNELS, "F")
    assert site.id == f"F[{span[0]}:{span[1]}]"
    parts = [Producer(initializer="F", axis=1, span=span), Producer(initializer="Fb", axis=0, span=span)]
    assert list(site.producers) == parts[: 1 + bias]


MUST_REFUSE = {
    "whole output read elsewhere": SLICE + " z = Neg(f)",
    "part read elsewhere": SPLIT + " z = Neg(up)",
    "Slice that overlaps": SLICE + " b = Slice(f, n5, n12, n2, n1) z = Neg(b)",
    "the same rows in a second Slice": SLICE + " b = Slice(f, n4, n8, n2, n1) z = Neg(b)",
    "Slice with a step": SLICE.replace("n4, n8, n2, n1", "n0, n8, n2, n2"),
    "Slice of tokens": "f = MatMul(u, F) t = Slice(f, n0, n2, n1, n1) up = Slice(t, n4, n8, n2, n1)",
    "Slice without axes": "f = MatMul(u, F) up = Slice(f, n0, n4)",
    "computed bounds": SLICE.replace("n4, n8", "given, n8"),
    "another Slice with computed bounds": SLICE + " b = Slice(f, given, n12, n2, n1) z = Neg(b)",
    "Split of heads": (
        "f = MatMul(u, F) h = Reshape(f, heads) a, t, c = Split<axis = 3, num_outputs = 3>(h) up = Squeeze(t, last)"
    ),
    "weight used twice": SLICE + " z = MatMul(r, F)",
    "reshape in between read elsewhere": (
        "f = MatMul(u, F) g = Reshape(f, flat) h = Reshape(g, back) up = Slice(h, n4, n8, n2, n1) z = Neg(g)"
    ),
    "rows of no linear": "j = Concat<axis = 2>(u, u, u) up = Slice(j, n4, n8, n2, n1)",
}


@pytest.mark.parametrize("case", MUST_REFUSE)
def test_rows_that_are_not_one_range_of_their_own_are_refused(case: str) -> None:
    """Another reader, another layout or bounds that nobody knows: a reason and no site."""
    nodes = MUST_REFUSE[case]
    assert isinstance(_site(nodes + USE, outputs="y, z" if " z = " in nodes else "y"), str)


def test_output_of_the_graph_is_not_divided() -> None:
    """Whoever takes the whole output from the graph would see the divided rows."""
    assert isinstance(_site(SLICE + USE, outputs="y, f"), str)
    assert isinstance(_site(SLICE + USE), FoldSite)
