"""What rewrites ask of a graph when they look for a pattern, and how they put a node in its place."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["has_shape", "is_constant", "only_reader", "operand_beside", "producer", "replace_node", "scalar", "sizes"]


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes a value, if it is a standard operator of one of these types."""
    node = value.producer() if value is not None else None
    return node if node is not None and not node.domain and node.op_type in op_types else None


def only_reader(value: ir.Value, *op_types: str) -> ir.Node | None:
    """The node that reads a value, if it is of one of these types and nothing else reads it, nor the caller."""
    uses = tuple(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if not node.domain and node.op_type in op_types else None


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initializer, or a weight that is transposed where it is read."""
    node = producer(value, "Transpose")
    value = node.inputs[0] if node is not None else value
    return value is not None and value.is_initializer()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element."""
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return float(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def operand_beside(node: ir.Node, value: ir.Value | None) -> ir.Value | None:
    """The other input of a node with two; None where both are `value`, or neither is."""
    if len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return None
    first, second = node.inputs
    return second if first is value else first if second is value else None


def has_shape(value: ir.Value | None, *dims: int | None) -> bool:
    """Whether a value has this rank and these sizes; None fits every size."""
    if value is None or value.shape is None or len(value.shape) != len(dims):
        return False
    return all(wanted is None or wanted == found for wanted, found in zip(dims, value.shape, strict=True))


def sizes(value: ir.Value | None, rank: int) -> tuple[int | None, ...]:
    """Dimensions of a value, None where one is open; all of them None where the value has another rank."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return (None,) * rank
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def replace_node(model: ir.Model, last: ir.Node, fused: ir.Node) -> None:
    """Put a node in the place of the last one of a pattern; what only the pattern read is removed.

    Args:
        model: Changed in place.
        last: Gives the output that others read.
        fused: Not in the graph yet; its only output takes the name, type and shape of that output.
    """
    before, after = last.outputs[0], fused.outputs[0]
    model.graph.insert_before(last, [fused])
    after.name, after.type, after.shape = before.name, before.type, before.shape
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    _remove_unread(model, last)


def _remove_unread(model: ir.Model, node: ir.Node) -> None:
    """Remove a node that nothing reads, and then what only it read."""
    if any(output.uses() or output.is_graph_output() for output in node.outputs):
        return
    producers = [value.producer() for value in node.inputs if value is not None]
    model.graph.remove(node, safe=True)
    for before in dict.fromkeys(producers):
        if before is not None and before.graph is model.graph:
            _remove_unread(model, before)
