"""Multiply once where several linears read one tensor."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.packing import packed_from_int4
from fptq_export.rewrite.functions import DOMAIN, W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.initializers import lazy_initializer
from fptq_export.rewrite.lower_to_plugin import (
    PluginLinear,
    bias_addition,
    plugin_linear,
    remove_if_unused,
)

__all__ = ["FuseProjections"]

_NAMED = 6
"""Linears without a common parent that the name of a fused linear lists; a layer may have hundreds of them."""


@dataclass(frozen=True)
class _Projection:
    """A linear that may be multiplied together with others; `addition` and `bias` are both there or both None."""

    node: ir.Node
    path: str
    linear: PluginLinear
    addition: ir.Node | None
    bias: ir.Value | None

    @property
    def output(self) -> ir.Value:
        """What the rest of the graph reads."""
        return (self.addition or self.node).outputs[0]

    @property
    def key(self) -> Hashable:
        """Equal for linears that one multiplication can compute."""
        scale = self.linear.x_scale.const_value if self.linear.x_scale is not None else None
        return (
            self.linear.x,
            self.node.op_type,
            None if scale is None else scale.tobytes(),
            self.linear.group_size,
            self.linear.in_features,
            self.bias is not None,
        )


class FuseProjections(ir.passes.InPlacePass):
    """Linears that read one tensor become one linear and a `Split`: q, k and v; gate and up.

    Rules:
        1. Fused: portable W4A8 nodes with the same input value, the same operator (static or per token), the same group
           size and, where static, the same activation scale; at least two of them. Codes and scales are concatenated
           along the output channels, in the order of the nodes in the graph.
        2. A bias that the plugin takes into its node (`LowerToPlugin`, rule 2) is concatenated too. Linears with such
           a bias and linears without one are fused apart.
        3. Left alone: what the plugin cannot run (`plugin_linear`, so every part is a multiple of 8 channels wide and
           every scale constant); a weight that another node reads too, which would be stored twice; a single linear.
        4. The values the linears wrote keep their names, types, shapes and readers, graph outputs among them.
        5. Linears of other activation scales or group sizes on the same tensor are fused among themselves.

    The graph stays portable, and each output channel is the same sum in the same order as before.

    Attributes:
        fused: Path of the fused linear (`<parent>.q_proj+k_proj+v_proj`) -> torch paths, in the order of the channels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fused: dict[str, tuple[str, ...]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse every group of linears."""
        groups: dict[Hashable, list[_Projection]] = {}
        for node in model.graph:
            projection = _projection(node)
            if projection is not None:
                groups.setdefault(projection.key, []).append(projection)
        for group in groups.values():
            if len(group) > 1:
                paths = tuple(projection.path for projection in group)
                self.fused[_joined(paths)] = paths
                _fuse(model, group, _joined(paths))
        return ir.passes.PassResult(model, modified=bool(self.fused))

    def ensures(self, model: ir.Model) -> None:
        """Every fused linear has its weight, and none of the linears it replaces is left."""
        names = {node.name for node in model.graph}
        for fused, paths in self.fused.items():
            if f"{fused}.weight_codes" not in model.graph.initializers:
                raise ir.passes.PostconditionError(f"{fused!r} has no weight")
            left = [f"{path}/{op}" for path in paths for op in (W4A8_STATIC, W4A8_PER_TOKEN) if f"{path}/{op}" in names]
            if left:
                raise ir.passes.PostconditionError(f"{left} are computed twice")


def _projection(node: ir.Node) -> _Projection | None:
    if node.domain != DOMAIN or node.op_type not in (W4A8_STATIC, W4A8_PER_TOKEN):
        return None
    linear = plugin_linear(node)
    if isinstance(linear, str) or len(linear.codes.uses()) != 1 or linear.codes.is_graph_output():
        return None
    return _Projection(node, (node.name or "").rpartition("/")[0], linear, *bias_addition(node, linear))


def _joined(paths: Sequence[str]) -> str:
    """`a.q_proj`, `a.k_proj` -> `a.q_proj+k_proj`; paths without a common parent are joined whole.

    Of many (a layer of experts) the first and the last are named, and how many lie between.
    """
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) > 1:
        return "+".join(paths if len(paths) <= _NAMED else (paths[0], str(len(paths) - 2), paths[-1]))
    (parent,) = parents
    names = "+".join(path.rpartition(".")[2] for path in paths)
    return f"{parent}.{names}" if parent else names


def _fuse(model: ir.Model, group: Sequence[_Projection], path: str) -> None:
    first = group[0]
    inputs = [first.linear.x, _codes(model, group, path), _scales(model, group, path), first.linear.x_scale]
    product = ir.Node(
        DOMAIN,
        first.node.op_type,
        [value for value in inputs if value is not None],
        first.node.attributes.values(),
        name=f"{path}/{first.node.op_type}",
    )
    nodes = [product]
    if first.bias is not None:
        nodes.append(ir.Node("", "Add", [product.outputs[0], _bias(model, group, path)], name=f"{path}/Add"))
    for node in nodes:
        _describe(node.outputs[0], f"{node.name}.output", first, _width(group))
    nodes.append(_split(model, nodes[-1].outputs[0], group, path))
    model.graph.insert_before(first.node, nodes)
    for projection, part in zip(group, nodes[-1].outputs, strict=True):
        output = projection.output
        part.name, part.type, part.shape = output.name, output.type, output.shape
        ir.convenience.replace_all_uses_with(output, part, replace_graph_outputs=True)
        dead = [projection.node] if projection.addition is None else [projection.addition, projection.node]
        for node in dead:
            model.graph.remove(node, safe=True)
        values = (projection.linear.codes, projection.linear.scales, projection.linear.x_scale, projection.bias)
        remove_if_unused(model, [value for value in values if value is not None])


def _describe(value: ir.Value, name: str, like: _Projection, width: int) -> None:
    value.name, value.dtype = name, like.linear.dtype
    shape = like.node.outputs[0].shape
    value.shape = None if shape is None else ir.Shape([*shape[:-1], width])


def _split(model: ir.Model, whole: ir.Value, group: Sequence[_Projection], path: str) -> ir.Node:
    sizes = np.array([projection.linear.out_features for projection in group], np.int64)
    name = f"{path}.split_sizes"
    value = lazy_initializer(model, name, ir.DataType.INT64, sizes.shape, lambda: sizes)
    return ir.Node(
        "", "Split", [whole, value], [ir.AttrInt64("axis", -1)], num_outputs=len(group), name=f"{path}/Split"
    )


def _width(group: Sequence[_Projection]) -> int:
    return sum(projection.linear.out_features for projection in group)


def _codes(model: ir.Model, group: Sequence[_Projection], path: str) -> ir.Value:
    tensors = [_tensor(projection.linear.codes) for projection in group]

    def packed() -> NDArray[np.generic]:
        codes = np.concatenate([tensor.numpy().astype(np.int8) for tensor in tensors], axis=1)
        return packed_from_int4(codes.reshape(-1))

    shape = (group[0].linear.in_features, _width(group))
    return lazy_initializer(model, f"{path}.weight_codes", ir.DataType.INT4, shape, packed)


def _scales(model: ir.Model, group: Sequence[_Projection], path: str) -> ir.Value:
    tensors = [_tensor(projection.linear.scales) for projection in group]
    shape = (group[0].linear.in_features // group[0].linear.group_size, _width(group))
    name = f"{path}.weight_scales"
    return lazy_initializer(model, name, ir.DataType.FLOAT16, shape, lambda: _concatenated(tensors))


def _bias(model: ir.Model, group: Sequence[_Projection], path: str) -> ir.Value:
    tensors = [_tensor(projection.bias) for projection in group if projection.bias is not None]
    dtype = group[0].linear.dtype
    return lazy_initializer(model, f"{path}.bias", dtype, (_width(group),), lambda: _concatenated(tensors))


def _concatenated(tensors: Sequence[ir.TensorProtocol]) -> NDArray[np.generic]:
    return np.concatenate([tensor.numpy() for tensor in tensors], axis=-1)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    tensor = value.const_value
    assert tensor is not None  # plugin_linear and bias_addition give constants only
    return tensor
