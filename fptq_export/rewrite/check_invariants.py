"""What must hold after every rewrite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fptq_export.errors import PrecisionError
from fptq_export.policy import ConvolutionPolicy, LayerPolicy, Policy
from fptq_export.rewrite.functions import DOMAIN, FRACTION, PER_TOKEN_QDQ, W4A8_PER_TOKEN
from fptq_export.sites import Sites

__all__ = ["CheckInvariants", "Interface", "interface_from_graph"]

_NO_SCALE = "by no constant scale"


@dataclass(frozen=True)
class Interface:
    """Inputs and outputs of a graph: name, element type and shape, as text."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def interface_from_graph(model: ir.Model) -> Interface:
    """What callers of the graph see."""
    return Interface(
        inputs=tuple(f"{value.name}: {value.dtype} {value.shape}" for value in model.graph.inputs),
        outputs=tuple(f"{value.name}: {value.dtype} {value.shape}" for value in model.graph.outputs),
    )


class CheckInvariants(ir.passes.InPlacePass):
    """Changes nothing; raises when a rewrite broke the graph or quantized something else than the policy says.

    Checks:
        1. Inputs and outputs are those of the original graph.
        2. Node names are unique, and every initializer and node output is used or is an output of the graph.
        3. Every quantized linear has its codes and scales, read by one node: INT4 [in, out] and [in/group_size, out],
           or INT8 [in, out] and FLOAT [out]. Every quantized convolution has INT8 codes and FLOAT scales.
        4. No other matrix is INT4 or INT8.
        5. Every quantized linear and convolution reads INT8 activations of its tier, static ones with the scale of the
           policy; those of `w4a16` linears are not quantized.

    Args:
        interface: Inputs and outputs before the first rewrite.
        sites: Linears of the graph.
        policy: What each of them runs.

    Raises:
        PrecisionError: Lists everything that does not hold.
    """

    def __init__(self, interface: Interface, sites: Sites, policy: Policy) -> None:
        super().__init__()
        self._interface = interface
        self._sites = sites
        self._policy = policy

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Check all invariants."""
        faults = [*self._interface_faults(model), *_name_faults(model), *self._weight_faults(model)]
        faults += self._activation_faults(model)
        if faults:
            raise PrecisionError("the rewritten graph is not what the policy says:\n  " + "\n  ".join(faults))
        return ir.passes.PassResult(model, modified=False)

    def _interface_faults(self, model: ir.Model) -> list[str]:
        now = interface_from_graph(model)
        return [] if now == self._interface else [f"inputs or outputs changed: {self._interface} -> {now}"]

    def _weight_faults(self, model: ir.Model) -> list[str]:
        faults = []
        convolutions = {found.path: found for found in self._sites.convolutions}
        arrays = {path: _weight_arrays(path, layer) for path, layer in self._policy.quantized().items()}
        for path, entry in self._policy.quantized_convolutions().items():
            arrays[path] = _convolution_arrays(path, entry, convolutions[path].channel_axis)
        expected = {f"{path}.weight_codes" for path in arrays}
        for path, wanted in arrays.items():
            for name, (shape, dtypes) in wanted.items():
                value = model.graph.initializers.get(name)
                if value is None or value.shape is None:
                    faults.append(f"{path}: initializer {name!r} is missing")
                elif list(value.shape) != shape or len(value.uses()) != 1:
                    faults.append(
                        f"{path}: {name!r} is {list(value.shape)} with {len(value.uses())} readers, not {shape}"
                    )
                elif value.dtype not in dtypes:
                    faults.append(f"{path}: {name!r} is {value.dtype}")
        for name, value in model.graph.initializers.items():
            matrix = value.shape is not None and len(value.shape) > 1
            if (value.dtype == ir.DataType.INT4 or (value.dtype == ir.DataType.INT8 and matrix)) and (
                name not in expected
            ):
                faults.append(f"{name!r} is {value.dtype} but belongs to no quantized linear")
        return faults

    def _activation_faults(self, model: ir.Model) -> list[str]:
        faults = []
        wanted_by_path = {path: _wanted_activation(layer) for path, layer in self._policy.quantized().items()}
        for path, entry in self._policy.quantized_convolutions().items():
            wanted_by_path[path] = f"scale {np.float32(entry.activation_scale or 0.0)}"
        for path, wanted in wanted_by_path.items():
            codes = model.graph.initializers.get(f"{path}.weight_codes")
            if codes is None:
                continue
            found = {_activation(linear) for linear in _linears(codes)}
            if found != {wanted}:
                faults.append(f"{path}: its activations are quantized {sorted(found)}, not [{wanted!r}]")
        return faults


def _weight_arrays(path: str, layer: LayerPolicy) -> dict[str, tuple[list[int], set[ir.DataType]]]:
    """Initializer -> its shape and the types it may have."""
    codes, scales = f"{path}.weight_codes", f"{path}.weight_scales"
    shape = [layer.in_features, layer.out_features]
    if layer.precision == "w8a8":
        return {codes: (shape, {ir.DataType.INT8}), scales: (shape[1:], {ir.DataType.FLOAT})}
    groups = layer.in_features // (layer.group_size or layer.in_features)
    floats = {ir.DataType.FLOAT16, ir.DataType.FLOAT}
    return {codes: (shape, {ir.DataType.INT4}), scales: ([groups, layer.out_features], floats)}


def _convolution_arrays(
    path: str, entry: ConvolutionPolicy, channel_axis: int
) -> dict[str, tuple[list[int], set[ir.DataType]]]:
    """The same of a convolution."""
    shape = list(entry.weight_shape)
    return {
        f"{path}.weight_codes": (shape, {ir.DataType.INT8}),
        f"{path}.weight_scales": ([shape[channel_axis]], {ir.DataType.FLOAT}),
    }


def _wanted_activation(layer: LayerPolicy) -> str:
    """What `_activation` must say."""
    if layer.precision == "w4a16":
        return "not at all"
    if layer.activation_scale is not None:
        return f"scale {np.float32(layer.activation_scale)}"
    return "per token, as fractions" if layer.precision == "w8a8" else "per token"


def _linears(codes: ir.Value) -> Iterator[ir.Node]:
    """The nodes that multiply by a weight: MatMuls behind DequantizeLinear and Cast, or fused linears."""
    for use in codes.uses():
        if use.node.op_type in ("DequantizeLinear", "Cast"):
            yield from _linears(use.node.outputs[0])
        else:
            yield use.node


def _activation(linear: ir.Node) -> str:
    """How a linear quantizes what it reads: `per token`, `scale s`, or what stands where neither is found."""
    if linear.domain == DOMAIN:
        return "per token" if linear.op_type == W4A8_PER_TOKEN else _scale(linear.inputs[3])
    value = linear.inputs[0]
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Cast":
        value = node.inputs[0]
        node = value.producer() if value is not None else None
    if node is not None and node.domain == DOMAIN and node.op_type == PER_TOKEN_QDQ:
        return "per token"
    if node is None or node.op_type != "DequantizeLinear":
        return "not at all"
    written, read = _scale(_producer(node.inputs[0]).inputs[1]), _scale(node.inputs[1])
    if (written, read) == ("scale 1.0", f"scale {FRACTION}") and _is_rescaled(linear, _producer(node.inputs[0])):
        return "per token, as fractions"
    return read if read in (written, _NO_SCALE) else f"{written} and dequantized {read}"


def _is_rescaled(linear: ir.Node, quantize: ir.Node) -> bool:
    """Whether the only reader of a product multiplies it by the scale that its input was divided by."""
    product, reader = linear.outputs[0], _only_reader(linear.outputs[0])
    if reader.op_type == "Cast":
        product, reader = reader.outputs[0], _only_reader(reader.outputs[0])
    divide = _producer(quantize.inputs[0])
    if divide.op_type != "Div" or reader.op_type != "Mul":
        return False
    factors = [_producer(value) for value in reader.inputs if value is not product]
    return any(divide.inputs[1] in factor.inputs and _multiplies_by(factor, 1 / FRACTION) for factor in factors)


def _multiplies_by(node: ir.Node, number: np.float32) -> bool:
    return node.op_type == "Mul" and f"scale {number}" in [_scale(value) for value in node.inputs]


def _only_reader(value: ir.Value) -> ir.Node:
    """The node that reads a value; one without a meaning where there are several or none."""
    readers = [use.node for use in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else ir.Node("", "None", [None, None])


def _producer(value: ir.Value | None) -> ir.Node:
    """The node that writes a value; one without a meaning where none does."""
    node = value.producer() if value is not None else None
    return node if node is not None else ir.Node("", "None", [None, None])


def _scale(value: ir.Value | None) -> str:
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return f"scale {tensor.numpy().reshape(-1)[0]}" if tensor is not None and tensor.size == 1 else _NO_SCALE


def _name_faults(model: ir.Model) -> list[str]:
    seen: set[str] = set()
    faults = []
    for node in model.graph:
        if not node.name or node.name in seen:
            faults.append(f"node name {node.name!r} is missing or used twice")
        seen.add(node.name or "")
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            faults.append(f"nothing reads the outputs of node {node.name!r}")
    faults += [
        f"nothing reads initializer {name!r}"
        for name, value in model.graph.initializers.items()
        if not value.uses() and not value.is_graph_output()
    ]
    return faults
