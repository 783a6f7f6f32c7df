"""The form of a graph that gives the logits of every token, where the file gives those of the last one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph

__all__ = ["gives_last_only", "graph_with_all_logits"]

_LOGITS = "logits"
_TOKEN_AXIS = 1


def gives_last_only(path: Path) -> bool:
    """Whether a graph gives logits for one token a call, however many it is given.

    Raises:
        UserError: It cannot be read.
    """
    logits = [value for value in load_graph(path).graph.outputs if value.name == _LOGITS]
    return any(value.shape is not None and len(value.shape) == 3 and value.shape[_TOKEN_AXIS] == 1 for value in logits)


def graph_with_all_logits(path: Path) -> bytes:
    """A graph whose head reads every token: the file, with the slice before the head bypassed.

    All other nodes and all weights are those of the file, so what is proven of this form holds for the last token of
    the file's. Weights stay where they are: external data is looked up beside `path`.

    Args:
        path: A graph whose `logits` are [B, 1, V] because its head reads `Slice(x, [-1], [end], [1])`.

    Returns:
        The graph as protobuf; `logits` are [B, S, V].

    Raises:
        UserError: It cannot be read, or its logits do not come through exactly one such slice.
    """
    model = load_graph(path)
    (logits,) = (value for value in model.graph.outputs if value.name == _LOGITS)
    found, behind = _slices_before(logits)
    tokens = found[0].inputs[0] if len(found) == 1 else None
    if tokens is None or any(value.is_graph_input() for value in behind):
        cause = f"its logits do not come through one slice that keeps the last token ({len(found)} found)"
        raise UserError(str(path), cause, "write it again: fptq-export rewrite DIR")
    (node,) = found
    ir.convenience.replace_all_uses_with(node.outputs[0], tokens)
    model.graph.remove(node, safe=True)
    for value in behind:
        if value.producer() is not None:
            value.shape = None
    sizes = list(logits.shape or ())
    batch, sequence = (tokens.shape or ("batch", "sequence"))[:2]
    logits.shape = ir.Shape([batch, sequence, sizes[-1] if sizes else None])
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


def _slices_before(logits: ir.Value) -> tuple[list[ir.Node], list[ir.Value]]:
    """The slices that keep the last token on the way to the logits, and every value between: weights, too."""
    slices: dict[ir.Node, None] = {}
    between: dict[ir.Value, None] = {}
    waiting = [logits]
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in between:
            continue
        if node is not None and _keeps_the_last_token(node):
            slices[node] = None
            continue
        between[value] = None
        waiting += [operand for operand in node.inputs if operand is not None] if node is not None else []
    return list(slices), list(between)


def _keeps_the_last_token(node: ir.Node) -> bool:
    if node.op_type != "Slice" or node.domain or len(node.inputs) != 4:
        return False
    tensors = [value.const_value if value is not None else None for value in node.inputs[1:]]
    if any(tensor is None or tensor.size != 1 for tensor in tensors):
        return False
    start, end, axis = (int(tensor.numpy().reshape(())) for tensor in tensors if tensor is not None)
    return start == -1 and end == np.iinfo(np.int64).max and axis == _TOKEN_AXIS
