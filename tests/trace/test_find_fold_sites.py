from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir
import pytest

from fptq_export.sites import FoldSite, Producer
from fptq_export.trace.find_fold_sites import fold_site_or_reason
from fptq_export.trace.find_linears import LinearNode

CHANNELS = 4
VECTORS = ("w", "b", "w2", "Pb")
"""Constants [4]: what norms multiply by and add, and the bias of P."""
MATRICES = {"P": CHANNELS, "Q": CHANNELS, "V": 2, "W": 2}
"""Weights [4, n] of linears."""
SHAPES = {"flat": "3, 4", "swap": "1, 4, 3", "twos": "6, 2"}
"""What reshapes make of u and r."""


def _model(nodes: str, outputs: str) -> ir.Model:
    """A graph of the inputs u, r [1, 3, 4] and the constants above, with inferred shapes."""
    vector = ", ".join("1" for _ in range(CHANNELS))
    constants = [f"float[{CHANNELS}] {name} = {{{vector}}}" for name in VECTORS]
    for name, columns in MATRICES.items():
        numbers = ", ".join("1" for _ in range(CHANNELS * columns))
        constants.append(f"float[{CHANNELS}, {columns}] {name} = {{{numbers}}}")
    constants += ["float one = {1}", "float[2, 2] pairs = {1, 2, 3, 4}"]
    constants += [f"int64[{len(dims.split(','))}] {name} = {{{dims}}}" for name, dims in SHAPES.items()]
    promised = ", ".join(f"float {name}" for name in outputs.split(", "))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[1, 3, {CHANNELS}] u, float[1, 3, {CHANNELS}] r) => ({promised})
        <{", ".join(constants)}> {{ {nodes} }}"""
    )
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def _linears(model: ir.Model) -> dict[str, LinearNode]:
    """Every MatMul by a constant, called like its weight; `<weight>b` is its bias."""
    found = {}
    for node in model.graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or not weight.is_initializer() or weight.shape is None or weight.name is None:
            continue
        add = next((use.node for use in node.outputs[0].uses() if use.node.op_type == "Add"), None)
        bias = next((value for value in add.inputs if value and value.name == f"{weight.name}b"), None) if add else None
        rows, columns = weight.shape.numpy()
        path = weight.name
        while path in found:
            path += "'"
        found[path] = LinearNode(path, node, weight, None, bias, add if bias else None, rows, columns)
    return found


def _outcome(nodes: str, outputs: str = "y") -> FoldSite | str:
    """What is found for the tensor x."""
    model = _model(nodes, outputs)
    linears = _linears(model)
    readers = [linear for linear in linears.values() if linear.input.name == "x"]
    return fold_site_or_reason(readers[0].input, readers, linears)


@dataclass(frozen=True)
class Found:
    """Nodes that make x, and the site that x has."""

    nodes: str
    kind: str
    producers: tuple[Producer, ...]
    producer_linear: str | None = None


WEIGHT = Producer(initializer="w", axis=0)
BIAS = Producer(initializer="b", axis=0)
MUST_FIND = {
    "Mul": Found("x = Mul(u, w)", "norm", (WEIGHT,)),
    "Mul, weight first": Found("x = Mul(w, u)", "norm", (WEIGHT,)),
    "Mul + Add": Found("p = Mul(u, w) x = Add(p, b)", "norm", (WEIGHT, BIAS)),
    "Add first": Found("p = Mul(w, u) x = Add(b, p)", "norm", (WEIGHT, BIAS)),
    "LayerNormalization": Found("x = LayerNormalization(u, w, b)", "norm", (WEIGHT, BIAS)),
    "LayerNormalization without bias": Found("x = LayerNormalization(u, w)", "norm", (WEIGHT,)),
    "through Cast": Found("p = Mul(u, w) q = Cast<to = 10>(p) x = Cast<to = 1>(q)", "norm", (WEIGHT,)),
    "through Reshape that flattens tokens": Found("p = Mul(u, w) x = Reshape(p, flat)", "norm", (WEIGHT,)),
    "through Cast and Reshape": Found(
        "p = LayerNormalization(u, w, b) q = Cast<to = 1>(p) x = Reshape(q, flat)", "norm", (WEIGHT, BIAS)
    ),
    "its shape is read": Found("x = Mul(u, w) shape = Shape(x)", "norm", (WEIGHT,)),
    "Gemma": Found("o = Add(one, w) x = Mul(u, o)", "offset_norm", (Producer(initializer="w", axis=0, offset=1.0),)),
    "Gemma with a cast weight": Found(
        "c = Cast<to = 1>(w) o = Add(c, one) x = Mul(o, u)",
        "offset_norm",
        (Producer(initializer="w", axis=0, offset=1.0),),
    ),
    "Gemma with bias": Found(
        "o = Add(w, one) p = Mul(u, o) x = Add(p, b)",
        "offset_norm",
        (Producer(initializer="w", axis=0, offset=1.0), BIAS),
    ),
    "gated MLP": Found(
        "gate = Sigmoid(r) up = MatMul(u, P) x = Mul(gate, up)", "gated_mlp", (Producer(initializer="P", axis=1),), "P"
    ),
    "gated MLP with bias": Found(
        "m = MatMul(u, P) up = Add(m, Pb) x = Mul(up, r)",
        "gated_mlp",
        (Producer(initializer="P", axis=1), Producer(initializer="Pb", axis=0)),
        "P",
    ),
    "bilinear GLU": Found(
        "up = MatMul(u, P) gate = MatMul(u, Q) x = Mul(up, gate)",
        "gated_mlp",
        (Producer(initializer="P", axis=1),),
        "P",
    ),
}


@pytest.mark.parametrize("case", MUST_FIND)
def test_exact_sites_are_found(case: str) -> None:
    """A tensor that a per-channel constant or the up branch scales has a site with all its producers."""
    found = MUST_FIND[case]
    site = _outcome(f"{found.nodes} y = MatMul(x, W)")
    assert isinstance(site, FoldSite), site
    assert (site.kind, site.producers, site.producer_linear) == (found.kind, found.producers, found.producer_linear)
    assert (site.channels, site.consumers) == (CHANNELS, ("W",))


def test_every_reader_of_a_site_is_its_consumer() -> None:
    """Two linears read the norm: both must be multiplied."""
    site = _outcome("x = Mul(u, w) y = MatMul(x, W) z = MatMul(x, V)", outputs="y, z")
    assert isinstance(site, FoldSite)
    assert site.consumers == ("W", "V")


MUST_REFUSE = {
    "residual taken after the norm": ("x = Mul(u, w) m = MatMul(x, P) y = Add(m, x)", "also read by Add"),
    "reshaped for something else": (
        "x = Mul(u, w) y = MatMul(x, W) t = Reshape(x, flat) z = MatMul(r, t)",
        "also read by Reshape",
    ),
    "attention of a tensor with itself": ("x = Mul(u, w) y = MatMul(x, W) z = MatMul(r, x)", "also read by MatMul"),
    "weight shared by two norms": ("x = Mul(u, w) o = Mul(r, w) y = MatMul(x, W) z = Relu(o)", "Mul node"),
    "bias shared by two norms": (
        "x = LayerNormalization(u, w, b) z = LayerNormalization(r, w2, b) y = MatMul(x, W)",
        "LayerNormalization node",
    ),
    "bias that another node reads": ("p = Mul(u, w) x = Add(p, b) z = Relu(b) y = MatMul(x, W)", "Add node"),
    "up branch read twice": (
        "g = Sigmoid(r) up = MatMul(u, P) x = Mul(g, up) z = Relu(up) y = MatMul(x, W)",
        "Mul node",
    ),
    "squared up branch": ("up = MatMul(u, P) x = Mul(up, up) y = MatMul(x, W)", "Mul node"),
    "SiLU without a gate": ("up = MatMul(u, P) s = Sigmoid(up) x = Mul(up, s) y = MatMul(x, W)", "Mul node"),
    "up weight used twice": (
        "g = Sigmoid(r) up = MatMul(u, P) x = Mul(g, up) z = MatMul(r, P) y = MatMul(x, W)",
        "Mul node",
    ),
    "ReLU MLP": ("h = MatMul(u, P) x = Relu(h) y = MatMul(x, W)", "Relu node"),
    "output of a linear": ("x = MatMul(u, P) y = MatMul(x, W)", "MatMul node"),
    "Cast with another reader": (
        "p = Mul(u, w) x = Cast<to = 1>(p) z = Relu(p) y = MatMul(x, W)",
        "also read before Cast",
    ),
    "Reshape with another reader": (
        "p = Mul(u, w) x = Reshape(p, flat) z = Relu(p) y = MatMul(x, W)",
        "also read before Reshape",
    ),
    "Reshape that moves channels": (
        "p = Mul(u, w) s = Reshape(p, swap) x = Reshape(s, flat) y = MatMul(x, W)",
        "Reshape",
    ),
    "Reshape that splits channels": ("p = Mul(u, w) x = Reshape(p, twos) y = MatMul(x, pairs)", "Reshape node"),
    "Reshape to a computed shape": (
        "p = Mul(u, w) n = Neg(flat) m = Neg(n) x = Reshape(p, m) y = MatMul(x, W)",
        "Reshape node",
    ),
    "product before the bias is read too": (
        "p = Mul(u, w) x = Add(p, b) z = Relu(p) y = MatMul(x, W)",
        "Add node",
    ),
    "residual added by Add": ("p = Mul(u, w) x = Add(p, r) y = MatMul(x, W)", "Add node"),
    "product of two activations": ("x = Mul(u, r) y = MatMul(x, W)", "Mul node"),
    "one scale for all channels": ("x = Mul(u, one) y = MatMul(x, W)", "Mul node"),
    "offset for each channel": ("o = Add(w, w2) x = Mul(u, o) y = MatMul(x, W)", "Mul node"),
    "1 + w read twice": ("o = Add(w, one) x = Mul(u, o) z = Relu(o) y = MatMul(x, W)", "Mul node"),
    "cast of w read twice": (
        "c = Cast<to = 1>(w) o = Add(c, one) x = Mul(u, o) z = Relu(c) y = MatMul(x, W)",
        "Mul node",
    ),
    "division": ("x = Div(u, w) y = MatMul(x, W)", "Div node"),
}


@pytest.mark.parametrize("case", MUST_REFUSE)
def test_inexact_sites_are_refused_with_a_reason(case: str) -> None:
    """Where anything else would see the scaled tensor, or nothing exact makes it, there is a sentence and no site."""
    nodes, reason = MUST_REFUSE[case]
    outcome = _outcome(nodes, outputs="y, z" if " z = " in nodes else "y")
    assert isinstance(outcome, str), outcome
    assert reason in outcome


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ("x = Mul(u, w) y = MatMul(x, W)", "y, x"),
        ("p = Mul(u, w) x = Add(p, b) y = MatMul(x, W)", "y, p"),
        ("p = Mul(u, w) x = Cast<to = 1>(p) y = MatMul(x, W)", "y, p"),
        ("g = Sigmoid(r) up = MatMul(u, P) x = Mul(g, up) y = MatMul(x, W)", "y, up"),
    ],
    ids=["norm", "norm before its bias", "norm before a cast", "up branch"],
)
def test_tensors_that_leave_the_graph_are_not_scaled(nodes: str, outputs: str) -> None:
    """An output of the graph has readers that nobody sees."""
    assert isinstance(_outcome(nodes, outputs), str)


@pytest.mark.parametrize("captured", ["x", "w", "p", "P"])
def test_what_a_subgraph_reads_is_not_scaled(captured: str) -> None:
    """A branch of If reads values of the graph without being handed them: it would see the scaled tensor."""
    nodes = "x = Mul(u, w)" if captured in ("x", "w") else "p = MatMul(u, P) g = Sigmoid(r) x = Mul(g, p)"
    inner = f"then () => (float t) {{ t = Neg({captured}) }}", "otherwise () => (float e) { e = Neg(r) }"
    branches = f"z = If (yes) <then_branch = {inner[0]}, else_branch = {inner[1]}>"
    outcome = _outcome(f"{nodes} y = MatMul(x, W) yes = Constant<value = bool {{1}}>() {branches}", "y, z")
    assert isinstance(outcome, str)


def test_graph_input_has_no_site() -> None:
    """Nothing makes a graph input, so nothing can be divided."""
    model = _model("y = MatMul(u, W)", "y")
    linears = _linears(model)
    outcome = fold_site_or_reason(linears["W"].input, [linears["W"]], linears)
    assert outcome == "no per-channel producer to fold into: the input comes from graph input 'u'"
