"""What an ONNX file of the user must be, looked at before anything long starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.graph_io import check_data_file, load_graph

__all__ = ["check_onnx", "files_of_onnx", "opened_onnx"]

_STANDARD = frozenset({"", "ai.onnx"})
_KNOWN_DOMAINS = _STANDARD | {"ai.onnx.ml"}
_OLDEST_OPSET = 7
"""ONNX's version converter starts here."""
_QUANTIZED = frozenset({"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger"})
_HINT = "mend every entry listed above in the program that wrote the file, and export it again"


def opened_onnx(path: Path) -> ir.Model:
    """Open the graph of a user; its external weights stay on disk until read.

    Raises:
        UserError: The file is missing or not readable, or its weights are.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", "give the path of an ONNX model")
    model = load_graph(path)
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                _check_data(value.const_value)
    return model


def _check_data(tensor: ir.ExternalTensor) -> None:
    file = Path(tensor.path)
    if not file.is_file():
        raise UserError(str(file), f"no such file; it holds {tensor.name!r}", "copy it beside the .onnx file")
    size, end = file.stat().st_size, (tensor.offset or 0) + (tensor.length or tensor.nbytes)
    if size < end:
        cause = f"{size} bytes, but {tensor.name!r} ends at byte {end}: it was cut off"
        raise UserError(str(file), cause, "copy it again")
    check_data_file(tensor)


def check_onnx(path: Path) -> None:
    """Look at the graph of a user.

    Raises:
        UserError: The file is missing or not readable, or its weights are.
        UserErrors: The graph is none that can be calibrated and rewritten; everything that is wrong is listed.
    """
    # One after the other: a file may hold its weights, and each of the two reads it whole.
    problems = _graph_problems(path) or _checker_problems(path)
    if problems:
        raise UserErrors(str(path), problems, _HINT)


def _graph_problems(path: Path) -> list[Problem]:
    model = opened_onnx(path)
    return [*_opset_problems(model), *_input_problems(model), *_operator_problems(model)]


def files_of_onnx(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """The file itself and the data files that its weights lie in."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    data = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return (path, *sorted(data))


def _opset_problems(model: ir.Model) -> Iterator[Problem]:
    version = model.opset_imports.get("")
    if version is None:
        yield Problem("opset_import", "no version of the standard operators, so their meaning is not known")
    elif version < _OLDEST_OPSET:
        yield Problem("opset_import", f"opset {version} is older than {_OLDEST_OPSET}, the first that can be upgraded")


def _input_problems(model: ir.Model) -> Iterator[Problem]:
    for value in model.graph.inputs:
        if not isinstance(value.type, ir.TensorType) or value.shape is None:
            yield Problem(f"graph.input {value.name!r}", "is not a tensor of a known type and rank")


def _operator_problems(model: ir.Model) -> Iterator[Problem]:
    """Operators that nobody here can run, each once with the nodes that use it."""
    functions = {(function.domain, function.name) for function in model.functions.values()}
    nodes: dict[tuple[str, str], list[str]] = {}
    for node in _all_nodes(model):
        custom = node.domain not in _KNOWN_DOMAINS and (node.domain, node.op_type) not in functions
        if custom or (node.domain in _STANDARD and node.op_type in _QUANTIZED):
            nodes.setdefault((node.domain, node.op_type), []).append(node.name or "without a name")
    for (domain, op_type), names in nodes.items():
        where = f"graph.node {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        if domain in _STANDARD:
            yield Problem(where, f"{op_type}: the model is quantized already, and codes are made from float weights")
        else:
            cause = f"custom operator {domain}::{op_type}: it has no shape inference and ONNX Runtime cannot run it"
            yield Problem(where, cause)


def _all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the graph, of its subgraphs and of its functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _checker_problems(path: Path) -> list[Problem]:
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        first, _, rest = str(error).strip().partition("\n")
        context = rest.strip().partition("\n")[0].removeprefix("==> Context: ")
        return [Problem(context or "graph", first)]
    return []
