"""Exact fold sites beyond those of the FPTQ rule; only equalizers that are asked for use them.

A tensor that nothing but linears read has one when it is

1. `Relu(h)`, where h is the output of a linear that nothing else reads, or a part of it: Relu(h / s) = Relu(h) / s for
   s > 0, so the rows of that linear and their biases are divided;
2. the output of attention, heads side by side: each channel is a mix of one value channel over tokens, with weights
   that do not depend on values, so the rows of the value projection are divided. Query heads that share a value head
   share its channels (grouped-query attention), so s is tied over them. A cache of values then holds v / s: it must
   enter the graph and leave it, and nothing else may read it.

The attention must be written as torch's exporter does: Reshape, Transpose, an optional Concat behind the cache, an
optional repetition of heads (Unsqueeze, Expand, Reshape), MatMul with the probabilities, Transpose, Reshape. Shapes say
which channel goes where; a shape that is not known refuses the site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from fptq_export.sites import FoldSite
from fptq_export.trace.find_fold_sites import stray_reader
from fptq_export.trace.find_linears import LinearNode, only_reader
from fptq_export.trace.find_producing_rows import last_dim, producing_rows, source_of_channels

__all__ = ["extension_site"]

_SWAP_HEADS = [0, 2, 1, 3]


def extension_site(
    value: ir.Value, readers: Sequence[LinearNode], linears: Mapping[str, LinearNode]
) -> FoldSite | None:
    """The extension site of a tensor that has no site of the rule, or None.

    Args:
        value: The tensor.
        readers: The linears that read it.
        linears: Every linear of the graph, by path.
    """
    if stray_reader(value, readers) is not None:
        return None
    source = source_of_channels(value)
    if isinstance(source, str):
        return None
    consumers, channels = tuple(reader.path for reader in readers), readers[0].in_features
    return _relu_site(source, channels, consumers, linears) or _attention_site(source, channels, consumers, linears)


def _relu_site(
    source: ir.Value, channels: int, consumers: tuple[str, ...], linears: Mapping[str, LinearNode]
) -> FoldSite | None:
    """Rule 1."""
    rows = producing_rows(_input_of(source, "Relu"), channels, linears)
    return rows.site("relu_mlp", channels, consumers) if rows is not None else None


def _attention_site(
    source: ir.Value, channels: int, consumers: tuple[str, ...], linears: Mapping[str, LinearNode]
) -> FoldSite | None:
    """Rule 2, from the end of the attention to its value projection."""
    side_by_side = _input_of(source, "Reshape")
    dims = _dims(side_by_side, 4)
    if dims is None or last_dim(source) != channels:
        return None
    heads, head_dim = dims[2], dims[3]
    mixed = _transposed(side_by_side)
    product = mixed.producer() if mixed is not None else None
    if heads is None or head_dim is None or heads * head_dim != channels:
        return None
    if product is None or product.op_type != "MatMul" or product.inputs[0] is product.inputs[1]:
        return None
    values, repeats = _before_repetition(product.inputs[1], heads, head_dim)
    new = _before_cache(values)
    flat = _input_of(_transposed(new), "Reshape")
    value_heads = heads // repeats
    rows = producing_rows(flat, value_heads * head_dim, linears)
    split = _dims(_transposed(new), 4)
    if rows is None or split is None or split[2:] != (value_heads, head_dim):
        return None
    return rows.site("attention_value", channels, consumers, repeats, head_dim if repeats > 1 else None)


def _before_repetition(values: ir.Value | None, heads: int, head_dim: int) -> tuple[ir.Value | None, int]:
    """What is repeated to [batch, heads, tokens, head_dim], and how often; (None, 1) where channels are unknown."""
    dims = _dims(values, 4)
    node = values.producer() if values is not None else None
    if values is None or dims is None or (dims[1], dims[3]) != (heads, head_dim) or node is None:
        return None, 1
    if node.op_type != "Reshape":
        return values, 1
    if only_reader(values) is None:
        return None, 1
    expanded = _input_of(values, "Reshape")
    single = _input_of(expanded, "Expand")
    unsqueeze = single.producer() if single is not None else None
    # A cache leaves the graph from here, which `_before_cache` looks at.
    before = unsqueeze.inputs[0] if unsqueeze is not None and unsqueeze.op_type == "Unsqueeze" else None
    wide, narrow, plain = _dims(expanded, 5), _dims(single, 5), _dims(before, 4)
    if wide is None or narrow is None or plain is None or wide[1] is None or wide[2] is None:
        return None, 1
    value_heads, repeats = wide[1], wide[2]
    same = wide[4] == narrow[4] == plain[3] == head_dim and narrow[1] == plain[1] == value_heads
    return (before, repeats) if same and narrow[2] == 1 and value_heads * repeats == heads else (None, 1)


def _before_cache(values: ir.Value | None) -> ir.Value | None:
    """The new values, before they go behind a cache that enters the graph and leaves it; `values` without a cache."""
    node = values.producer() if values is not None else None
    if values is None or node is None:
        return None
    if node.op_type != "Concat":
        return values if only_reader(values) is not None else None
    past, new = node.inputs if len(node.inputs) == 2 else (None, None)
    axis = node.attributes.get_int("axis", None)
    through = values.is_graph_output() and past is not None and past.is_graph_input()
    alone = past is not None and past is not new and len(_reading(past)) == len(_reading(values)) == 1
    return new if axis in (2, -2) and through and alone and new is not None and only_reader(new) is not None else None


def _transposed(value: ir.Value | None) -> ir.Value | None:
    """What a Transpose of heads and tokens reads."""
    node = value.producer() if value is not None else None
    if node is None or list(node.attributes.get_ints("perm", [])) != _SWAP_HEADS:
        return None
    return _input_of(value, "Transpose")


def _input_of(value: ir.Value | None, op_type: str) -> ir.Value | None:
    """First input of the node that makes `value`, if it is such a node and nothing else reads that input."""
    node = value.producer() if value is not None else None
    before = node.inputs[0] if node is not None and node.op_type == op_type else None
    if before is None or before.is_graph_output() or len(_reading(before)) != 1:
        return None
    return before


def _reading(value: ir.Value) -> list[ir.Node]:
    """The nodes that read what is in a value, and not its shape only."""
    return [use.node for use in value.uses() if use.node.op_type != "Shape"]


def _dims(value: ir.Value | None, rank: int) -> tuple[int | None, ...] | None:
    """Sizes, None where one is not fixed; None altogether for another rank."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)
