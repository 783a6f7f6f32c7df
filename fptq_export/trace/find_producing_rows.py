"""Which rows of which linear give a tensor, so that dividing the rows (and their biases) divides the tensor.

A tensor comes from a linear when, behind casts and reshapes that keep the channels, it is

1. the linear's output, or
2. a part of it along the channels: an output of Split, or a Slice with constant bounds. Projections that are one matrix
   (q, k and v; gate and up) are taken apart so.

It does not when dividing would change something else, or nobody can say which rows are meant:

* the weight or the bias is read elsewhere too, or the weight is stored [out, in] for an embedding;
* something reads the whole output beside its parts, or another part has rows of this one;
* the bounds of a part are computed, or it is taken with a step, or along another axis.

Interleaved projections (BLOOM, GPT-NeoX, Falcon) are reshaped to heads before they are taken apart: their rows are not
one range, so they are not found here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import onnx_ir as ir

from fptq_export.sites import FoldSite, Producer, SiteKind
from fptq_export.trace.find_linears import LinearNode, only_reader

__all__ = ["LinearRows", "last_dim", "producing_rows", "source_of_channels"]

Span = tuple[int, int]
"""First index and the one after the last."""


@dataclass(frozen=True)
class LinearRows:
    """All rows of a linear, or a range of them.

    Attributes:
        linear: The linear.
        span: Range of its output channels; None for all.
    """

    linear: LinearNode
    span: Span | None

    def site(
        self, kind: SiteKind, channels: int, consumers: tuple[str, ...], repeats: int = 1, head_dim: int | None = None
    ) -> FoldSite:
        """The fold site whose producers are these rows."""
        path = self.linear.path
        parts = [part for part in (self.linear.weight, self.linear.bias) if part is not None]
        return FoldSite(
            id=path if self.span is None else f"{path}[{self.span[0]}:{self.span[1]}]",
            kind=kind,
            channels=channels,
            producers=tuple(self._producer(part) for part in parts),
            producer_linear=path,
            consumers=consumers,
            repeats=repeats,
            head_dim=head_dim,
        )

    def _producer(self, part: ir.Value) -> Producer:
        if part.name is None or part.shape is None:
            raise RuntimeError("an initializer has no name or shape")
        return Producer(initializer=part.name, axis=len(part.shape) - 1, span=self.span)


def producing_rows(value: ir.Value | None, channels: int, linears: Mapping[str, LinearNode]) -> LinearRows | None:
    """The rows that give a tensor, or None.

    Args:
        value: The tensor; the caller has seen that nothing else reads it.
        channels: Its last dimension.
        linears: Every linear of the graph, by path.
    """
    source = source_of_channels(value) if value is not None else None
    part = _part(source) if isinstance(source, ir.Value) else None
    if part is not None and isinstance(source, ir.Value):
        source = source_of_channels(part.whole) if _is_alone(source, part) else None
    linear = next((linear for linear in linears.values() if linear.output is source), None)
    if linear is None or linear.transpose is not None:
        return None
    start, stop = part.span if part is not None else (0, linear.out_features)
    constants = [constant for constant in (linear.weight, linear.bias) if constant is not None]
    if stop - start != channels or any(only_reader(constant) is None for constant in constants):
        return None
    return LinearRows(linear, part.span if part is not None else None)


def source_of_channels(value: ir.Value) -> ir.Value | str:
    """The tensor before casts and reshapes that only these read, with the channels of `value` in the same order.

    A scale of a channel passes unchanged through a Cast, and through a Reshape that keeps the last dimension: GPT-2's
    Conv1D reads [tokens, channels].

    Returns:
        The tensor, or one sentence that says what else reads it.
    """
    while (node := value.producer()) is not None and (node.op_type == "Cast" or _keeps_last_dim(node)):
        before = node.inputs[0]
        if before is None or only_reader(before) is None:
            return f"its input is also read before {node.op_type} node {node.name!r}"
        value = before
    return value


def last_dim(value: ir.Value) -> int | None:
    """Size of the last dimension, None where it is not known."""
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def _keeps_last_dim(node: ir.Node) -> bool:
    if node.op_type != "Reshape" or node.inputs[0] is None:
        return False
    before, after = last_dim(node.inputs[0]), last_dim(node.outputs[0])
    return before is not None and before == after


@dataclass(frozen=True)
class _Part:
    """Some channels of a tensor."""

    whole: ir.Value
    span: Span


def _part(value: ir.Value) -> _Part | None:
    """What a Split or a Slice takes `value` from."""
    node = value.producer()
    whole = node.inputs[0] if node is not None else None
    if node is None or whole is None or whole.shape is None:
        return None
    last_axis = (-1, len(whole.shape) - 1)
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) in last_axis:
        sizes = [last_dim(output) for output in node.outputs[: (value.index() or 0) + 1]]
        ends = list(accumulate(size for size in sizes if size is not None))
        return _Part(whole, (ends[-1] - (sizes[-1] or 0), ends[-1])) if None not in sizes else None
    if node.op_type == "Slice":
        first, last, axis, step = [_constant(bound) for bound in (*node.inputs[1:], None, None)[:4]]
        channels = last_dim(whole)
        if None in (channels, first, last) or axis not in last_axis or step not in (None, 1):
            return None
        span = range(channels or 0)[first:last]
        return _Part(whole, (span.start, span.stop)) if span else None
    return None


def _constant(value: ir.Value | None) -> int | None:
    tensor = value.const_value if value is not None and value.is_initializer() else None
    return int(tensor.numpy().reshape(())) if tensor is not None and tensor.size == 1 else None


def _is_alone(value: ir.Value, part: _Part) -> bool:
    """Whether no other reader of the whole has channels of this part; a reader of its shape has none."""
    readers = [use.node for use in part.whole.uses() if use.node.op_type != "Shape"]
    others = [_part(output) for node in readers for output in node.outputs if output is not value]
    start, stop = part.span
    apart = all(other is not None and (other.span[1] <= start or stop <= other.span[0]) for other in others)
    return apart and not part.whole.is_graph_output()
