"""Turn the policy into standard Q/DQ operators: the form any ONNX tool reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from fptq_export.packing import int4_from_packed, packed_from_int4
from fptq_export.policy import LayerPolicy, Policy, PolicyArrays
from fptq_export.rewrite.functions import (
    DOMAIN,
    PER_TOKEN_QDQ,
    dequantized_int8_weight,
    dequantized_weight,
    per_token_fractions,
    per_token_qdq_function,
    register_function,
    rescaled,
    scale_type,
    static_qdq,
)
from fptq_export.rewrite.initializers import ZERO_POINT, constant_initializer, element_type, lazy_initializer
from fptq_export.rewrite.names import UniqueNames
from fptq_export.sites import Linear, Sites

__all__ = ["InsertQdq"]


@dataclass(frozen=True)
class _Activation:
    """A quantized input. `factor` is what its linears multiply their product by, FLOAT [..., 1]; None for nothing."""

    value: ir.Value
    factor: ir.Value | None = None


class InsertQdq(ir.passes.InPlacePass):
    """Give every quantized linear an integer weight behind DequantizeLinear and the activation of its policy.

    Rules:
        1. An INT4 weight is `DequantizeLinear(codes INT4 [in, out], scales [in/g, out], axis=0, block_size=g)`; an INT8
           weight is `DequantizeLinear(codes INT8 [in, out], scales FLOAT [out], axis=1)`.
        2. A static activation goes through QuantizeLinear and DequantizeLinear with its constant float32 scale.
        3. A per-token activation of a `w4a8` linear goes through the function `FptqQuantizeDequantizePerToken`.
        4. That of a `w8a8` linear is scaled by its token, then quantized with a constant scale, which is what an INT8
           GEMM needs; the product is scaled back (`per_token_fractions`).
        5. The activation of a `w4a16` linear is left alone.
        6. Linears that read the same tensor with the same scale share one pair; a tied weight keeps its other readers.
        7. `float` layers, and every other node, are left alone.

    Args:
        sites: Linears of the graph.
        policy: What each of them runs.
        arrays: Codes and scales.
    """

    def __init__(self, sites: Sites, policy: Policy, arrays: PolicyArrays) -> None:
        super().__init__()
        self._sites = sites
        self._policy = policy
        self._arrays = arrays

    def requires(self, model: ir.Model) -> None:
        """Every quantized linear's node is in the graph, and its entry says all that is needed."""
        names = {node.name for node in model.graph}
        for path, layer in self._policy.quantized().items():
            if self._sites.linear(path).node not in names:
                raise ir.passes.PreconditionError(f"the graph has no node for {path!r}")
            grouped = layer.group_size is not None and layer.in_features % layer.group_size == 0
            if not grouped and layer.precision != "w8a8":
                raise ir.passes.PreconditionError(f"{path!r} has no group size that divides its input channels")
            if not _activation_is_whole(layer):
                raise ir.passes.PreconditionError(
                    f"{path!r} is {layer.activation} with activation scale {layer.activation_scale}"
                )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Quantize every linear of the policy."""
        quantized = self._policy.quantized()
        linears = {linear.node: linear for linear in self._sites.linears if linear.path in quantized}
        names = UniqueNames(model)
        activations: dict[tuple[ir.Value | None, float | None, bool], _Activation] = {}
        # In the order of the graph, so that a shared activation is quantized before its first reader.
        for node in list(model.graph):
            linear = linears.get(node.name or "")
            if linear is None:
                continue
            layer = quantized[linear.path]
            _complete_types(node, element_type(model.graph.initializers[linear.weight]))
            self._quantize_weight(model, node, linear, layer, names)
            if layer.activation is None:
                continue
            # By what the node reads, which is not what its site names where the head takes the last token only.
            key = (node.inputs[0], layer.activation_scale, _has_factor(layer))
            if key not in activations:
                activations[key] = _quantized_activation(model, node, layer, linear.path, names)
            node.replace_input_with(0, activations[key].value)
            if (factor := activations[key].factor) is not None:
                _rescale_product(model, node, factor, linear.path, names)
        return ir.passes.PassResult(model, modified=bool(quantized))

    def ensures(self, model: ir.Model) -> None:
        """Every quantized linear multiplies by integer codes."""
        for path in self._policy.quantized():
            if f"{path}.weight_codes" not in model.graph.initializers:
                raise ir.passes.PostconditionError(f"{path!r} has no quantized weight")

    def _quantize_weight(
        self, model: ir.Model, node: ir.Node, linear: Linear, layer: LayerPolicy, names: UniqueNames
    ) -> None:
        dtype = element_type(model.graph.initializers[linear.weight])
        tape = Tape()
        if layer.precision == "w8a8":
            weight = dequantized_int8_weight(tape, *self._int8_weight(model, linear), dtype)
        elif layer.group_size is None:
            raise RuntimeError(f"{linear.path} is quantized without a group size")
        else:
            codes = self._codes(model, linear)
            scales = self._scales(model, linear, layer.group_size, scale_type(dtype))
            weight = dequantized_weight(tape, codes, scales, layer.group_size, dtype)
        names.name_nodes(tape.nodes, linear.path)
        model.graph.insert_before(node, tape.nodes)
        node.replace_input_with(1, weight)
        _remove_if_unused(model, linear)

    def _int8_weight(self, model: ir.Model, linear: Linear) -> tuple[ir.Value, ir.Value]:
        codes, scales = f"{linear.path}.weight_codes", f"{linear.path}.weight_scales"
        shape = (linear.in_features, linear.out_features)

        def transposed() -> NDArray[np.generic]:
            return np.ascontiguousarray(self._arrays.read(codes, shape[::-1]).T)

        return (
            lazy_initializer(model, codes, ir.DataType.INT8, shape, transposed),
            lazy_initializer(model, scales, ir.DataType.FLOAT, shape[1:], lambda: self._arrays.read(scales, shape[1:])),
        )

    def _codes(self, model: ir.Model, linear: Linear) -> ir.Value:
        name = f"{linear.path}.weight_codes"

        def packed() -> NDArray[np.generic]:
            stored = self._arrays.read(name, (linear.out_features, linear.in_features // 2))
            # Flat: a row of an odd number of codes ends inside a byte.
            return packed_from_int4(int4_from_packed(stored).T.reshape(-1))

        return lazy_initializer(model, name, ir.DataType.INT4, (linear.in_features, linear.out_features), packed)

    def _scales(self, model: ir.Model, linear: Linear, group_size: int, dtype: ir.DataType) -> ir.Value:
        name = f"{linear.path}.weight_scales"
        groups = linear.in_features // group_size

        def transposed() -> NDArray[np.generic]:
            stored = self._arrays.read(name, (linear.out_features, groups))
            return np.ascontiguousarray(stored.T.astype(dtype.numpy()))

        return lazy_initializer(model, name, dtype, (groups, linear.out_features), transposed)


def _complete_types(matmul: ir.Node, dtype: ir.DataType) -> None:
    """Note the type of what a MatMul reads and writes, which is one; a custom operator's output may come without."""
    for value in (matmul.inputs[0], matmul.outputs[0]):
        if value is not None and value.dtype is None:
            value.dtype = dtype


def _activation_is_whole(layer: LayerPolicy) -> bool:
    """Whether tier and scale fit each other and the precision."""
    if layer.precision == "w4a16":
        return layer.activation is None and layer.activation_scale is None
    return layer.activation is not None and (layer.activation == "per_token") == (layer.activation_scale is None)


def _has_factor(layer: LayerPolicy) -> bool:
    return layer.precision == "w8a8" and layer.activation == "per_token"


def _quantized_activation(
    model: ir.Model, node: ir.Node, layer: LayerPolicy, path: str, names: UniqueNames
) -> _Activation:
    """Quantize what `node` reads, right before it; every other reader keeps the original."""
    x = node.inputs[0]
    if x is None:
        raise RuntimeError(f"node {node.name!r} has no input")
    dtype = element_type(x)
    tape = Tape()
    factor = None
    if _has_factor(layer):
        y, factor = per_token_fractions(tape, x, dtype)
    elif layer.activation_scale is None:
        register_function(model, per_token_qdq_function(dtype))
        y = tape.op(PER_TOKEN_QDQ, [x], domain=DOMAIN)
    else:
        scale = np.array(layer.activation_scale, np.float32)
        scale_value = constant_initializer(model, f"{path}.activation_scale", scale)
        y = static_qdq(tape, x, scale_value, constant_initializer(model, ZERO_POINT, np.array(0, np.int8)), dtype)
    y.dtype, y.shape = dtype, x.shape
    names.name_nodes(tape.nodes, path)
    model.graph.insert_before(node, tape.nodes)
    return _Activation(y, factor)


def _rescale_product(model: ir.Model, node: ir.Node, factor: ir.Value, path: str, names: UniqueNames) -> None:
    """Multiply what `node` writes; the result takes its name, and its readers."""
    product = node.outputs[0]
    readers = list(product.uses())
    dtype = element_type(product)
    tape = Tape()
    y = rescaled(tape, product, factor, dtype)
    names.name_nodes(tape.nodes, path)
    model.graph.insert_after(node, tape.nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, y)
    for index, output in enumerate(model.graph.outputs):
        if output is product:
            model.graph.outputs[index] = y
    y.name, y.dtype, y.shape, product.name = product.name, dtype, product.shape, f"{node.name}.product"


def _remove_if_unused(model: ir.Model, linear: Linear) -> None:
    """Drop the float weight (and the Transpose before it) once nothing reads it."""
    weight = model.graph.initializers[linear.weight]
    for use in list(weight.uses()):
        if use.node.op_type == "Transpose" and not use.node.outputs[0].uses():
            model.graph.remove(use.node, safe=True)
    if not weight.uses() and not weight.is_graph_output():
        del model.graph.initializers[linear.weight]
    cloned = model.graph.initializers.get(f"{linear.path}.equalized_weight")
    if cloned is not None and not cloned.uses():
        del model.graph.initializers[cloned.name or ""]
