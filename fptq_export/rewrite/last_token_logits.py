"""Give the logits of the last token only."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from fptq_export.errors import UserError
from fptq_export.rewrite.functions import DOMAIN, W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.matching import is_constant

__all__ = ["LastTokenLogits"]

_LOGITS = "logits"
_TOKEN_AXIS = 1
_TOKENWISE = frozenset({"Add", "Sub", "Mul", "Div", "Tanh", "Cast"})
"""What may lie between the head and the logits, with constants: a scale, a soft cap, a bias, a type."""

_LINEARS = frozenset({("", "MatMul"), (DOMAIN, W4A8_STATIC), (DOMAIN, W4A8_PER_TOKEN)})


class LastTokenLogits(ir.passes.InPlacePass):
    """Take the last token right before the head, so that a prompt of S tokens gives [B, 1, V] and not [B, S, V].

    Rules:
        1. The head is the MatMul, or the W4A8 linear, that makes `logits`, past operators that treat every token and
           every logit alone.
        2. Its input [B, S, H] is sliced to [B, 1, H]; everything else that reads that tensor keeps all of it.
        3. Where the logits come from anything else, or the input is not [B, S, H], nothing is changed and the cause is
           raised: a slice of the logits themselves would save nothing.

    Before: x [B, S, H] -> MatMul -> logits [B, S, V]. After: x -> Slice [B, 1, H] -> MatMul -> logits [B, 1, V].

    Raises:
        UserError: Rule 3.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the slice."""
        logits = next((value for value in model.graph.outputs if value.name == _LOGITS), None)
        if logits is None:
            raise UserError("--logits last", "this model gives no logits", "leave the option out")
        head, after = _head(logits)
        x = head.inputs[0]
        if x is None or x.shape is None or len(x.shape) != 3:
            raise _refused(f"reads a tensor of shape {x.shape if x is not None else None}, not [batch, sequence, size]")
        last = _sliced(model, head, x)
        head.replace_input_with(0, last)
        for value in (head.outputs[0], *after):
            if value.shape is not None:
                value.shape = ir.Shape([1 if axis == _TOKEN_AXIS else dim for axis, dim in enumerate(value.shape)])
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """The output has one token."""
        (logits,) = (value for value in model.graph.outputs if value.name == _LOGITS)
        if logits.shape is None or logits.shape[_TOKEN_AXIS] != 1:
            raise ir.passes.PostconditionError(f"logits have shape {logits.shape}")


def _head(logits: ir.Value) -> tuple[ir.Node, list[ir.Value]]:
    """Rule 1: the head, and the values behind it."""
    after: list[ir.Value] = []
    value = logits
    while (node := value.producer()) is not None:
        is_linear = (node.domain, node.op_type) in _LINEARS
        if is_linear and is_constant(node.inputs[1]):
            return node, after
        varying = [operand for operand in node.inputs if not is_constant(operand)]
        if node.op_type not in _TOKENWISE or len(varying) != 1 or varying[0] is None:
            break
        after.append(value)
        value = varying[0]
    raise _refused(f"comes from {node.op_type} node {node.name!r}" if node is not None else "is an input of the graph")


def _refused(cause: str) -> UserError:
    return UserError(
        "--logits last", f"the head of this graph is not found: what it {cause}", "leave the option out, or give all"
    )


def _sliced(model: ir.Model, head: ir.Node, x: ir.Value) -> ir.Value:
    tape = Tape()
    bounds = {"start": -1, "end": np.iinfo(np.int64).max, "axis": _TOKEN_AXIS}
    constants = [_constant(model, f"{_LOGITS}.last_token.{name}", number) for name, number in bounds.items()]
    last = tape.op("Slice", [x, *constants])
    (node,) = tape.nodes
    node.name, last.name = f"{_LOGITS}/Slice", f"{_LOGITS}.last_token"
    dims = list(x.shape or ())
    last.type, last.shape = x.type, ir.Shape([dims[0], 1, dims[2]])
    model.graph.insert_before(head, tape.nodes)
    return last


def _constant(model: ir.Model, name: str, number: int) -> ir.Value:
    tensor = ir.tensor(np.array([number], np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    model.graph.register_initializer(value)
    return value
