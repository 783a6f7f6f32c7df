from __future__ import annotations

import onnx_ir as ir

from fptq_export.trace.clean_up import clean_up, strip_trace_metadata

KIND = "pkg.torch.export.graph_signature.InputSpec.kind"


def _model(nodes: str, constants: str, outputs: str = "y") -> ir.Model:
    promised = ", ".join(f"float[B, S] {name}" for name in outputs.split(", "))
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[B, S] x) => ({promised}) <{constants}> {{ {nodes} }}'
    )


def _ones(name: str, size: int) -> str:
    return f"float[{size}] {name} = {{{', '.join('1' for _ in range(size))}}}"


def test_equal_parameters_stay_apart() -> None:
    """Two norms of all ones are two norms: merged, neither could be equalized (its weight would have two readers)."""
    model = _model("a = Mul(x, v) y = Mul(a, w)", f"{_ones('v', 16)}, {_ones('w', 16)}")
    clean_up(model)
    assert {"v", "w"} <= set(model.graph.initializers)


def test_parameters_are_not_folded() -> None:
    """Gemma's 1 + w stays a sum of a named parameter, however small: the fold divides the parameter."""
    model = _model("one = Constant<value = float {1}>() o = Add(w, one) y = Mul(x, o)", _ones("w", 16))
    model.graph.initializers["w"].metadata_props[KIND] = "PARAMETER"
    clean_up(model)
    assert [node.op_type for node in model.graph] == ["Add", "Mul"]
    assert "w" in model.graph.initializers


def test_shape_arithmetic_is_folded_and_constants_are_initializers() -> None:
    """Constants computed from constants disappear: no Constant node is left in the file."""
    nodes = "a = Constant<value = float {2}>() b = Constant<value = float {3}>() c = Mul(a, b) y = Mul(x, c)"
    model = _model(nodes, "float unused = {1}")
    clean_up(model)
    assert [node.op_type for node in model.graph] == ["Mul"]


def test_equal_and_unused_nodes_go() -> None:
    """Two equal nodes become one; a node that nothing reads goes."""
    model = _model("a = Relu(x) b = Relu(x) unused = Sigmoid(x) y = Add(a, b)", "float one = {1}")
    clean_up(model)
    assert [node.op_type for node in model.graph] == ["Relu", "Add"]


def test_outputs_keep_their_names() -> None:
    """Two outputs computed by equal nodes both survive under their names."""
    model = _model("y = Relu(x) z = Relu(x)", "float one = {1}", outputs="y, z")
    clean_up(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]


def test_every_note_is_removed() -> None:
    """Notes on nodes, inputs, outputs and initializers are gone."""
    model = _model("y = Mul(x, w)", _ones("w", 16))
    (node,) = model.graph
    for owner in (node, node.outputs[0], model.graph.inputs[0], model.graph.initializers["w"]):
        owner.metadata_props["note"] = "modeling_llama.py, line 1"
    strip_trace_metadata(model)
    assert "modeling_llama" not in str(ir.to_proto(model))
