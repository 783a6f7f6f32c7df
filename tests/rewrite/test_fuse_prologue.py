"""A norm or a gate goes into the W4A8 node behind it, and stays where anything else reads it."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from fptq_export.rewrite.fuse_prologue import FusePrologue

NORM = "n, mean, deviation, total = com.microsoft.SkipSimplifiedLayerNormalization <epsilon = 1e-6> (x, skip, gamma)"
LINEAR = "y = fptq.cpu.FptqW4A8GemmStatic <group_size = 16> (n, s, codes, scales)"
GATE = "c = Sigmoid(x) silu = Mul(x, c) n = Mul(silu, skip)"


def model_of(nodes: str, outputs: str = "float[b, t, 64] y") -> ir.Model:
    """A graph over x, skip [b, t, 64] and a weight."""
    inputs = (
        "float[b, t, 64] x, float[b, t, 64] skip, float[b, t, 1] narrow, float[64] gamma, float s, int4[64, 64] codes"
    )
    text = (
        '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1, "fptq.cpu": 1]> '
        f"test ({inputs}, float16[4, 64] scales) => ({outputs}) {{ {nodes} }}"
    )
    return ir.from_proto(onnx.parser.parse_model(text))


def operators(model: ir.Model) -> list[str]:
    """In their order."""
    return [node.op_type for node in model.graph]


def test_norm_goes_into_the_linear_that_reads_it() -> None:
    """With its sum, which others read, and its epsilon."""
    model = model_of(f"{NORM} {LINEAR} z = Relu(total)", "float[b, t, 64] y, float[b, t, 64] z")
    rewrite = FusePrologue()
    assert rewrite(model).modified
    node, relu = model.graph
    assert (node.op_type, relu.op_type) == ("FptqSkipNormW4A8GemmStatic", "Relu")
    assert [value.name for value in node.inputs if value] == ["x", "skip", "gamma", "s", "codes", "scales"]
    assert [value.name for value in node.outputs] == ["total", "y"]
    assert node.attributes.get_float("epsilon") == pytest.approx(1e-6, rel=2**-24)
    assert node.attributes.get_int("group_size") == 16
    assert relu.inputs[0] is node.outputs[0]


def test_sum_that_is_read_before_the_linear_is_there_in_time() -> None:
    """The node stands where the norm stood."""
    model = model_of(f"{NORM} z = Relu(total) {LINEAR}", "float[b, t, 64] y, float[b, t, 64] z")
    assert FusePrologue()(model).modified
    assert operators(model) == ["FptqSkipNormW4A8GemmStatic", "Relu"]


@pytest.mark.parametrize(
    "gate",
    [GATE, "c = Sigmoid(x) silu = Mul(c, x) n = Mul(skip, silu)"],
    ids=["gate_first", "gate_last"],
)
def test_gate_goes_into_the_linear_that_reads_it(gate: str) -> None:
    """Whatever the order of the factors."""
    model = model_of(f"{gate} {LINEAR.replace('Static', 'PerToken').replace('n, s,', 'n,')}")
    rewrite = FusePrologue()
    assert rewrite(model).modified
    assert rewrite.fused == 1
    assert operators(model) == ["FptqSwiGluW4A8GemmPerToken"]
    assert [value.name for value in model.graph[0].inputs if value] == ["x", "skip", "codes", "scales"]
    assert model.graph.outputs[0] is model.graph[0].outputs[0]


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        (f"{NORM} {LINEAR} z = Relu(n)", "float[b, t, 64] y, float[b, t, 64] z"),
        (f"{NORM} {LINEAR}", "float[b, t, 64] y, float[b, t, 64] n"),
        (f"{NORM.replace('gamma)', 'gamma, gamma)')} {LINEAR}", "float[b, t, 64] y"),
        (f"{NORM.replace('com.microsoft.', 'fptq.cpu.')} {LINEAR}", "float[b, t, 64] y"),
        (f"{NORM} {LINEAR.replace('(n,', '(total,')}", "float[b, t, 64] y"),
        (f"{NORM} y = Relu(n)", "float[b, t, 64] y"),
        (f"{GATE} {LINEAR} z = Relu(n)", "float[b, t, 64] y, float[b, t, 64] z"),
        (f"{GATE} {LINEAR} z = Relu(silu)", "float[b, t, 64] y, float[b, t, 64] z"),
        (f"{GATE} {LINEAR} z = Relu(c)", "float[b, t, 64] y, float[b, t, 64] z"),
        (f"{GATE.replace('skip', 'narrow')} {LINEAR}", "float[b, t, 64] y"),
        (f"{GATE.replace('Mul(x, c)', 'Mul(skip, c)')} {LINEAR}", "float[b, t, 64] y"),
        (f"{GATE.replace('Sigmoid', 'Tanh')} {LINEAR}", "float[b, t, 64] y"),
        (f"{GATE.replace('n = Mul', 'n = Add')} {LINEAR}", "float[b, t, 64] y"),
    ],
    ids=[
        "norm_read_twice",
        "norm_is_an_output",
        "norm_with_a_bias",
        "another_norm",
        "linear_reads_the_sum",
        "no_linear",
        "gate_read_twice",
        "silu_read_twice",
        "sigmoid_read_twice",
        "gate_of_another_shape",
        "sigmoid_of_another_value",
        "another_curve",
        "sum_in_place_of_a_product",
    ],
)
def test_what_is_of_another_form_is_left_alone(nodes: str, outputs: str) -> None:
    """The graph stays as it is."""
    model = model_of(nodes, outputs)
    before = operators(model)
    assert not FusePrologue()(model).modified
    assert operators(model) == before
