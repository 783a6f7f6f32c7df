"""Graphs that give statistics of their inner tensors, reduced inside, instead of their outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray
from onnx_ir.tape import Tape

__all__ = ["WatchedTensor", "instrument_graph"]


@dataclass(frozen=True)
class WatchedTensor:
    """A tensor that layers read."""

    name: str
    channels: int | None
    """Size of its last dimension; None for one number over all of it, as convolutions need."""
    gram: bool = False
    """Whether sum x x^T over the rows is wanted too."""


def instrument_graph(model: ir.Model, watched: Sequence[WatchedTensor]) -> list[tuple[str, ...]]:
    """Replace the outputs of a graph, in place; what only its own outputs need is then not computed.

    Before: x -> ... -> y. After, for every watched x of shape [..., channels], in FLOAT:

        max |x|, [channels], or [1] without channels;  sum |x|, which is NaN or infinite where an x is;
        with `gram`: x^T x over all rows, [channels, channels], and the number of rows, INT64 [1]

    Args:
        model: A prepared graph.
        watched: Tensors of it, each once.

    Returns:
        Names of the new outputs of each tensor, in this order.
    """
    values = {value.name: value for value in _values(model)}
    model.graph.outputs.clear()
    names = []
    for index, tensor in enumerate(watched):
        tape = Tape()
        results = _statistics(tape, values[tensor.name], tensor)
        for kind, value in results.items():
            value.name = f"fptq.{kind}.{index}"
            value.dtype = ir.DataType.INT64 if kind == "rows" else ir.DataType.FLOAT
        model.graph.extend(tape.nodes)
        model.graph.outputs.extend(results.values())
        names.append(tuple(value.name or "" for value in results.values()))
    common.RemoveUnusedNodesPass()(model)
    return names


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]


def _statistics(tape: Tape, x: ir.Value, tensor: WatchedTensor) -> dict[str, ir.Value]:
    wide = x if x.dtype == ir.DataType.FLOAT else tape.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})
    flat = tape.op("Reshape", [wide, _constant(tape, np.array([-1, tensor.channels or 1], np.int64))])
    magnitude = tape.op("Abs", [flat])
    rows_axis = _constant(tape, np.array([0], np.int64))
    found = {
        "absmax": tape.op("ReduceMax", [magnitude, rows_axis], {"keepdims": 0}),
        "sum": tape.op("ReduceSum", [magnitude], {"keepdims": 0}),
    }
    if tensor.gram:
        found["gram"] = tape.op("MatMul", [tape.op("Transpose", [flat], {"perm": (1, 0)}), flat])
        found["rows"] = tape.op("Shape", [flat], {"start": 0, "end": 1})
    return found


def _constant(tape: Tape, array: NDArray[np.generic]) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(array)})
