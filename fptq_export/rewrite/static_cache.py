"""A KV cache of fixed length that is written in place, instead of one that grows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from fptq_export.errors import UserError
from fptq_export.rewrite.matching import has_shape, operand_beside, producer, scalar
from fptq_export.rewrite.names import UniqueNames

__all__ = ["CACHE_DIM", "OPSET", "WRITE_INDICES", "StaticCache"]

OPSET = 24
"""First opset with TensorScatter. Between 21 and 24 the operators of these graphs only gained types and attributes."""
_IR_VERSION = 11
WRITE_INDICES = "write_indices"
CACHE_DIM = "cache"
"""Name of the dimension that was `past`, `past + sequence` or `total`."""

_PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_TOKENS = ("input_ids", "inputs_embeds", "position_ids")
_SEQUENCE_AXIS = 2
_GROWING = frozenset({"past", "total", "past+sequence", "sequence+past"})
_MASK = frozenset(
    {
        *("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal", "And", "Or", "Not"),
        *("Add", "Sub", "Mul", "Div", "Abs", "Cast", "Expand"),
    }
)
"""What a mask may do with the positions of queries: everything by element, so that a batch axis passes through."""


@dataclass(frozen=True)
class _Queries:
    """Positions of the new tokens, and the masks that are made of them.

    Attributes:
        node: `Range + past` [S].
        laid_out: The same as [1, 1, S, 1].
        between: What is computed from those on the way to masks.
        masks: Every `Where` whose condition is computed from them.
    """

    node: ir.Node
    laid_out: tuple[ir.Value, ...]
    between: tuple[ir.Value, ...]
    masks: tuple[ir.Node, ...]


class StaticCache(ir.passes.InPlacePass):
    """Write new keys and values into slots of a cache [B, H, cache, D], at an index for each sequence.

    Rules:
        1. `Concat(past, new)` whose result is an output becomes `TensorScatter(past, new, write_indices)`; input and
           output are [B, H, cache, D], and `write_indices` INT64 [B] is a new input: slots that are filled before.
        2. The length of past and new becomes that of the cache. The position of query i, which was past + i, becomes
           write_indices + i, for each sequence: so a mask keeps its meaning (causal, sliding window, chunks), and slots
           that are not written yet lie behind every query.
        3. `attention_mask` is [B, cache]; 0 hides a slot (padding on the left). A slot behind the query is hidden
           whatever it says.
        4. A query sees its own slot whatever `attention_mask` says. Of a real token that is so anyway; a query of
           padding would see nothing, and an operator that takes a mask of truth values would divide 0 by 0.
        5. Any other reader of the cache or of its length is refused with its name.

    Before: past, new -> Concat -> present [B, H, past + S, D]. After: past, new, write_indices -> TensorScatter ->
    present [B, H, cache, D]. Equal to the growing cache where `write_indices` is the length of the past: hidden slots
    enter the softmax as 0.

    Raises:
        UserError: Rule 5, or the graph has no cache.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every layer's cache, the positions and the masks."""
        caches = [value for value in model.graph.inputs if _PAST.fullmatch(value.name or "")]
        concats = [_concat(past) for past in caches]
        lengths = [length for past in caches for length in _lengths(past)]
        if not caches or not lengths:
            raise _refused("model", "has no KV cache whose length it uses")
        plans = [_plan(length) for length in lengths]
        indices = _write_indices(model)
        for past, concat in zip(caches, concats, strict=True):
            _scatter(model, past, concat, indices)
        names = UniqueNames(model)
        for length, (totals, queries) in zip(lengths, plans, strict=True):
            for total in totals:
                ir.convenience.replace_all_uses_with(total.outputs[0], length)
                model.graph.remove(total, safe=True)
            for positions in queries:
                _replace_positions(model, positions, length, indices, names)
        _rename_dimensions(model)
        model.graph.opset_imports[""] = OPSET
        model.ir_version = max(model.ir_version or 0, _IR_VERSION)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Every layer's cache has the same shape before and after."""
        shapes = {value.name: str(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
        for name, shape in shapes.items():
            if (
                name is not None
                and _PAST.fullmatch(name)
                and shapes[name.replace("past_key_values", "present")] != shape
            ):
                raise ir.passes.PostconditionError(f"{name!r} is {shape} before a call and another shape after it")


def _refused(where: str, cause: str) -> UserError:
    return UserError(f"--kv-cache static: {where}", cause, "use --kv-cache concat for this model")


def _concat(past: ir.Value) -> ir.Node:
    """Rule 1: the only node that reads what is in a cache."""
    readers = [use.node for use in past.uses() if use.node.op_type != "Shape"]
    node = readers[0] if len(readers) == 1 else None
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2 or node.inputs[0] is not past:
        raise _refused(f"{past.name}", "is read by something else than one Concat behind it")
    if node.attributes.get_int("axis", 0) not in (_SEQUENCE_AXIS, -2) or not node.outputs[0].is_graph_output():
        raise _refused(f"{past.name}", f"is not extended along its tokens into an output by {node.name!r}")
    return node


def _lengths(past: ir.Value) -> Iterator[ir.Value]:
    """The scalars that hold the length of a cache."""
    for use in past.uses():
        if use.node.op_type != "Shape":
            continue
        start, end = use.node.attributes.get_int("start", 0), use.node.attributes.get_int("end", 4)
        if not start <= _SEQUENCE_AXIS < end:
            continue
        readers = [reader.node for reader in use.node.outputs[0].uses()]
        if (start, end) != (_SEQUENCE_AXIS, _SEQUENCE_AXIS + 1) or any(node.op_type != "Squeeze" for node in readers):
            raise _refused(f"node {use.node.name!r}", "reads the length of the cache with its other dimensions")
        yield from (node.outputs[0] for node in readers)


def _plan(length: ir.Value) -> tuple[list[ir.Node], list[_Queries]]:
    """Readers of the length of the past: those that add the new tokens, and those that place the queries."""
    totals, queries = [], []
    for use in length.uses():
        other = operand_beside(use.node, length) if use.node.op_type == "Add" else None
        if _is_sequence(other):
            totals.append(use.node)
        elif (steps := producer(other, "Range")) is not None and _counts_sequence(steps):
            queries.append(_queries(use.node))
        else:
            raise _refused(f"node {use.node.name!r}", f"uses the length of the past in {use.node.op_type}")
    return totals, queries


def _queries(node: ir.Node) -> _Queries:
    laid_out = _unsqueezed(node.outputs[0])
    between, masks = _masks(laid_out)
    return _Queries(node, tuple(laid_out), tuple(between), tuple(masks))


def _is_sequence(value: ir.Value | None) -> bool:
    """Whether a scalar is the number of new tokens."""
    squeeze = producer(value, "Squeeze")
    shape = producer(squeeze.inputs[0], "Shape") if squeeze is not None else None
    source = shape.inputs[0] if shape is not None else None
    return (
        shape is not None
        and (shape.attributes.get_int("start", 0), shape.attributes.get_int("end", 0)) == (1, 2)
        and source is not None
        and source.name in _TOKENS
    )


def _counts_sequence(steps: ir.Node) -> bool:
    start, limit, delta = steps.inputs
    return scalar(start) == 0 and scalar(delta) == 1 and _is_sequence(limit)


def _write_indices(model: ir.Model) -> ir.Value:
    batch = next(value.shape[0] for value in model.graph.inputs if value.name in _TOKENS and value.shape is not None)
    indices = ir.Value(name=WRITE_INDICES, shape=ir.Shape([batch]), type=ir.TensorType(ir.DataType.INT64))
    place = sum(not _PAST.fullmatch(value.name or "") for value in model.graph.inputs)
    model.graph.inputs.insert(place, indices)
    return indices


def _scatter(model: ir.Model, past: ir.Value, concat: ir.Node, indices: ir.Value) -> None:
    present = concat.outputs[0]
    node = ir.node(
        "TensorScatter",
        [past, concat.inputs[1], indices],
        {"axis": _SEQUENCE_AXIS, "mode": "linear"},
        name=f"{present.name}/TensorScatter",
    )
    written = node.outputs[0]
    model.graph.insert_before(concat, [node])
    ir.convenience.replace_all_uses_with(present, written, replace_graph_outputs=True)
    written.name, written.type, written.shape = present.name, present.type, present.shape
    model.graph.remove(concat, safe=True)


def _replace_positions(
    model: ir.Model, queries: _Queries, length: ir.Value, indices: ir.Value, names: UniqueNames
) -> None:
    """Rules 2 and 4."""
    steps = next(value for value in queries.node.inputs if value is not None and producer(value, "Range") is not None)
    zero, _, one = counter.inputs if (counter := producer(steps, "Range")) is not None else (None, None, None)
    tape = Tape()
    each = tape.op("Add", [tape.op("Unsqueeze", [indices, _axes(model, 1)]), steps])
    slots = tape.op("Unsqueeze", [each, _axes(model, 1, 3)])
    own = tape.op("Equal", [tape.op("Range", [zero, length, one]), slots])
    slots.dtype, own.dtype = ir.DataType.INT64, ir.DataType.BOOL
    names.name_nodes(tape.nodes, WRITE_INDICES)
    model.graph.insert_before(queries.node, tape.nodes)
    for mask in queries.masks:
        _see_own_slot(model, mask, own, names)
    for value in queries.laid_out:
        ir.convenience.replace_all_uses_with(value, slots)
    for value in queries.between:
        value.shape = None  # of a batch from now on


def _axes(model: ir.Model, *axes: int) -> ir.Value:
    name = f"{WRITE_INDICES}.axes_{'_'.join(map(str, axes))}"
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.array(axes, np.int64), name=name)
        value = ir.Value(name=name, shape=ir.Shape([len(axes)]), type=ir.TensorType(ir.DataType.INT64))
        value.const_value = tensor
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def _unsqueezed(positions: ir.Value) -> list[ir.Value]:
    """The tensors [1, 1, S, 1] that positions [S] become."""
    found = []
    for use in positions.uses():
        if use.node.op_type != "Unsqueeze":
            raise _refused(f"node {use.node.name!r}", f"uses the positions of new tokens in {use.node.op_type}")
        value = use.node.outputs[0]
        if any(reader.node.op_type == "Unsqueeze" for reader in value.uses()):
            found += _unsqueezed(value)
        elif has_shape(value, 1, 1, None, 1):
            found.append(value)
        else:
            raise _refused(f"node {use.node.name!r}", f"lays out the positions of new tokens as {value.shape}")
    return found


def _masks(positions: list[ir.Value]) -> tuple[list[ir.Value], list[ir.Node]]:
    """What is computed from positions up to conditions of `Where`, and those nodes."""
    between: dict[ir.Value, None] = {}
    masks: dict[ir.Node, None] = {}
    waiting = list(positions)
    while waiting:
        for use in waiting.pop().uses():
            if use.node.op_type == "Where" and use.idx == 0:
                masks[use.node] = None
            elif use.node.op_type not in _MASK or use.node.domain:
                raise _refused(f"node {use.node.name!r}", f"uses the positions of new tokens in {use.node.op_type}")
            elif use.node.outputs[0] not in between:
                between[use.node.outputs[0]] = None
                waiting.append(use.node.outputs[0])
    return list(between), list(masks)


def _see_own_slot(model: ir.Model, mask: ir.Node, own: ir.Value, names: UniqueNames) -> None:
    """Rule 4."""
    node = ir.node("Or", [mask.inputs[0], own])
    node.outputs[0].dtype = ir.DataType.BOOL
    names.name_nodes([node], WRITE_INDICES)
    model.graph.insert_before(mask, [node])
    mask.replace_input_with(0, node.outputs[0])


def _rename_dimensions(model: ir.Model) -> None:
    outputs = (output for node in model.graph for output in node.outputs)
    for value in (*model.graph.inputs, *outputs):
        if value.shape is not None:
            value.shape = ir.Shape([CACHE_DIM if _grows(dim) else dim for dim in value.shape])


def _grows(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and str(dim.value).replace(" ", "") in _GROWING
