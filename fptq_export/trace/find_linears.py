"""Which MatMul of a traced graph is which linear of the model.

torch's exporter writes the module path of every node into its `pkg.torch.onnx.name_scopes` metadata; that is the
mapping, for any architecture.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, count

import onnx_ir as ir

__all__ = ["LinearNode", "find_linears", "linear_or_reason", "module_path", "name_linear_nodes", "only_reader"]

_SCOPES_KEY = "pkg.torch.onnx.name_scopes"
_WRAPPER_PREFIX = "wrapped."
_FROM_THE_START = re.compile(r"\.slice\(None, \d+, None\)")
"""How the exporter writes `layers[:n]` in a path: the first modules of a list, under the numbers they have in it."""


@dataclass(frozen=True)
class LinearNode:
    """A linear and its nodes.

    Attributes:
        path: Torch module path.
        matmul: The MatMul; its first input is the activation.
        weight: The constant weight, [in, out] ([out, in] when `transpose` is set).
        transpose: The Transpose between a weight that something else reads too and the MatMul.
        bias: Constant bias [out] and the Add that adds it.
        bias_add: See `bias`.
        in_features: Input channels.
        out_features: Output channels.
    """

    path: str
    matmul: ir.Node
    weight: ir.Value
    transpose: ir.Node | None
    bias: ir.Value | None
    bias_add: ir.Node | None
    in_features: int
    out_features: int

    @property
    def input(self) -> ir.Value:
        """The value the linear reads."""
        value = self.matmul.inputs[0]
        if value is None:
            raise RuntimeError(f"MatMul of {self.path} has no input")
        return value

    @property
    def output(self) -> ir.Value:
        """The value the linear gives, bias included."""
        return (self.bias_add or self.matmul).outputs[0]


def find_linears(
    model: ir.Model, modules: Mapping[str, tuple[int, int]]
) -> tuple[dict[str, LinearNode], dict[str, str]]:
    """Match the MatMuls of a graph with the linears of the model.

    Args:
        model: Traced graph, with the exporter's metadata.
        modules: Torch path -> (in_features, out_features) of every linear.

    Returns:
        The linears found, and for every other one the reason why it was not.
    """
    nodes: dict[str, list[ir.Node]] = {path: [] for path in modules}
    reasons: dict[str, str] = {}
    holder: ir.Node | None = None
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.graph is model.graph:
            holder = node  # of the branches and loop bodies that come next
        path = module_path(node)
        if node.op_type not in ("MatMul", "Gemm") or path not in nodes:
            continue
        if node is holder:
            nodes[path].append(node)
        elif holder is not None:
            reasons[path] = f"the graph computes it inside {holder.op_type} node {holder.name!r}"
    found: dict[str, LinearNode] = {}
    for path, (in_features, out_features) in modules.items():
        if path in reasons:
            continue
        match nodes[path]:
            case []:
                reasons[path] = "the traced graph has no MatMul of this linear"
            case [node] if node.op_type == "MatMul":
                linear = linear_or_reason(path, node, in_features, out_features)
                if isinstance(linear, str):
                    reasons[path] = linear
                else:
                    found[path] = linear
            case [_]:
                reasons[path] = "the traced graph computes it with a Gemm that scales its operands or transposes x"
            case several:
                reasons[path] = f"the model calls it {len(several)} times in one pass"
    return found, reasons


def module_path(node: ir.Node) -> str:
    """Torch path of the module that a node belongs to, by the exporter's metadata; empty where there is none."""
    scopes = ast.literal_eval(node.metadata_props.get(_SCOPES_KEY, "[]"))
    return _FROM_THE_START.sub("", str(scopes[-2])).removeprefix(_WRAPPER_PREFIX) if len(scopes) >= 2 else ""


def linear_or_reason(path: str, matmul: ir.Node, in_features: int, out_features: int) -> LinearNode | str:
    """The linear that a MatMul computes, with the Add of its bias, or why it is none."""
    weight = matmul.inputs[1]
    transpose = weight.producer() if weight is not None else None
    if transpose is not None and transpose.op_type == "Transpose":
        weight = transpose.inputs[0]
    if weight is None or not weight.is_initializer() or weight.shape is None:
        return "its weight is not a constant of the graph"
    expected = [out_features, in_features] if transpose is not None else [in_features, out_features]
    if list(weight.shape) != expected:
        return f"its weight has shape {list(weight.shape)} in the graph, not {expected}"
    bias, bias_add = _bias(matmul, out_features)
    return LinearNode(path, matmul, weight, transpose, bias, bias_add, in_features, out_features)


def _bias(matmul: ir.Node, out_features: int) -> tuple[ir.Value | None, ir.Node | None]:
    add = only_reader(matmul.outputs[0])
    if add is None or add.op_type != "Add" or module_path(add) != module_path(matmul):
        return None, None
    for value in add.inputs:
        if value is not None and value.is_initializer() and value.shape == [out_features]:
            return value, add
    return None, None


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that reads a value, if it reads it once and nothing else does: no other node, no output of the graph."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def name_linear_nodes(model: ir.Model, linears: Mapping[str, LinearNode]) -> None:
    """Name the nodes of every linear after its torch path: `model.layers.0.mlp.up_proj/MatMul`.

    The rewrites look for them by name, so a name that another node has already is taken from it: that one, and any
    other that shares its name, gets a number behind it.
    """
    named: dict[ir.Node, str] = {}
    for path, linear in linears.items():
        for node in (linear.matmul, linear.bias_add, linear.transpose):
            if node is not None:
                named[node] = node.name = f"{path}/{node.op_type}"
    taken = set(named.values())
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node in named:
            continue
        base = node.name or node.op_type
        for name in chain((base,), (f"{base}_{number}" for number in count(1))):
            if name not in taken:
                node.name = name
                taken.add(name)
                break
