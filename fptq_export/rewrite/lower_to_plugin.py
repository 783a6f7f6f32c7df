"""Lower the portable graph for a TensorRT that has our plugin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

from fptq_export.packing import (
    LAYOUT_VERSION,
    OUT_MULTIPLE,
    packed_scales_from_groups,
    packed_tiles_from_int4,
    padded_shape,
)
from fptq_export.policy import GROUP_SIZES
from fptq_export.rewrite.functions import DOMAIN, W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.initializers import lazy_initializer

__all__ = [
    "PLUGIN_DOMAIN",
    "PLUGIN_VERSION",
    "LowerToPlugin",
    "PluginLinear",
    "bias_addition",
    "plugin_linear",
    "remove_if_unused",
]

PLUGIN_DOMAIN = "fptq.tensorrt"
"""ONNX domain of the lowered nodes: not that of the functions, so that no function body applies to packed weights."""
PLUGIN_VERSION = "2"
"""Version 1 is the portable node; no plugin has it, because no kernel reads weights in ONNX order."""
_PLUGIN_NAMESPACE = "fptq"
_SCHEME_GROUP = 1
_TYPES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class PluginLinear:
    """What a portable node computes: codes INT4 [in, out], scales FLOAT16 [in/group_size, out]."""

    x: ir.Value
    dtype: ir.DataType
    codes: ir.Value
    scales: ir.Value
    x_scale: ir.Value | None
    in_features: int
    out_features: int
    group_size: int


class LowerToPlugin(ir.passes.InPlacePass):
    """`fptq::FptqW4A8Gemm*(x, codes, scales[, x_scale])` becomes the plugin's node with weights in tile order.

    Rules:
        1. The node gets domain `fptq.tensorrt` and plugin version 2, INT4 tiles [padded out, padded in], FLOAT16 scales
           [in/group_size, padded out], and what the plugin must know about the weight as attributes.
        2. `Add(y, bias)` with a constant bias [out] of y's type is taken into the node where it is the only reader of
           y: the sum is rounded once instead of twice.
        3. Left alone, with a reason in `left_alone`: graphs in FLOAT; output channels that are no multiple of 8; a
           group size the kernels do not have; weights or scales that are not constants of the right shape and type.
        4. Nodes of other domains and operators are left alone without a reason: they are not W4A8 linears.

    Attributes:
        lowered: Torch path -> operator, of the linears the plugin runs.
        left_alone: Torch path -> why the plugin does not run it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowered: dict[str, str] = {}
        self.left_alone: dict[str, str] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every linear that the kernels can run."""
        for node in list(model.graph):
            if node.domain != DOMAIN or node.op_type not in (W4A8_STATIC, W4A8_PER_TOKEN):
                continue
            path = (node.name or "").rpartition("/")[0]
            linear = plugin_linear(node)
            if isinstance(linear, str):
                self.left_alone[path] = linear
                continue
            _lower(model, node, linear, path)
            self.lowered[path] = node.op_type
        if self.lowered:
            common.RemoveUnusedFunctionsPass()(model)
            if not model.functions:
                model.graph.opset_imports.pop(DOMAIN, None)
        return ir.passes.PassResult(model, modified=bool(self.lowered))

    def ensures(self, model: ir.Model) -> None:
        """Every lowered linear has its tiles, read by one node, and no node reads codes in both orders."""
        for path in self.lowered:
            tiles = model.graph.initializers.get(f"{path}.weight_tiles")
            if tiles is None or len(tiles.uses()) != 1:
                raise ir.passes.PostconditionError(f"{path!r} has no packed weight of its own")
            if (codes := model.graph.initializers.get(f"{path}.weight_codes")) is not None and not codes.uses():
                raise ir.passes.PostconditionError(f"{path!r} still carries its weight in ONNX order")


def plugin_linear(node: ir.Node) -> PluginLinear | str:
    """What a node computes, or why the plugin cannot."""
    x, codes, scales, x_scale = (*node.inputs, None)[:4]
    if x is None or codes is None or scales is None or x.dtype is None:
        return "an input is missing or has no type"
    if x.dtype not in _TYPES:
        return f"the kernels compute in FLOAT16 or BFLOAT16, the graph in {x.dtype}"
    group_size = node.attributes.get_int("group_size", 0)
    if group_size not in GROUP_SIZES:
        return f"the kernels have no group size {group_size}"
    if codes.const_value is None or codes.dtype != ir.DataType.INT4 or len(codes.const_value.shape) != 2:
        return "its weight is not an INT4 constant [in, out]"
    in_features, out_features = codes.const_value.shape.numpy()
    if out_features % OUT_MULTIPLE:
        return f"{out_features} output channels are not a multiple of {OUT_MULTIPLE}"
    groups = (in_features // group_size, out_features)
    if scales.const_value is None or scales.dtype != ir.DataType.FLOAT16:
        return "its scales are not FLOAT16 constants"
    if in_features % group_size or scales.const_value.shape.numpy() != groups:
        return f"its scales are {scales.const_value.shape}, not {list(groups)}"
    if node.op_type == W4A8_STATIC and not _is_float_scalar(x_scale):
        return "its activation scale is not one FLOAT constant"
    return PluginLinear(x, x.dtype, codes, scales, x_scale, in_features, out_features, group_size)


def _is_float_scalar(value: ir.Value | None) -> bool:
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and tensor.size == 1


def _lower(model: ir.Model, node: ir.Node, linear: PluginLinear, path: str) -> None:
    addition, bias = bias_addition(node, linear)
    inputs = [linear.x, _tiles(model, linear, path), _scales(model, linear, path)]
    inputs += [value for value in (linear.x_scale, bias) if value is not None]
    attributes = _attributes(linear, has_bias=bias is not None)
    lowered = ir.Node(PLUGIN_DOMAIN, node.op_type, inputs, attributes, name=node.name)
    last = node if addition is None else addition
    output, replacement = last.outputs[0], lowered.outputs[0]
    replacement.name, replacement.dtype, replacement.shape = output.name, linear.dtype, output.shape
    model.graph.insert_before(last, lowered)
    ir.convenience.replace_all_uses_with(output, replacement, replace_graph_outputs=True)
    for dead in [node] if addition is None else [addition, node]:
        model.graph.remove(dead, safe=True)
    model.graph.opset_imports[PLUGIN_DOMAIN] = 1
    remove_if_unused(model, (linear.codes, linear.scales))


def remove_if_unused(model: ir.Model, initializers: Iterable[ir.Value]) -> None:
    """Drop initializers that nothing reads any more."""
    for value in initializers:
        if not value.uses() and not value.is_graph_output():
            model.graph.initializers.pop(value.name or "", None)


def bias_addition(node: ir.Node, linear: PluginLinear) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The only reader of a linear and its bias, where that is what the reader adds."""
    output = node.outputs[0]
    readers = [use.node for use in output.uses()]
    if output.is_graph_output() or len(readers) != 1 or readers[0].op_type != "Add" or readers[0].domain:
        return None, None
    (bias,) = [value for value in readers[0].inputs if value is not output] or [None]
    constant = bias.const_value if bias is not None and bias.is_initializer() else None
    if bias is None or constant is None or constant.dtype != linear.dtype:
        return None, None
    return (readers[0], bias) if constant.shape.numpy() == (linear.out_features,) else (None, None)


def _attributes(linear: PluginLinear, *, has_bias: bool) -> list[ir.Attr]:
    numbers: Mapping[str, int] = {
        "layout_version": LAYOUT_VERSION,
        "scheme": _SCHEME_GROUP,
        "group_size": linear.group_size,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "has_bias": int(has_bias),
    }
    texts = {"plugin_namespace": _PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
    return [
        *(ir.AttrString(name, value) for name, value in texts.items()),
        *(ir.AttrInt64(name, value) for name, value in numbers.items()),
    ]


def _tiles(model: ir.Model, linear: PluginLinear, path: str) -> ir.Value:
    tensor = linear.codes.const_value

    def packed() -> NDArray[np.generic]:
        assert tensor is not None
        return packed_tiles_from_int4(np.ascontiguousarray(tensor.numpy().astype(np.int8).T))

    shape = padded_shape(linear.out_features, linear.in_features)
    return lazy_initializer(model, f"{path}.weight_tiles", ir.DataType.INT4, shape, packed)


def _scales(model: ir.Model, linear: PluginLinear, path: str) -> ir.Value:
    tensor = linear.scales.const_value

    def packed() -> NDArray[np.generic]:
        assert tensor is not None
        return packed_scales_from_groups(tensor.numpy().T)

    padded_n, _ = padded_shape(linear.out_features, linear.in_features)
    shape = (linear.in_features // linear.group_size, padded_n)
    return lazy_initializer(model, f"{path}.weight_tile_scales", ir.DataType.FLOAT16, shape, packed)
