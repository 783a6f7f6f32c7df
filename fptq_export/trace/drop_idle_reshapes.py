"""Remove a Reshape that changes no shape: a router flattens tokens that its block has flattened before."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["drop_idle_reshapes"]


def drop_idle_reshapes(model: ir.Model) -> bool:
    """Let readers of an idle Reshape read its input, so that they are seen to read one tensor.

    Rules:
        1. Idle: input and output have the same rank, and all sizes but one are known and equal. The last one is then
           equal too, for a Reshape keeps the number of elements.
        2. A Reshape that gives an output of the graph is left alone, and one whose sizes are not known.

    Before: x [n, c] -> Reshape -> y [m, c]. After: x.

    Returns:
        Whether anything changed.
    """
    idle = [node for node in model.graph if _is_idle(node)]
    for node in idle:
        source = node.inputs[0]
        if source is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            model.graph.remove(node, safe=True)
    return bool(idle)


def _is_idle(node: ir.Node) -> bool:
    source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
    if node.op_type != "Reshape" or source is None or output.is_graph_output():
        return False
    if source.shape is None or output.shape is None or len(source.shape) != len(output.shape):
        return False
    if 0 in source.shape:
        return False  # then the last size is free
    pairs = zip(source.shape, output.shape, strict=True)
    return sum(not (isinstance(before, int) and before == after) for before, after in pairs) <= 1
