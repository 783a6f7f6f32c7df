"""What must hold after every rewrite."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from fptq_export.errors import PrecisionError
from fptq_export.policy import Policy
from fptq_export.rewrite.functions import DOMAIN, PER_TOKEN_QDQ, W4A8_PER_TOKEN
from fptq_export.sites import Sites

__all__ = ["CheckInvariants", "Interface", "interface_from_graph"]


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
        3. Every quantized linear has INT4 codes [in, out] and scales [in/group_size, out], read by one node.
        4. Nothing else is INT4.
        5. Every quantized linear reads INT8 activations of its tier, static ones with the scale of the policy.

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
        expected: set[str] = set()
        for path, layer in self._policy.quantized().items():
            groups = layer.in_features // (layer.group_size or layer.in_features)
            shapes = {
                f"{path}.weight_codes": [layer.in_features, layer.out_features],
                f"{path}.weight_scales": [groups, layer.out_features],
            }
            expected.add(f"{path}.weight_codes")
            for name, shape in shapes.items():
                value = model.graph.initializers.get(name)
                if value is None or value.shape is None:
                    faults.append(f"{path}: initializer {name!r} is missing")
                elif list(value.shape) != shape or len(value.uses()) != 1:
                    faults.append(
                        f"{path}: {name!r} is {list(value.shape)} with {len(value.uses())} readers, not {shape}"
                    )
                elif (value.dtype == ir.DataType.INT4) != name.endswith(".weight_codes"):
                    faults.append(f"{path}: {name!r} is {value.dtype}")
        for name, value in model.graph.initializers.items():
            if value.dtype == ir.DataType.INT4 and name not in expected:
                faults.append(f"{name!r} is INT4 but belongs to no quantized linear")
        return faults

    def _activation_faults(self, model: ir.Model) -> list[str]:
        faults = []
        for path, layer in self._policy.quantized().items():
            codes = model.graph.initializers.get(f"{path}.weight_codes")
            if codes is None:
                continue
            wanted = "per token" if layer.activation_scale is None else f"scale {np.float32(layer.activation_scale)}"
            found = {_activation(linear) for linear in _linears(codes)}
            if found != {wanted}:
                faults.append(f"{path}: its activations are quantized {sorted(found)}, not [{wanted!r}]")
        return faults


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
    return _scale(node.inputs[1])


def _scale(value: ir.Value | None) -> str:
    tensor = value.const_value if value is not None else None
    return (
        f"scale {tensor.numpy().reshape(-1)[0]}" if tensor is not None and tensor.size == 1 else "by no constant scale"
    )


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
