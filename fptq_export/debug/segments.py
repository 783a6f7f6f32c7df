"""Cut a causal graph into what runs before its decoder blocks, the blocks, and what runs behind them.

A traced graph does not say which block a node belongs to, and shares between blocks what does not depend on the tokens
(masks, rotary tables). So the places to cut are found by how values flow. Values that depend on the token ids, not only
on their number, are followed in the order of the nodes; between the last linear of a block and the first one of the
next, the hidden states are the one such value that anything further on still reads. What does not depend on the tokens
is computed anew in each segment that needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from fptq_export.debug.graph_linears import GraphLinear
from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph
from fptq_export.rewrite.emit_range_outputs import without_range_output
from fptq_export.sites import Sites
from fptq_export.verify.all_logits import gives_last_only, graph_with_all_logits

__all__ = ["Segment", "graph_of_run", "segments_of_graph"]

_IDS, _LOGITS = "input_ids", "logits"


@dataclass(frozen=True)
class Segment:
    """A part of a graph."""

    block: int | None
    """Decoder block; None before and behind them."""
    start: ir.Value | None
    """The hidden states that it reads, [B, S, H]; None for the first segment, which reads token ids."""
    end: ir.Value
    """The hidden states, or logits, that it gives."""
    linears: tuple[GraphLinear, ...]
    """Its quantized linears, in the order of the graph."""


def graph_of_run(path: Path) -> ir.Model:
    """The graph of a run, giving the logits of every token and no range output; weights stay on disk.

    Raises:
        UserError: It cannot be read.
    """
    if not gives_last_only(path):
        return without_range_output(load_graph(path))
    model = ir.from_proto(onnx.load_model_from_string(graph_with_all_logits(path)))
    ir.external_data.set_base_dir(model.graph, path.parent)
    return without_range_output(model)


def segments_of_graph(
    model: ir.Model, sites: Sites, linears: Mapping[str, GraphLinear], blocks: str, count: int
) -> list[Segment]:
    """Cut a graph: what runs before the blocks, each block, what runs behind them.

    Args:
        model: Gives the logits of every token.
        sites: All its linears; those in float show where blocks are, too.
        linears: The quantized ones.
        blocks: Torch path of the list of blocks.
        count: Blocks.

    Raises:
        UserError: There is no place to cut.
    """
    nodes = list(model.graph)
    positions = {node: position for position, node in enumerate(nodes)}
    where = {path: positions[_producer(linear.y)] for path, linear in linears.items()}
    named = {node.name: position for node, position in positions.items()}
    where |= {item.path: named[item.node] for item in sites.linears if item.path not in where and item.node in named}
    alive = _alive_values(model, nodes)
    cuts: list[tuple[int, ir.Value]] = []
    last = -1
    for index in range(count):
        inside = [position for path, position in where.items() if path.startswith(f"{blocks}.{index}.")]
        found = [cut for cut in alive if inside and last <= cut[0] < min(inside)]
        if not found:
            raise _uncut(f"before block {index}")
        cuts.append(found[-1])
        last = max(inside)
    behind = next((cut for cut in alive if cut[0] >= last), None)
    if behind is None:
        raise _uncut("behind the last block")
    logits = next(value for value in model.graph.outputs if value.name == _LOGITS)
    return _segments([*cuts, behind], logits, linears, where)


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None, "a linear's product is computed"
    return node


def _uncut(where: str) -> UserError:
    cause = f"has no single value that carries the hidden states {where}"
    return UserError("model.w4a8.onnx", cause, "fptq-export verify DIR compares the graph as a whole")


def _segments(
    cuts: Sequence[tuple[int, ir.Value]],
    logits: ir.Value,
    linears: Mapping[str, GraphLinear],
    where: Mapping[str, int],
) -> list[Segment]:
    """Segments between cuts; linears go where their nodes lie."""
    starts = [(-1, None), *cuts]
    ends = [*cuts, (max(where.values()) + 1, logits)]
    ordered = sorted(linears.values(), key=lambda linear: where[linear.path])
    segments = []
    for index, ((first, start), (last, end)) in enumerate(zip(starts, ends, strict=True)):
        inside = tuple(linear for linear in ordered if first < where[linear.path] <= last)
        block = index - 1 if 0 < index < len(cuts) else None
        segments.append(Segment(block, start, end, inside))
    return segments


def _alive_values(model: ir.Model, nodes: Sequence[ir.Node]) -> list[tuple[int, ir.Value]]:
    """Positions behind which exactly one value that depends on the token ids is read, and that value."""
    depends = {value for value in model.graph.inputs if value.name == _IDS}
    last_use: dict[ir.Value, int] = {}
    for position, node in enumerate(nodes):
        if node.op_type == "Shape":  # the number of tokens, not the tokens
            continue
        read = [value for value in node.inputs if value in depends]
        last_use.update(dict.fromkeys(read, position))
        if read:
            depends.update(node.outputs)
    found: list[tuple[int, ir.Value]] = []
    alive: set[ir.Value] = set()
    for position, node in enumerate(nodes):
        alive = {value for value in alive if last_use[value] > position}
        alive.update(value for value in node.outputs if last_use.get(value, -1) > position)
        if len(alive) == 1 and all(last_use[value] <= position for value in depends if value.is_graph_input()):
            found.append((position, next(iter(alive))))
    return found
