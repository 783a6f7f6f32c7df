"""What is in an ONNX graph: its interface, its operators, and what is quantized how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from fptq_export.graph_io import load_graph
from fptq_export.inspect.report import Cell, Inspection, Section
from fptq_export.rewrite.functions import DOMAIN, PER_TOKEN_QDQ, W4A8_PER_TOKEN, W4A8_STATIC
from fptq_export.rewrite.lint_precision import offending_nodes, origin_of

__all__ = ["inspect_onnx"]

_WEIGHTED = frozenset({"MatMul", "Gemm", "Conv", "ConvTranspose"})
_FUSED = {W4A8_STATIC: "INT8, one scale", W4A8_PER_TOKEN: "INT8, a scale a token"}
_BITS = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}
_STANDARD = "ai.onnx"


def inspect_onnx(path: Path) -> Inspection:
    """Look at a graph; its weights are not read.

    Raises:
        UserError: It cannot be opened.
    """
    model = load_graph(path)
    nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
    forbidden = offending_nodes(model)
    problems = tuple(f"{name}: multiplies block-quantized weights by INT8 Q/DQ activations" for name in forbidden)
    sections = (
        _about(model, path),
        _values("inputs", model.graph.inputs),
        _values("outputs", model.graph.outputs),
        _operators(nodes),
        _quantized(nodes),
        _placement(nodes),
        _forbidden(len(forbidden)),
    )
    shown = tuple(section for section in sections if section.rows)
    return Inspection(path=str(path), kind="onnx", sections=shown, precision_problems=problems)


def _about(model: ir.Model, path: Path) -> Section:
    opsets = ", ".join(f"{domain or _STANDARD} {version}" for domain, version in model.graph.opset_imports.items())
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    rows = (
        ("file", f"{path.stat().st_size} bytes"),
        ("weights in", ", ".join(sorted(external)) or "the file itself"),
        ("IR version", model.ir_version),
        ("opsets", opsets),
        ("producer", " ".join(word for word in (model.producer_name, model.producer_version) if word) or None),
        ("functions", ", ".join(f"{domain}::{name}" for domain, name, _ in model.functions) or None),
        ("initializers", len(model.graph.initializers)),
    )
    return Section(name="about", title=path.name, columns=("what", "value"), rows=rows)


def _values(name: str, values: Sequence[ir.Value]) -> Section:
    rows = tuple((value.name, str(value.dtype), str(value.shape)) for value in values)
    return Section(name=name, title=name, columns=("name", "type", "shape"), rows=rows)


def _operators(nodes: list[ir.Node]) -> Section:
    counts = Counter((node.domain or _STANDARD, node.op_type) for node in nodes)
    rows = tuple((*key, count) for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return Section(name="operators", title="operators", columns=("domain", "operator", "count"), rows=rows)


def _quantized(nodes: list[ir.Node]) -> Section:
    counts = Counter(kind for node in nodes if (kind := _kind(node)) is not None)
    rows = tuple((*kind, count) for kind, count in sorted(counts.items(), key=lambda item: -item[1]))
    columns = ("operator", "weight bits", "weight scales", "activations", "count")
    return Section(
        name="quantized", title="linears and convolutions, by what they multiply", columns=columns, rows=rows
    )


def _kind(node: ir.Node) -> tuple[str, int, str, str] | None:
    """Operator, bits of its weights, how these are scaled, and its activations; None for what has no weights."""
    if node.domain == DOMAIN and node.op_type in _FUSED:
        codes, scales = node.inputs[1], node.inputs[2]
        return node.op_type, _bits(codes), _scaling(codes, scales), _FUSED[node.op_type]
    if node.op_type not in _WEIGHTED or node.domain or len(node.inputs) < 2:
        return None
    origin = origin_of(node.inputs[1])
    if origin is None:
        value = node.inputs[1]
        dtype = value.dtype if value is not None else None
        return node.op_type, int(8 * dtype.itemsize) if dtype is not None else 0, "none", "float"
    if origin.op_type != "DequantizeLinear" or origin.domain:
        return None
    return node.op_type, _bits(origin.inputs[0]), _scaling(*origin.inputs[:2]), _activations(node.inputs[0])


def _bits(codes: ir.Value | None) -> int:
    return _BITS.get(codes.dtype, 0) if codes is not None and codes.dtype is not None else 0


def _scaling(codes: ir.Value | None, scales: ir.Value | None) -> str:
    """`groups of 64`, `one a channel` or `one`."""
    if codes is None or scales is None or codes.shape is None or scales.shape is None:
        return "unknown"
    if len(scales.shape) < 2:
        return "one a channel" if len(scales.shape) == 1 and scales.shape[0] != 1 else "one"
    for whole, parts in zip(codes.shape, scales.shape, strict=False):
        if isinstance(whole, int) and isinstance(parts, int) and 0 < parts < whole:
            return f"groups of {whole // parts}"
    return "unknown"


def _activations(value: ir.Value | None) -> str:
    origin = origin_of(value)
    while origin is not None and origin.op_type == "Max" and not origin.domain:  # the barrier of the lowering
        origin = origin_of(origin.inputs[0])
    if origin is None:
        return "float"
    if origin.domain == DOMAIN and origin.op_type == PER_TOKEN_QDQ:
        return "INT8, a scale a token"
    if origin.op_type != "DequantizeLinear" or origin.inputs[0] is None:
        return "float"
    scale = origin.inputs[1]
    constant = scale is not None and ir.convenience.get_const_tensor(scale) is not None
    return "INT8, one scale" if constant else "INT8, a computed scale"


def _forbidden(count: int) -> Section:
    rows: tuple[tuple[Cell, ...], ...] = (
        ("operators with the forbidden pattern", count),
        ("TensorRT", "fuses each into one INT8 GEMM, which adds over all groups before it scales: wrong numbers"),
        ("ONNX Runtime", "runs them as they are written"),
        ("for engines", "use model.w4a8.onnx, which this tool lowers safely"),
    )
    return Section(name="forbidden", title="not for TensorRT", columns=("what", "value"), rows=rows if count else ())


def _placement(nodes: list[ir.Node]) -> Section:
    counts = Counter(place for node in nodes for place in _places(node))
    rows = tuple(sorted(counts.items()))
    return Section(name="qdq", title="where Q/DQ is", columns=("where", "count"), rows=rows)


def _places(node: ir.Node) -> Iterator[str]:
    if node.domain or not node.inputs or node.inputs[0] is None:
        return
    if node.op_type == "QuantizeLinear":
        yield "QuantizeLinear of activations"
    elif node.op_type == "DequantizeLinear":
        constant = node.inputs[0].producer() is None
        yield "DequantizeLinear of weights" if constant else "DequantizeLinear of activations"
