"""Rotary position embeddings as one operator."""

from __future__ import annotations

import onnx_ir as ir

from fptq_export.rewrite.matching import producer, replace_node, scalar, sizes

__all__ = ["FuseRotary"]

_HEAD_AXIS = 1
_ELEMENTWISE = frozenset({"Cos", "Sin", "Cast", "Mul"})
"""What may lie between the angles and their cosines; Mul by a constant (the attention factor of a scaled RoPE)."""


class FuseRotary(ir.passes.InPlacePass):
    """Replace `x * cos + rotate_half(x) * sin` by `RotaryEmbedding` (opset 23).

    Rules:
        1. x is [B, H, S, D], and D is known; rotate_half(x) is `Concat(-x[..., D/2:], x[..., :D/2])`.
        2. cos and sin are [B, S, D] and hold every number twice, `Concat(angles, angles)` before they are computed: the
           operator takes them once, [B, S, D/2].
        3. A model that rotates a part of each head slices it before and joins it after: those nodes stay.
        4. Left alone: pairs of neighbours (GPT-J), halves of another size, cosines that are not those of doubled
           angles, another type than that of x.
    """

    fused = 0
    """Rotations replaced by the last call."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every rotation that matches."""
        self.fused = 0
        halves = _Halves(model)
        for node in [node for node in model.graph if node.op_type == "Add" and not node.domain]:
            fused = _match(node, halves)
            if fused is not None:
                replace_node(model, node, fused)
                self.fused += 1
        return ir.passes.PassResult(model, modified=self.fused > 0)


class _Halves:
    """The first half of tensors whose last axis holds everything twice, each computed once."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._known: dict[ir.Value, ir.Value] = {}

    def of(self, value: ir.Value) -> ir.Value:
        """The half of [B, S, D], for which `_doubled` holds."""
        if value not in self._known:
            node, varying = _doubled(value) or (None, None)
            if node is None or varying is None:
                raise RuntimeError(f"nothing says that the halves of {value.name!r} are equal")
            self._known[value] = varying if node.op_type == "Concat" else self._on_half(node, varying)
        return self._known[value]

    def _on_half(self, node: ir.Node, whole: ir.Value) -> ir.Value:
        """The same operator on the half of its operand."""
        half = self.of(whole)
        inputs = [half if operand is whole else operand for operand in node.inputs]
        copy = ir.Node("", node.op_type, inputs, node.attributes.values(), name=f"{node.outputs[0].name}/half")
        out, before = copy.outputs[0], node.outputs[0]
        out.name, out.type, out.shape = f"{before.name}.half", before.type, half.shape
        self._model.graph.insert_before(node, [copy])
        return out


def _doubled(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The node that makes a value and its operand, where both halves of the value are equal by construction."""
    joined = producer(value, "Concat")
    if joined is not None:
        first, *others = joined.inputs
        twice = len(others) == 1 and others[0] is first and joined.attributes.get_int("axis", 0) in (-1, 2)
        return (joined, first) if twice and first is not None else None
    node = producer(value, *_ELEMENTWISE)
    varying = [operand for operand in node.inputs if scalar(operand) is None] if node is not None else []
    if node is None or len(varying) != 1 or varying[0] is None or _doubled(varying[0]) is None:
        return None
    return node, varying[0]


def _match(add: ir.Node, halves: _Halves) -> ir.Node | None:
    for plain, turned in (add.inputs, reversed(add.inputs)):
        straight, across = producer(plain, "Mul"), producer(turned, "Mul")
        if straight is None or across is None:
            continue
        for x, cos in (straight.inputs, reversed(straight.inputs)):
            size = sizes(x, 4)[3]
            if x is None or size is None or size % 2:
                continue
            sin = _sine_beside_rotated(across, x, size // 2)
            angles = [angle for angle in (_angles(cos, x, size), _angles(sin, x, size)) if angle is not None]
            if len(angles) == 2:
                inputs = [x, *(halves.of(angle) for angle in angles)]
                return ir.node("RotaryEmbedding", inputs, {"interleaved": 0}, name=add.name)
    return None


def _sine_beside_rotated(across: ir.Node, x: ir.Value, half: int) -> ir.Value | None:
    """The other factor of `Mul(rotate_half(x), sin)`."""
    for rotated, sin in (across.inputs, reversed(across.inputs)):
        joined = producer(rotated, "Concat")
        if joined is None or len(joined.inputs) != 2 or joined.attributes.get_int("axis", 0) not in (-1, 3):
            continue
        negative = producer(joined.inputs[0], "Neg")
        back = negative.inputs[0] if negative is not None else None
        if _is_slice(back, x, half, None) and _is_slice(joined.inputs[1], x, 0, half):
            return sin
    return None


def _is_slice(value: ir.Value | None, x: ir.Value, start: int, end: int | None) -> bool:
    """Whether a value is x[..., start:end]."""
    node = producer(value, "Slice")
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return False
    found_start, found_end, axis = (scalar(operand) for operand in node.inputs[1:4])
    step = scalar(node.inputs[4]) if len(node.inputs) > 4 else 1.0
    size = x.shape[-1] if x.shape is not None else 0
    ends = (
        found_end == end if end is not None else isinstance(size, int) and found_end is not None and found_end >= size
    )
    return found_start == start and ends and axis in (-1, 3) and step == 1.0


def _angles(value: ir.Value | None, x: ir.Value, size: int) -> ir.Value | None:
    """[B, S, D] that is unsqueezed to [B, 1, S, D], if its halves are equal and it has the type of x."""
    node = producer(value, "Unsqueeze")
    angle = node.inputs[0] if node is not None and scalar(node.inputs[1]) == _HEAD_AXIS else None
    fits = angle is not None and sizes(angle, 3)[2] == size and angle.dtype == x.dtype
    return angle if fits and angle is not None and _doubled(angle) is not None else None
