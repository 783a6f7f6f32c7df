"""Compute in FLOAT what the graph computes in FLOAT16 or BFLOAT16, for processors without arithmetic in those types."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

__all__ = ["WidenToFloat"]

_NARROW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_INLINE_SIZE = 65536
"""Elements of a constant that is widened in the file; larger ones stay narrow and are cast where they are read."""


class WidenToFloat(ir.passes.InPlacePass):
    """Change every FLOAT16 and BFLOAT16 value of a graph to FLOAT, inputs and outputs among them.

    Rules:
        1. Constants of up to 65536 elements are widened, which is exact. Larger ones keep their type and are cast where
           they are read; of a `Gather`, only the gathered rows are cast.
        2. `Cast` to a narrow type becomes one to FLOAT; types of values follow.
        3. Inputs that `keep` names stay as they are: those of operators that read narrow constants themselves.

    Every result has at most the error that it had: what was rounded to the narrow type is not rounded any more.

    Args:
        keep: (domain, operator, index of an input) that stays narrow.
    """

    def __init__(self, keep: Collection[tuple[str, str, int]] = ()) -> None:
        super().__init__()
        self._keep = frozenset(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen the graph; functions must be gone."""
        narrow = [value for value in model.graph.initializers.values() if value.dtype in _NARROW]
        for value in narrow:
            self._widen_constant(model, value)
        for node in model.graph:
            if node.op_type == "Cast" and node.attributes.get_int("to", 0) in _NARROW:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
        produced = [output for node in model.graph for output in node.outputs]
        for value in (*model.graph.inputs, *produced):
            if value.dtype in _NARROW and not _is_kept_gather(value):
                value.dtype = ir.DataType.FLOAT
        return ir.passes.PassResult(model, modified=bool(narrow))

    def _widen_constant(self, model: ir.Model, value: ir.Value) -> None:
        tensor = value.const_value
        uses = [use for use in value.uses() if (use.node.domain, use.node.op_type, use.idx) not in self._keep]
        if tensor is None or not uses:
            return
        if tensor.size <= _INLINE_SIZE:
            wide = ir.tensor(tensor.numpy().astype(np.float32), name=f"{value.name}.float")
            new = ir.Value(name=wide.name, shape=value.shape, type=ir.TensorType(wide.dtype), const_value=wide)
            model.graph.register_initializer(new)
            for node, index in uses:
                node.replace_input_with(index, new)
            return
        for node, index in uses:
            if node.op_type == "Gather" and not node.domain and index == 0:
                _cast_after(model, node)
            else:
                _cast_before(model, node, index)


def _is_kept_gather(value: ir.Value) -> bool:
    node = value.producer()
    return (
        node is not None and node.op_type == "Gather" and node.inputs[0] is not None and node.inputs[0].dtype in _NARROW
    )


def _cast_after(model: ir.Model, gather: ir.Node) -> None:
    """The rows that a `Gather` takes, in FLOAT for all that read them."""
    rows = gather.outputs[0]
    cast = ir.node("Cast", [rows], {"to": int(ir.DataType.FLOAT)}, name=f"{gather.name}/Cast")
    wide = cast.outputs[0]
    wide.name, wide.type, wide.shape = f"{rows.name}.float", ir.TensorType(ir.DataType.FLOAT), rows.shape
    ir.convenience.replace_all_uses_with(rows, wide, replace_graph_outputs=True)
    cast.replace_input_with(0, rows)
    model.graph.insert_after(gather, cast)


def _cast_before(model: ir.Model, node: ir.Node, index: int) -> None:
    value = node.inputs[index]
    assert value is not None
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=f"{node.name}/Cast_{index}")
    wide = cast.outputs[0]
    wide.name, wide.type = f"{value.name}.float.{node.name}", ir.TensorType(ir.DataType.FLOAT)
    wide.shape = value.shape
    model.graph.insert_before(node, cast)
    node.replace_input_with(index, wide)
