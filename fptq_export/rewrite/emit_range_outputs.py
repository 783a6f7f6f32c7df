"""Give one more output: how far the inputs of static layers go beyond what their scales cover."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_ir.tape import Tape

from fptq_export.equalized_inputs import EqualizedInputs
from fptq_export.errors import UserError
from fptq_export.policy import Policy, PolicyArrays
from fptq_export.range_outputs import COLUMNS, METADATA_KEY, OUTPUT_NAME, RangeOutputs, RangeRow
from fptq_export.rewrite.functions import DOMAIN, RANGE_MONITOR, range_monitor_function, register_function
from fptq_export.rewrite.initializers import constant_initializer, element_type
from fptq_export.rewrite.names import UniqueNames
from fptq_export.sites import Sites

__all__ = ["EmitRangeOutputs", "without_range_output"]


@dataclass(frozen=True)
class _Static:
    """A layer whose input is quantized with one constant scale."""

    path: str
    node: str
    weight: str
    scale: float
    absmax: float | None
    expert: str | None


class EmitRangeOutputs(ir.passes.InPlacePass):
    """Add the output `range_monitor` FLOAT [rows, 3]: saturation rate, peak over range, and number of values.

    Rules:
        1. A row is a tensor and a scale: linears (and convolutions) that read one tensor with one scale share it, as
           they share its quantization. Rows are in the order of the graph.
        2. Static layers of `w4a8` and `w8a8` have a row, equalized ones with what they read after the fold. Layers that
           are quantized token by token, `w4a16` and `float` layers have none: nothing of them can be clipped.
        3. Every value of a call that is quantized is counted, so that of padding too.
        4. Nothing that was in the graph is changed: a node `fptq::FptqRangeMonitor(x, scale)` reads beside the layer,
           right behind it, so that what they share keeps the layer's name when the graph is lowered.
        5. A policy without static layers is refused: the output would have no row.

    The order of the rows is `ranges`, and stands in the metadata of the model.

    Args:
        sites: Linears and convolutions of the graph.
        policy: What each of them runs.
        arrays: Maxima of calibration and equalizations.

    Attributes:
        ranges: What each row is; None before the pass has run.

    Raises:
        UserError: Rule 5.
    """

    def __init__(self, sites: Sites, policy: Policy, arrays: PolicyArrays) -> None:
        super().__init__()
        self._layers = {layer.node: layer for layer in _static_layers(sites, policy, arrays)}
        self.ranges: RangeOutputs | None = None

    def requires(self, model: ir.Model) -> None:
        """Every static layer is in the graph, and the name of the output is free."""
        missing = self._layers.keys() - {node.name for node in model.graph}
        if missing:
            raise ir.passes.PreconditionError(f"the graph has no nodes {sorted(missing)}")
        values = (value.name for node in model.graph for value in node.outputs)
        if OUTPUT_NAME in {*values, *(value.name for value in model.graph.inputs)}:
            raise ir.passes.PreconditionError(f"the graph has a value {OUTPUT_NAME!r} of its own")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add a monitor a row, and the output that joins them."""
        if not self._layers:
            cause = "no layer of this policy has a static activation scale, so none can saturate"
            raise UserError("--emit-range-outputs", cause, "leave the option out")
        readers: dict[tuple[ir.Value, np.float32], list[tuple[_Static, ir.Node]]] = {}
        for node in model.graph:
            layer = self._layers.get(node.name or "")
            x = node.inputs[0] if layer is not None else None
            if layer is not None and x is not None:
                readers.setdefault((x, np.float32(layer.scale)), []).append((layer, node))
        names = UniqueNames(model)
        rows = [_monitor(model, x, *group[0], names) for (x, _), group in readers.items()]
        _add_output(model, rows)
        self.ranges = RangeOutputs(rows=tuple(_row([layer for layer, _ in group]) for group in readers.values()))
        model.metadata_props[METADATA_KEY] = self.ranges.model_dump_json()
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """The last output is ours, and every static layer is in one row."""
        named = [path for row in (self.ranges.rows if self.ranges is not None else ()) for path in row.layers]
        if sorted(named) != sorted(layer.path for layer in self._layers.values()):
            raise ir.passes.PostconditionError("not every static layer is in one row")
        if model.graph.outputs[-1].name != OUTPUT_NAME:
            raise ir.passes.PostconditionError(f"{OUTPUT_NAME!r} is not the last output")


def without_range_output(model: ir.Model) -> ir.Model:
    """The graph as it is without the option, in place: for who cuts it where one tensor carries everything."""
    for value in [value for value in model.graph.outputs if value.name == OUTPUT_NAME]:
        if METADATA_KEY in model.metadata_props:  # else it is a user's own
            model.graph.outputs.remove(value)
            common.RemoveUnusedNodesPass()(model)
            common.RemoveUnusedFunctionsPass()(model)
            del model.metadata_props[METADATA_KEY]
    return model


def _static_layers(sites: Sites, policy: Policy, arrays: PolicyArrays) -> Iterator[_Static]:
    quantized, convolutions = policy.quantized(), policy.quantized_convolutions()
    inputs = EqualizedInputs(policy, arrays, sites)
    for linear in sites.linears:
        layer = quantized.get(linear.path)
        if layer is not None and layer.activation_scale is not None:
            place = (linear.path, linear.node, linear.weight)
            yield _Static(*place, layer.activation_scale, inputs.absmax(linear.path), linear.expert)
    for found in sites.convolutions:
        entry = convolutions.get(found.path)
        if entry is not None and entry.activation_scale is not None:
            place = (found.path, found.node, found.weight)
            yield _Static(*place, entry.activation_scale, entry.input_absmax, expert=None)


def _monitor(model: ir.Model, x: ir.Value, layer: _Static, node: ir.Node, names: UniqueNames) -> ir.Value:
    """A row, FLOAT [1, 3], computed behind the first layer that reads `x`."""
    # A custom operator's output may come without a type; a layer multiplies numbers of one.
    dtype = x.dtype if x.dtype is not None else element_type(model.graph.initializers[layer.weight])
    register_function(model, range_monitor_function(dtype))
    scale = constant_initializer(model, f"{layer.path}.activation_scale", np.array(layer.scale, np.float32))
    tape = Tape()
    row = tape.op(RANGE_MONITOR, [x, scale], domain=DOMAIN)
    row.dtype, row.shape = ir.DataType.FLOAT, ir.Shape([1, len(COLUMNS)])
    names.name_nodes(tape.nodes, f"{layer.path}.{OUTPUT_NAME}")
    model.graph.insert_after(node, tape.nodes)
    return row


def _add_output(model: ir.Model, rows: list[ir.Value]) -> None:
    tape = Tape()
    output = tape.op("Concat", rows, {"axis": 0})
    (node,) = tape.nodes
    node.name, output.name = f"{OUTPUT_NAME}/Concat", OUTPUT_NAME
    output.dtype, output.shape = ir.DataType.FLOAT, ir.Shape([len(rows), len(COLUMNS)])
    model.graph.extend(tape.nodes)
    model.graph.outputs.append(output)


def _row(layers: list[_Static]) -> RangeRow:
    measured = [layer.absmax for layer in layers if layer.absmax is not None]
    return RangeRow(
        layers=tuple(layer.path for layer in layers),
        scale=layers[0].scale,
        calibrated_absmax=max(measured, default=None),
        expert=layers[0].expert if all(layer.expert is not None for layer in layers) else None,
    )
