"""Attention as one operator, which TensorRT runs in one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from fptq_export.rewrite.matching import has_shape, only_reader, producer, replace_node, scalar, sizes

__all__ = ["FuseAttention"]

_KERNEL_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_LOWEST = {
    ir.DataType.FLOAT16: float(np.finfo(np.float16).min),
    ir.DataType.BFLOAT16: float(ml_dtypes.finfo(ml_dtypes.bfloat16).min),
    ir.DataType.FLOAT: float(np.finfo(np.float32).min),
}
_SWAP_LAST = (0, 1, 3, 2)


class _LeftAloneError(Exception):
    """Why an attention stays as it is."""


@dataclass(frozen=True)
class _Attention:
    """What is fused: `out = Attention(query, key, value, visible)`; all of rank 4, [batch, heads, tokens, channels]."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    visible: ir.Value
    scale: float
    last: ir.Node


class FuseAttention(ir.passes.InPlacePass):
    """Replace scaled dot product attention by `Attention` (opset 23) with a mask of truth values and one output.

    Rules:
        1. `MatMul(Softmax(MatMul(q, k^T) * scale + mask), v)` becomes one node; casts around the softmax go with it.
           The scale is a constant, 1 where there is none (OPT scales q before).
        2. Heads of keys and values that are repeated for their queries (`Unsqueeze`, `Expand`, `Reshape`) are handed
           over as they are: the operator knows grouped-query attention.
        3. The mask is `Where(visible, 0, lowest)`: the operator gets `visible`. Every row must see something, see
           `StaticCache`.
        4. Left alone, with the reason in `left_alone`: anything between scores and mask (soft-capping), another term in
           the scores (ALiBi), another mask, another last axis, probabilities that something else reads.
        5. Left alone, with the reason: a type for which TensorRT has no kernel. TensorRT for RTX 1.7 builds FLOAT16 and
           BFLOAT16; it neither has one for FLOAT nor breaks the operator up, so the engine would not build.

    The operator multiplies q and k by the root of the scale each and may keep the scores in FLOAT; no other difference.

    Args:
        types: Types that are fused.
    """

    def __init__(self, types: frozenset[ir.DataType] = _KERNEL_TYPES) -> None:
        super().__init__()
        self._types = types
        self.fused = 0
        """Attentions replaced by the last call."""
        self.left_alone: Mapping[str, str] = {}
        """Node of the softmax, or the cache it reads -> why it stays as it is."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every attention that matches."""
        self.fused, left_alone = 0, {}
        for softmax in [node for node in model.graph if node.op_type == "Softmax" and not node.domain]:
            if not has_shape(softmax.inputs[0], None, None, None, None):
                continue  # no attention: the router of a mixture of experts
            try:
                found = _match(softmax, self._types)
            except _LeftAloneError as reason:
                left_alone[softmax.name or ""] = str(reason)
            else:
                _replace(model, found)
                self.fused += 1
        self.left_alone = left_alone
        return ir.passes.PassResult(model, modified=self.fused > 0)


def _match(softmax: ir.Node, types: frozenset[ir.DataType]) -> _Attention:
    last, value = _mixing(softmax)
    scores, visible = _scores_and_mask(softmax)
    product, scale = _scaled_product(scores)
    query, transposed = product.inputs
    swap = producer(transposed, "Transpose")
    if swap is None or tuple(swap.attributes.get_ints("perm", ())) != _SWAP_LAST:
        raise _LeftAloneError("its keys are not transposed right before they are multiplied")
    key, value = _before_repetition(swap.inputs[0]), _before_repetition(value)
    if query is None or not all(has_shape(part, None, None, None, None) for part in (query, key, value)):
        raise _LeftAloneError("its queries, keys and values are not [batch, heads, tokens, channels]")
    if not _heads_fit(query, key, value):
        raise _LeftAloneError(f"its heads do not fit: {query.shape}, {key.shape}, {value.shape}")
    if query.dtype not in types:
        raise _LeftAloneError(f"TensorRT has no kernel for attention in {query.dtype}")
    return _Attention(query, key, value, visible, scale, last)


def _mixing(softmax: ir.Node) -> tuple[ir.Node, ir.Value]:
    """The MatMul of the probabilities, and the values it mixes."""
    probabilities = softmax.outputs[0]
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        raise _LeftAloneError("its softmax does not run over the keys")
    cast = only_reader(probabilities, "Cast")
    probabilities = cast.outputs[0] if cast is not None else probabilities
    last = only_reader(probabilities, "MatMul")
    values = last.inputs[1] if last is not None and last.inputs[0] is probabilities else None
    if last is None or values is None:
        raise _LeftAloneError("its probabilities are read by something else than one MatMul")
    return last, values


def _scores_and_mask(softmax: ir.Node) -> tuple[ir.Value, ir.Value]:
    """The scores before the mask, and what of them is visible."""
    masked = softmax.inputs[0]
    cast = producer(masked, "Cast")
    if cast is not None:
        masked = cast.inputs[0]
    add = producer(masked, "Add")
    if add is None or masked is None or only_reader(masked, "Cast", "Softmax") is None:
        raise _LeftAloneError("its softmax does not read scores plus a mask")
    for scores, mask in (add.inputs, reversed(add.inputs)):
        where = producer(mask, "Where")
        if where is None or scores is None or mask is None:
            continue
        visible, shown, hidden = where.inputs
        lowest = _LOWEST.get(mask.dtype) if mask.dtype is not None else None
        if visible is not None and scalar(shown) == 0.0 and scalar(hidden) in (lowest, -np.inf):
            return scores, visible
    raise _LeftAloneError("its mask is not Where(visible, 0, lowest)")


def _scaled_product(scores: ir.Value) -> tuple[ir.Node, float]:
    """The MatMul of queries and keys, and the constant that it is multiplied by."""
    node, scale, value = scores.producer(), 1.0, scores
    if node is not None and node.op_type in ("Mul", "Div") and only_reader(scores, "Add") is not None:
        factor = scalar(node.inputs[1])
        if factor is None or node.inputs[0] is None:
            raise _LeftAloneError("its scores are scaled by something that is no constant")
        scale, value = (factor if node.op_type == "Mul" else 1.0 / factor), node.inputs[0]
        node = value.producer()
    if node is None or node.op_type != "MatMul" or only_reader(value, "Mul", "Div", "Add") is None:
        raise _LeftAloneError(
            f"its scores go through {node.op_type if node is not None else 'nothing'} before the mask"
        )
    return node, scale


def _before_repetition(value: ir.Value | None) -> ir.Value:
    """Rule 2: [B, heads of values, T, D] behind [B, heads, T, D]."""
    if value is None:
        raise _LeftAloneError("an operand is missing")
    joined = producer(value, "Reshape")
    expanded = producer(joined.inputs[0], "Expand") if joined is not None else None
    single = producer(expanded.inputs[0], "Unsqueeze") if expanded is not None else None
    if joined is None or expanded is None or single is None:
        return value
    before = single.inputs[0]
    _, heads, repeats, _, _ = sizes(expanded.outputs[0], 5)
    _, whole, _, _ = sizes(value, 4)
    if before is None or heads is None or repeats is None or scalar(single.inputs[1]) != 2:
        return value
    return before if sizes(before, 4)[1] == heads and heads * repeats == whole else value


def _heads_fit(query: ir.Value, key: ir.Value, value: ir.Value) -> bool:
    """Whether heads and channels are known, those of keys and values agree, and they divide the query's."""
    (_, heads, _, channels), (_, key_heads, _, key_channels), (_, value_heads, _, value_channels) = (
        sizes(part, 4) for part in (query, key, value)
    )
    if heads is None or key_heads is None or channels is None or value_channels is None:
        return False
    return key_heads == value_heads and channels == key_channels and heads % key_heads == 0


def _replace(model: ir.Model, found: _Attention) -> None:
    inputs = [found.query, found.key, found.value, found.visible]
    replace_node(
        model, found.last, ir.node("Attention", inputs, {"scale": found.scale}, name=f"{found.last.name}/Attention")
    )
