"""Write the linears that torch exports as Gemm like all others: MatMul and Add."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

__all__ = ["expand_gemm"]


def expand_gemm(model: ir.Model) -> bool:
    """Replace the Gemm of a linear by what torch exports for a linear with an input of three dimensions.

    Rules:
        1. `Gemm(x, W, b, transB=1)` with a constant W [out, in] becomes `Add(MatMul(x, Transpose(W)), b)`.
        2. `Gemm(x, W, b)` with a constant W [in, out], as GPT-2's Conv1D stores it, becomes `Add(MatMul(x, W), b)`.
        3. Without b there is no Add.
        4. A Gemm that scales its operands or transposes x, or whose W is computed, is left alone.

    Before: x, W, b -> Gemm. After: x, W [in, out] -> MatMul -> Add(b). The new nodes keep the exporter's metadata,
    which says which module they belong to.

    Returns:
        Whether anything changed.
    """
    linears = [node for node in model.graph if _is_linear(node)]
    for node in linears:
        _expand(model, node)
    return bool(linears)


def _is_linear(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or node.domain:
        return False
    get = node.attributes.get_float
    unscaled = get("alpha", 1.0) == 1.0 and get("beta", 1.0) == 1.0
    weight = node.inputs[1]
    constant = weight is not None and weight.is_initializer()
    return unscaled and constant and node.attributes.get_int("transA", 0) == 0


def _expand(model: ir.Model, node: ir.Node) -> None:
    x, weight, bias = (*node.inputs, None)[:3]
    if x is None or weight is None:
        raise RuntimeError(f"Gemm {node.name!r} lacks an input")
    tape = Tape()
    if node.attributes.get_int("transB", 0) == 1:
        weight = tape.op("Transpose", [weight], {"perm": (1, 0)})
    before = node.outputs[0]
    y = tape.op("MatMul", [x, weight])
    if bias is not None:
        y.type, y.shape = before.type, before.shape
        y = tape.op("Add", [y, bias])
    for new in tape.nodes:
        new.metadata_props.update(node.metadata_props)
        new.name = f"{node.name}/{new.op_type}"
    y.name, y.type, y.shape = before.name, before.type, before.shape
    model.graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(before, y, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
