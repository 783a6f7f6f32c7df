"""What must hold after every rewrite."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from fptq_export.errors import PrecisionError
from fptq_export.policy import Policy
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
                    faults.append(f"{path}: {name!r} is {list(value.shape)} with {len(value.uses())} readers, not {shape}")
        for name, value in model.graph.initializers.items():
            if value.dtype == ir.DataType.INT4 and name not in expected:
                faults.append(f"{name!r} is INT4 but belongs to no quantized linear")
        return faults


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
