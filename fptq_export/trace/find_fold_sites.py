"""Where an equalization x' = x / s can be folded exactly, found in the graph and not in a table of model families.

A tensor read by linears has a site when everything that reads it is a linear and its producer, behind casts and
reshapes that keep the channels, is one of:

1. `Mul(u, w)` with a constant per-channel w (RMSNorm):                 w' = w / s
2. `Mul(u, w + c)` with constants w and c (Gemma's RMSNorm, c = 1):     w' = (w + c) / s - c
3. `Add(Mul(u, w), b)` or `LayerNormalization(u, w, b)`, constant b:    w' = w / s,  b' = b / s
4. `Mul(a, up)` where `up` is the output of a linear (gated MLP), or
   a part of it (gate and up in one matrix; see `find_producing_rows`): rows of W_up and its bias / s

It has none, and the reason is recorded, when

* something other than a linear reads it (a residual taken after the norm, a graph output);
* the per-channel constant, the up projection or its weight is read elsewhere too;
* the producer is anything else (attention output, an activation function).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from fptq_export.sites import FoldSite, Producer, SiteKind
from fptq_export.trace.find_linears import LinearNode, only_reader
from fptq_export.trace.find_producing_rows import producing_rows, source_of_channels

__all__ = ["fold_site_or_reason", "stray_reader"]


def fold_site_or_reason(
    value: ir.Value, readers: Sequence[LinearNode], linears: Mapping[str, LinearNode]
) -> FoldSite | str:
    """The fold site of a tensor, or why it has none.

    Args:
        value: The tensor.
        readers: The linears that read it.
        linears: Every linear of the graph, by path.

    Returns:
        The site, or one sentence.
    """
    stray = stray_reader(value, readers)
    if stray is not None:
        return stray
    source = source_of_channels(value)
    if isinstance(source, str):
        return source
    consumers = tuple(reader.path for reader in readers)
    for finder in (_layer_norm_site, _norm_site, _gated_mlp_site):
        found = finder(source, readers[0].in_features, consumers, linears)
        if found is not None:
            return found
    producer = source.producer()
    origin = f"{producer.op_type} node {producer.name!r}" if producer is not None else f"graph input {source.name!r}"
    return f"no per-channel producer to fold into: the input comes from {origin}"


def stray_reader(value: ir.Value, readers: Sequence[LinearNode]) -> str | None:
    """Who reads a tensor beside the linears, in a sentence; None if nobody does. Its shape is not what is in it."""
    if value.is_graph_output():
        return f"its input {value.name!r} is also an output of the graph"
    matmuls = {id(reader.matmul) for reader in readers}
    for use in value.uses():
        if use.node.op_type != "Shape" and (id(use.node) not in matmuls or use.idx != 0):
            return f"its input is also read by {use.node.op_type} node {use.node.name!r}, which is no linear"
    return None


def _channel_constant(value: ir.Value | None, channels: int) -> ir.Value | None:
    """`value` if it is a constant with one number for each channel that nothing else reads."""
    if value is None or not value.is_initializer() or value.shape is None or only_reader(value) is None:
        return None
    dims = list(value.shape)
    return value if dims and dims[-1] == channels and all(dim == 1 for dim in dims[:-1]) else None


def _offset_constant(value: ir.Value | None, channels: int) -> tuple[ir.Value, float] | None:
    """(w, c) if `value` is w + c with a per-channel constant w and a scalar constant c, through casts of w."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Add" or only_reader(value) is None:
        return None
    for weight, offset in (node.inputs, reversed(node.inputs)):
        constant = _channel_constant(_before_cast(weight), channels)
        scalar = offset.const_value if offset is not None and offset.is_initializer() else None
        if constant is not None and scalar is not None and scalar.size == 1:
            return constant, float(scalar.numpy().reshape(()))
    return None


def _before_cast(value: ir.Value | None) -> ir.Value | None:
    """What is cast to `value`, if only this cast is read; else `value` itself."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.op_type != "Cast" or only_reader(value) is None:
        return value
    return node.inputs[0]


def _producer(value: ir.Value, offset: float = 0.0) -> Producer:
    if value.name is None or value.shape is None:
        raise RuntimeError("an initializer has no name or shape")
    return Producer(initializer=value.name, axis=len(value.shape) - 1, offset=offset)


def _site(
    kind: SiteKind,
    site_id: str,
    channels: int,
    producers: Sequence[Producer],
    consumers: tuple[str, ...],
) -> FoldSite:
    return FoldSite(
        id=site_id,
        kind=kind,
        channels=channels,
        producers=tuple(producers),
        consumers=consumers,
    )


def _norm_id(weight: ir.Value) -> str:
    return (weight.name or "").removesuffix(".weight")


def _layer_norm_site(
    source: ir.Value, channels: int, consumers: tuple[str, ...], _linears: Mapping[str, LinearNode]
) -> FoldSite | None:
    """Rule 3, as one LayerNormalization node."""
    node = source.producer()
    if node is None or node.op_type != "LayerNormalization":
        return None
    weight = _channel_constant(node.inputs[1], channels)
    bias_input = node.inputs[2] if len(node.inputs) > 2 else None
    bias = _channel_constant(bias_input, channels)
    if weight is None or (bias_input is not None and bias is None):
        return None
    return _site("norm", _norm_id(weight), channels, [_producer(part) for part in (weight, bias) if part], consumers)


def _norm_site(
    source: ir.Value, channels: int, consumers: tuple[str, ...], _linears: Mapping[str, LinearNode]
) -> FoldSite | None:
    """Rules 1 and 2, and rule 3 in separate nodes."""
    node = source.producer()
    bias = None
    if node is not None and node.op_type == "Add":
        bias, product = _split_constant(node, channels)
        if bias is None or product is None or only_reader(product) is None:
            return None
        node = product.producer()
    if node is None or node.op_type != "Mul":
        return None
    biases = [_producer(bias)] if bias is not None else []
    weight, _ = _split_constant(node, channels)
    if weight is not None:
        return _site("norm", _norm_id(weight), channels, [_producer(weight), *biases], consumers)
    for operand in node.inputs:
        found = _offset_constant(operand, channels)
        if found is not None:
            weight, offset = found
            return _site("offset_norm", _norm_id(weight), channels, [_producer(weight, offset), *biases], consumers)
    return None


def _split_constant(node: ir.Node, channels: int) -> tuple[ir.Value | None, ir.Value | None]:
    """(per-channel constant, other operand) of a binary node."""
    first, second = node.inputs
    constant = _channel_constant(first, channels)
    return (constant, second) if constant is not None else (_channel_constant(second, channels), first)


def _gated_mlp_site(
    source: ir.Value, channels: int, consumers: tuple[str, ...], linears: Mapping[str, LinearNode]
) -> FoldSite | None:
    """Rule 4."""
    node = source.producer()
    if node is None or node.op_type != "Mul":
        return None
    for operand in node.inputs:
        if operand is not None and only_reader(operand) is not None:
            rows = producing_rows(operand, channels, linears)
            if rows is not None:
                return rows.site("gated_mlp", channels, consumers)
    return None
