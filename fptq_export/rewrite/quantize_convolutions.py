"""Quantize the convolutions of the policy: INT8 weights by output channel, INT8 inputs with one scale."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from fptq_export.policy import ConvolutionPolicy, Policy, PolicyArrays
from fptq_export.rewrite.functions import dequantized_int8_weight, static_qdq
from fptq_export.rewrite.initializers import ZERO_POINT, constant_initializer, element_type, lazy_initializer
from fptq_export.rewrite.names import UniqueNames
from fptq_export.sites import Convolution, Sites

__all__ = ["QuantizeConvolutions"]


class QuantizeConvolutions(ir.passes.InPlacePass):
    """Give every quantized Conv and ConvTranspose an INT8 weight and an INT8 input, in standard Q/DQ operators.

    Rules:
        1. The weight is `DequantizeLinear(codes INT8, scales FLOAT [out], axis)`: axis 0 of a Conv, [out, in/group,
           kernel...], and 1 of a ConvTranspose, [in, out, kernel...]. Depthwise convolutions have one scale a channel.
        2. The input goes through QuantizeLinear and DequantizeLinear with its constant FLOAT scale. Convolutions that
           read the same tensor with the same scale share one pair.
        3. A weight that something else reads keeps its float values for those readers.
        4. The bias, `float` convolutions, and every other node are left alone.

    Before: x, W -> Conv. After: QDQ(x), DQ(codes) -> Conv.

    Args:
        sites: Convolutions of the graph.
        policy: What each of them runs.
        arrays: Codes and scales.
    """

    def __init__(self, sites: Sites, policy: Policy, arrays: PolicyArrays) -> None:
        super().__init__()
        self._convolutions = {found.path: found for found in sites.convolutions}
        self._policy = policy
        self._arrays = arrays

    def requires(self, model: ir.Model) -> None:
        """Every quantized convolution is in the graph, may be quantized, and has a scale."""
        names = {node.name for node in model.graph}
        for path, entry in self._policy.quantized_convolutions().items():
            found = self._convolutions.get(path)
            if found is None or found.node not in names or found.float_reason is not None:
                raise ir.passes.PreconditionError(f"the graph has no convolution {path!r} that may be quantized")
            if entry.activation_scale is None:
                raise ir.passes.PreconditionError(f"{path!r} has no activation scale")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantize every convolution of the policy."""
        quantized = self._policy.quantized_convolutions()
        nodes = {found.node: path for path, found in self._convolutions.items() if path in quantized}
        names = UniqueNames(model)
        inputs: dict[tuple[ir.Value | None, float | None], ir.Value] = {}
        # In the order of the graph, so that a shared input is quantized before its first reader.
        for node in list(model.graph):
            path = nodes.get(node.name or "")
            if path is None:
                continue
            entry = quantized[path]
            self._quantize_weight(model, node, self._convolutions[path], entry, names)
            key = (node.inputs[0], entry.activation_scale)
            if key not in inputs:
                inputs[key] = _quantized_input(model, node, entry, path, names)
            node.replace_input_with(0, inputs[key])
        return ir.passes.PassResult(model, modified=bool(quantized))

    def ensures(self, model: ir.Model) -> None:
        """Every quantized convolution has integer codes."""
        for path in self._policy.quantized_convolutions():
            if f"{path}.weight_codes" not in model.graph.initializers:
                raise ir.passes.PostconditionError(f"{path!r} has no quantized weight")

    def _quantize_weight(
        self, model: ir.Model, node: ir.Node, found: Convolution, entry: ConvolutionPolicy, names: UniqueNames
    ) -> None:
        codes, scales = f"{found.path}.weight_codes", f"{found.path}.weight_scales"
        shape, channels = entry.weight_shape, (entry.weight_shape[found.channel_axis],)
        before = model.graph.initializers[found.weight]
        tape = Tape()
        weight = dequantized_int8_weight(
            tape,
            lazy_initializer(model, codes, ir.DataType.INT8, shape, lambda: self._arrays.read(codes, shape)),
            lazy_initializer(model, scales, ir.DataType.FLOAT, channels, lambda: self._arrays.read(scales, channels)),
            element_type(before),
            found.channel_axis,
        )
        names.name_nodes(tape.nodes, found.path)
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(1, weight)
        if not before.uses() and not before.is_graph_output():
            del model.graph.initializers[found.weight]


def _quantized_input(
    model: ir.Model, node: ir.Node, entry: ConvolutionPolicy, path: str, names: UniqueNames
) -> ir.Value:
    """Quantize what `node` reads, right before it; every other reader keeps the original."""
    x = node.inputs[0]
    if x is None:
        raise RuntimeError(f"node {node.name!r} has no input")
    scale = constant_initializer(model, f"{path}.activation_scale", np.array(entry.activation_scale, np.float32))
    zero_point = constant_initializer(model, ZERO_POINT, np.array(0, np.int8))
    tape = Tape()
    y = static_qdq(tape, x, scale, zero_point, element_type(x))
    y.dtype, y.shape = element_type(x), x.shape
    names.name_nodes(tape.nodes, path)
    model.graph.insert_before(node, tape.nodes)
    return y
