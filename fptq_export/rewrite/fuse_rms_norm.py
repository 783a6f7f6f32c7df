"""Root mean square norms as one operator."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fptq_export.rewrite.matching import has_shape, only_reader, operand_beside, producer, replace_node, scalar

__all__ = ["FuseRmsNorm"]


@dataclass(frozen=True)
class _RmsNorm:
    """What is fused: `out = RMSNormalization(x, weight, epsilon)`."""

    x: ir.Value
    weight: ir.Value
    epsilon: float
    out: ir.Value


class FuseRmsNorm(ir.passes.InPlacePass):
    """Replace the arithmetic of an RMS norm over the last axis by `RMSNormalization` (opset 23).

    Rules:
        1. `Mul(w, x * Reciprocal(Sqrt(ReduceMean(Pow(x, 2)) + eps)))` becomes one node; w has one number a channel,
           constant or computed (Gemma's 1 + w), and keeps its name: folds change it there.
        2. Where x was cast to float32 and the normalized x is cast back before w, both casts go: the operator computes
           in float32 (`stash_type` 1) and rounds at the same place.
        3. Left alone: another exponent or axis, a mean that is subtracted (LayerNorm), a norm without a weight, one
           whose steps something else reads.

    Before: x -> Pow -> ReduceMean -> Add -> Sqrt -> Reciprocal -> Mul(x) -> Mul(w). After: x, w -> RMSNormalization.
    The order of the sum and of the two multiplications may differ, nothing else.
    """

    fused = 0
    """Norms replaced by the last call."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every norm that matches."""
        self.fused = 0
        for mean in [node for node in model.graph if node.op_type == "ReduceMean" and not node.domain]:
            norm = _match(mean)
            if norm is not None:
                _replace(model, norm)
                self.fused += 1
        return ir.passes.PassResult(model, modified=self.fused > 0)


def _match(mean: ir.Node) -> _RmsNorm | None:
    power = producer(mean.inputs[0], "Pow")
    x = power.inputs[0] if power is not None and scalar(power.inputs[1]) == 2.0 else None
    if (
        x is None
        or power is None
        or only_reader(power.outputs[0], "ReduceMean") is None
        or not _over_last_axis(mean, x)
    ):
        return None
    shifted = only_reader(mean.outputs[0], "Add")
    epsilon = scalar(operand_beside(shifted, mean.outputs[0])) if shifted is not None else None
    root = only_reader(shifted.outputs[0], "Sqrt") if shifted is not None else None
    inverse = only_reader(root.outputs[0], "Reciprocal") if root is not None else None
    scaled = only_reader(inverse.outputs[0], "Mul") if inverse is not None else None
    if epsilon is None or inverse is None or scaled is None or operand_beside(scaled, inverse.outputs[0]) is not x:
        return None
    return _with_weight(x, scaled.outputs[0], epsilon)


def _over_last_axis(mean: ir.Node, x: ir.Value) -> bool:
    axis = scalar(mean.inputs[1]) if len(mean.inputs) > 1 else None
    rank = len(x.shape) if x.shape is not None else 0
    return rank > 0 and axis in (-1, rank - 1) and mean.attributes.get_int("keepdims", 1) == 1


def _with_weight(x: ir.Value, normalized: ir.Value, epsilon: float) -> _RmsNorm | None:
    """Rule 2, and the multiplication by the weight."""
    widened, narrowed = producer(x, "Cast"), only_reader(normalized, "Cast")
    if widened is not None and narrowed is not None and widened.inputs[0] is not None:
        if widened.inputs[0].dtype is None or narrowed.attributes.get_int("to", 0) != widened.inputs[0].dtype:
            return None
        x, normalized = widened.inputs[0], narrowed.outputs[0]
    product = only_reader(normalized, "Mul")
    weight = operand_beside(product, normalized) if product is not None else None
    channels = x.shape[-1] if x.shape is not None and len(x.shape) else None
    if product is None or weight is None or not isinstance(channels, int) or not has_shape(weight, channels):
        return None
    return _RmsNorm(x, weight, epsilon, product.outputs[0]) if weight.dtype == x.dtype else None


def _replace(model: ir.Model, norm: _RmsNorm) -> None:
    last = norm.out.producer()
    if last is None:
        raise RuntimeError(f"{norm.out.name!r} has no producer")
    fused = ir.node(
        "RMSNormalization",
        [norm.x, norm.weight],
        {"axis": -1, "epsilon": norm.epsilon, "stash_type": 1},
        name=last.name,
    )
    replace_node(model, last, fused)
