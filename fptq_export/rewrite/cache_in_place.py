"""Attention that keeps its keys and values where they are, as an operator of `plugins/cpu/ort_ops.cpp`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from fptq_export.cpu.cached_attention import KEY_PANEL, MAX_HEAD_SIZE
from fptq_export.rewrite.initializers import constant_initializer
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN
from fptq_export.rewrite.matching import only_reader, producer, sizes

__all__ = ["CACHED_ATTENTION", "CacheInPlace"]

CACHED_ATTENTION = "FptqCachedAttention"
_OTHER_ROTATIONS = ("interleaved", "rotary_embedding_dim")
_TOKENS_FIRST = (0, 2, 1, 3)
_COMPARISONS = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"})
_MASK_OPERATORS = frozenset(
    {"And", "Cast", "Concat", "Expand", "GatherND", "Max", "Range", "Reshape", "Shape", "Slice", "Squeeze", "Unsqueeze"}
    | {"Add", "LessOrEqual", "Gather", "Constant"}
)


class _LeftAloneError(Exception):
    """Why a graph keeps its attention as it is."""


@dataclass(frozen=True)
class _Cached:
    """An `Attention` over a growing cache; values of rank 4 are [batch, heads, tokens, channels]."""

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    heads: int
    kv_heads: int
    scale: float

    @property
    def presents(self) -> tuple[ir.Value, ir.Value]:
        """Keys and values with the new tokens."""
        present_key, present_value = self.node.inputs[1:3]
        assert present_key is not None
        assert present_value is not None
        return present_key, present_value


class CacheInPlace(ir.passes.InPlacePass):
    """Replace `Attention` over `Concat(past, new)` by `FptqCachedAttention`.

    The operator writes new keys and values behind the past ones in the same memory, where caller and graph agree on one
    buffer; as traced, every call copies the whole cache. Keys lie in an order of its own.

    Rules:
        1. All attentions of a graph or none: they share the input that says how long the cache is.
        2. Keys and values are `Concat(past_key_values.N.*, new)` along the tokens, and graph outputs.
        3. The mask lets a token see those before it and no other restriction: its computation has one comparison,
           `LessOrEqual`, and otherwise only operators that move numbers around. The operator masks so on its own.
        4. Rotations (`RotaryEmbedding`) of queries and keys by the same angles, of whole heads by halves, are left to
           the operator. Others are done on [batch, tokens, heads x channels], which it reads.
        5. A head has a multiple of 16 channels, up to 256.
        6. Otherwise the graph stays as it is, with the reason in `left_alone`.

    After it the graph reads `attention_mask` for its length only: every token counts, there is no padding.

    Attributes:
        fused: Attentions replaced by the last call.
        left_alone: Attention -> why the graph stays as it is.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0
        self.left_alone: Mapping[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace all attentions, if all of them match."""
        self.fused, left_alone, found = 0, {}, []
        attentions = [node for node in model.graph if node.op_type == "Attention" and not node.domain]
        for node in attentions:
            try:
                found.append(_match(node))
            except _LeftAloneError as reason:
                left_alone[node.name or ""] = str(reason)
        caches = [value for value in model.graph.inputs if (value.name or "").startswith("past_key_values.")]
        if not left_alone and len(caches) != 2 * len(found):
            left_alone["past_key_values"] = "not every cache is read by an attention of that form"
        self.left_alone = left_alone
        if left_alone or not found:
            return ir.passes.PassResult(model, modified=False)
        total = _total(model)
        for cached in found:
            _replace(model, cached, total)
        self.fused = len(found)
        model.graph.opset_imports[CPU_DOMAIN] = 1
        common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=True)


def _match(node: ir.Node) -> _Cached:
    query, key, value, mask = (*node.inputs, None, None, None, None)[:4]
    if query is None or len([operand for operand in node.inputs if operand is not None]) != 4:
        raise _LeftAloneError("it has other inputs than queries, keys, values and a mask")
    past_key, new_key = _joined(key)
    past_value, new_value = _joined(value)
    heads, kv_heads, scale = sizes(query, 4)[1], sizes(past_key, 4)[1], node.attributes.get_float("scale", 0.0)
    if heads is None or kv_heads is None or not scale or sizes(past_key, 4)[3] != sizes(query, 4)[3]:
        raise _LeftAloneError("its heads, channels or scale are not known, or differ")
    if sizes(past_value, 4)[3] != sizes(past_key, 4)[3]:
        raise _LeftAloneError("its values have other channels than its keys")
    channels = sizes(past_key, 4)[3] or 0
    if not 0 < channels <= MAX_HEAD_SIZE or channels % KEY_PANEL:
        raise _LeftAloneError(f"its heads have {channels} channels: no multiple of {KEY_PANEL} up to {MAX_HEAD_SIZE}")
    _check_mask(mask)
    return _Cached(node, query, new_key, new_value, past_key, past_value, heads, kv_heads, scale)


def _joined(value: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """Rule 2: the past and the new."""
    joined = producer(value, "Concat")
    if (
        joined is None
        or value is None
        or len(joined.inputs) != 2
        or joined.attributes.get_int("axis", 0) not in (2, -2)
    ):
        raise _LeftAloneError("its keys and values are not those of the past joined with new ones")
    past, new = joined.inputs
    if past is None or new is None or not past.is_graph_input() or not value.is_graph_output():
        raise _LeftAloneError("its keys and values do not come from an input of the graph and go to an output")
    return past, new


def _check_mask(mask: ir.Value | None) -> None:
    """Rule 3."""
    comparisons, waiting, seen = 0, [mask], set()
    while waiting:
        value = waiting.pop()
        node = value.producer() if value is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        comparisons += node.op_type in _COMPARISONS
        if node.domain or node.op_type not in _MASK_OPERATORS:
            raise _LeftAloneError(f"its mask is computed with {node.op_type}: it may hide more than later tokens")
        waiting += node.inputs
    if comparisons != 1:
        raise _LeftAloneError(f"its mask comes from {comparisons} comparisons, not from one")


def _total(model: ir.Model) -> ir.Value:
    """INT32, one number: tokens in the cache after the call."""
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    axis = constant_initializer(model, f"{CACHED_ATTENTION}.axis", np.array([0], np.int64))
    tape = ir.tape.Tape()
    narrow = tape.op("Cast", [tape.op("Shape", [mask], {"start": 1, "end": 2})], {"to": int(ir.DataType.INT32)})
    total = tape.op("Squeeze", [narrow, axis])
    for index, node in enumerate(tape.nodes):
        node.name = f"{CACHED_ATTENTION}/total_{index}"
        node.outputs[0].name = f"{CACHED_ATTENTION}.total_{index}"
    model.graph.insert_before(model.graph[0], tape.nodes)
    return total


def _replace(model: ir.Model, cached: _Cached, total: ir.Value) -> None:
    angles = _shared_angles(cached)
    operands = [_tokens_first(model, cached, value, rotated=not angles) for value in (cached.query, cached.key)]
    operands.append(_tokens_first(model, cached, cached.value))
    attributes = {"num_heads": cached.heads, "kv_num_heads": cached.kv_heads, "scale": cached.scale}
    fused = ir.Node(
        CPU_DOMAIN,
        CACHED_ATTENTION,
        [*operands, cached.past_key, cached.past_value, total, *angles],
        ir.convenience.convert_attributes(attributes),
        num_outputs=3,
        name=cached.node.name,
    )
    mixed, *presents = fused.outputs
    mixed.name, mixed.type = f"{cached.node.name}.output", cached.query.type
    model.graph.insert_before(cached.node, fused)
    for before, after in zip(cached.presents, presents, strict=True):
        after.name, after.type, after.shape = before.name, before.type, before.shape
        before.name = f"{before.name}.joined"
        ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    _hand_on(model, cached, mixed)


def _shared_angles(cached: _Cached) -> tuple[ir.Value, ...]:
    """Cosines and sines of the rotations that rule 4 leaves to the operator."""
    half = (sizes(cached.query, 4)[3] or 0) // 2
    found: list[tuple[ir.Value, ...]] = []
    for value in (cached.query, cached.key):
        rotation = producer(value, "RotaryEmbedding")
        if rotation is None or any(rotation.attributes.get_int(name, 0) for name in _OTHER_ROTATIONS):
            return ()
        found.append(tuple(operand for operand in rotation.inputs[1:] if operand is not None))
    angles = found[0]
    fits = len(angles) == 2 and found[1] == angles and all(sizes(angle, 3)[2] == half for angle in angles)
    return angles if fits else ()


def _hand_on(model: ir.Model, cached: _Cached, mixed: ir.Value) -> None:
    """Give [B, S, heads x channels] to those who read [B, heads, S, channels], mostly to bring it into that form."""
    before = cached.node.outputs[0]
    swap = only_reader(before, "Transpose")
    joined = only_reader(swap.outputs[0], "Reshape") if swap is not None else None
    width = cached.heads * (sizes(cached.query, 4)[3] or 0)
    swaps = swap is not None and tuple(swap.attributes.get_ints("perm", ())) == _TOKENS_FIRST
    if swaps and swap is not None and joined is not None and sizes(joined.outputs[0], 3)[2] == width:
        after = joined.outputs[0]
        mixed.shape = after.shape
        ir.convenience.replace_all_uses_with(after, mixed, replace_graph_outputs=True)
        for dead in (joined, swap, cached.node):
            model.graph.remove(dead, safe=True)
        return
    shape = constant_initializer(
        model, f"{CACHED_ATTENTION}.heads_{cached.heads}_{width}", np.array([0, 0, cached.heads, -1], np.int64)
    )
    apart = ir.node("Reshape", [mixed, shape], name=f"{cached.node.name}/Reshape")
    back = ir.node("Transpose", [apart.outputs[0]], {"perm": _TOKENS_FIRST}, name=f"{cached.node.name}/Transpose")
    apart.outputs[0].name = f"{cached.node.name}.apart"
    result = back.outputs[0]
    result.type, result.shape = before.type, before.shape
    model.graph.insert_before(cached.node, [apart, back])
    result.name, before.name = before.name, f"{before.name}.replaced"
    ir.convenience.replace_all_uses_with(before, result, replace_graph_outputs=True)
    model.graph.remove(cached.node, safe=True)


def _tokens_first(model: ir.Model, cached: _Cached, value: ir.Value, *, rotated: bool = True) -> ir.Value:
    """[B, heads, S, channels] -> [B, S, heads x channels]; with `rotated` False as it is before its rotation."""
    rotation = producer(value, "RotaryEmbedding")
    source = rotation.inputs[0] if rotation is not None else value
    heads = sizes(value, 4)[1]
    if source is None or heads is None:
        raise RuntimeError(f"{value.name!r} has no known heads")
    flat = _flat(model, cached.node, source)
    if rotation is None or not rotated:
        return flat
    attributes = {"interleaved": rotation.attributes.get_int("interleaved", 0), "num_heads": heads}
    turned = ir.node("RotaryEmbedding", [flat, *rotation.inputs[1:]], attributes, name=f"{rotation.name}/flat")
    out = turned.outputs[0]
    out.name, out.type, out.shape = f"{value.name}.flat", value.type, flat.shape
    model.graph.insert_before(cached.node, turned)
    return out


def _flat(model: ir.Model, before: ir.Node, value: ir.Value) -> ir.Value:
    swap = producer(value, "Transpose")
    name = value.name
    if swap is not None and tuple(swap.attributes.get_ints("perm", ())) == _TOKENS_FIRST:
        inner = swap.inputs[0]
        split = producer(inner, "Reshape")
        whole = split.inputs[0] if split is not None else None
        heads, channels = sizes(value, 4)[1], sizes(value, 4)[3]
        if heads and channels and sizes(whole, 3)[2] == heads * channels and whole is not None:
            return whole
    else:
        turn = ir.node("Transpose", [value], {"perm": _TOKENS_FIRST}, name=f"{name}/tokens_first")
        inner = turn.outputs[0]
        inner.name, inner.type = f"{name}.tokens_first", value.type
        model.graph.insert_before(before, turn)
    shape = constant_initializer(model, f"{CACHED_ATTENTION}.flat", np.array([0, 0, -1], np.int64))
    joined = ir.node("Reshape", [inner, shape], name=f"{name}/flat_shape")
    out = joined.outputs[0]
    out.name, out.type = f"{name}.flat_heads", value.type
    model.graph.insert_before(before, joined)
    return out
