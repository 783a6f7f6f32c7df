"""Trace of a graph that the user gave: `model.onnx` in the form of traced models, and `sites.json`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from fptq_export.errors import UserError
from fptq_export.files import PARTIAL_SUFFIX
from fptq_export.graph_io import data_path, save_graph, write_weights
from fptq_export.progress import Progress
from fptq_export.sites import Sites, write_sites
from fptq_export.trace.check_onnx import opened_onnx
from fptq_export.trace.find_onnx_layers import OnnxLayers, find_onnx_layers
from fptq_export.trace.find_sites import sites_from_linears
from fptq_export.trace.prepare_onnx import prepare_onnx

__all__ = ["sites_from_onnx", "trace_onnx"]

_INLINE_BYTES = 1 << 24
"""Weights inside the file up to this size stay in memory."""


def trace_onnx(source: Path, model_path: Path, sites_path: Path, progress: Progress) -> Sites:
    """Prepare the graph of a user and write it with the map of its layers.

    Args:
        source: The user's file, looked at by `check_onnx`; it is only read.
        model_path: Where `model.onnx` goes; its weights go to `model.onnx.data` beside it, one in memory at a time.
        sites_path: Where `sites.json` goes.
        progress: Where to report.

    Returns:
        What was written to `sites_path`.

    Raises:
        UserError: The graph cannot be upgraded, or has no layer with a constant weight.
    """
    model_path.parent.mkdir(parents=True, exist_ok=True)
    # A name that is cleaned up after a kill.
    with tempfile.TemporaryDirectory(dir=model_path.parent, prefix=".inline", suffix=PARTIAL_SUFFIX) as scratch:
        with progress.task("Preparing the graph", total=None):
            model = prepare_onnx(_on_disk(opened_onnx(source), Path(scratch)), str(source))
            sites = sites_from_onnx(model, str(source))
        with progress.task("Writing the weights", total=None, unit="tensors") as writing:
            write_weights(model, data_path(model_path), lambda done, total: writing.update(done, total))
    save_graph(model, model_path)
    write_sites(sites, sites_path)
    return sites


def _on_disk(model: ir.Model, scratch: Path) -> ir.Model:
    """The same graph; weights that came inside the file are put on disk, so that each pass need not copy them."""
    tensors = [value.const_value for value in model.graph.initializers.values()]
    inline = (tensor.nbytes for tensor in tensors if tensor is not None and not isinstance(tensor, ir.ExternalTensor))
    if sum(inline) > _INLINE_BYTES:
        write_weights(model, data_path(scratch / "inline.onnx"))
    return model


def sites_from_onnx(model: ir.Model, name: str) -> Sites:
    """Find the layers of a prepared graph; their nodes are renamed after their paths, in place.

    Raises:
        UserError: There is none.
    """
    layers = find_onnx_layers(model)
    if not layers.linears and not layers.convolutions:
        reasons = "; ".join(dict.fromkeys(linear.reason for linear in layers.unmatched))
        cause = f"has no MatMul, Gemm or Conv that could be quantized ({reasons or 'none with a constant weight'})"
        raise UserError(name, cause, "give a model with weights, in float")
    sites = sites_from_linears(model, layers.linears, {})
    convolutions = tuple(
        found.model_copy(update={"node": f"{found.path}/{found.op_type}"}) for _, found in layers.convolutions
    )
    _name_nodes(model, layers)
    return sites.model_copy(update={"unmatched": tuple(layers.unmatched), "convolutions": convolutions})


def _name_nodes(model: ir.Model, layers: OnnxLayers) -> None:
    """Name convolutions `<path>/<operator>`, as linears are; another node that had such a name gets a new one."""
    owned = {id(node) for linear in layers.linears.values() for node in (linear.matmul, linear.bias_add) if node}
    owned |= {id(linear.transpose) for linear in layers.linears.values() if linear.transpose is not None}
    for node, found in layers.convolutions:
        node.name = f"{found.path}/{found.op_type}"
        owned.add(id(node))
    nodes = list(model.graph.all_nodes())
    taken = {node.name for node in nodes if id(node) in owned}
    for node in nodes:
        if id(node) in owned:
            continue
        name, count = node.name, 0
        while node.name in taken:
            count += 1
            node.name = f"{name}_{count}"
        taken.add(node.name)
