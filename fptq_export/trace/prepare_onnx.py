"""Bring a user's graph into the form that trace writes: one opset, constants folded, shapes known, names unique."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnx_graphsurgeon.logger import G_LOGGER

from fptq_export.errors import UserError
from fptq_export.trace.clean_up import strip_trace_metadata
from fptq_export.trace.clone_shared_vectors import clone_shared_vectors
from fptq_export.trace.expand_gemm import expand_gemm
from fptq_export.trace.layer_names import name_after_modules
from fptq_export.trace.weights import transpose_linear_weights

__all__ = ["prepare_onnx"]

_OPSET = 21
"""First opset with INT4 and `block_size` in DequantizeLinear; newer graphs keep theirs."""
_IR_VERSION = 10
"""First IR version with INT4."""
_WEIGHT_BYTES = 1 << 16
"""Constants above this size are weights: they are not handed to the libraries that fold and convert."""
_FOLDED_BYTES = 1 << 20
"""No folded constant is larger: an Expand or a Tile stays a node."""
_RANDOM = frozenset({"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"}) | {
    "RandomUniformLike"
}


def prepare_onnx(model: ir.Model, name: str) -> ir.Model:
    """Upgrade, fold and tidy a graph.

    Rules:
        1. An opset below 21 is upgraded by ONNX's version converter.
        2. What depends on constants only is computed by onnx-graphsurgeon, except random numbers and the transposition
           of a weight. Large weights are taken out before and put back after, so they stay on disk.
        3. Functions of the model are inlined, Identity nodes bypassed, Gemm written as MatMul and Add.
        4. Every node gets a unique name, after its torch module where the exporter noted that; what nothing reads is
           dropped.
        5. Norms and biases that share a constant vector get one each.
        6. Inputs and outputs stay.

    Args:
        model: As opened; not to be used afterwards.
        name: For errors.

    Raises:
        UserError: The opset cannot be upgraded, or shapes contradict each other.
    """
    name_after_modules(model)
    strip_trace_metadata(model)
    common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    _bypass_identities(model)
    proto, weights = _without_weights(model)
    proto = _folded(_inferred(_upgraded(proto, name), name))
    model = _with_weights(_inferred(proto, name), weights)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    expand_gemm(model)
    transpose_linear_weights(model)
    clone_shared_vectors(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
    return model


def _bypass_identities(model: ir.Model) -> None:
    """Let readers of an Identity read its input: exporters write a tied weight so. Subgraphs are left alone."""
    for node in list(model.graph):
        source, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if node.op_type == "Identity" and not node.domain and source is not None and not output.is_graph_output():
            ir.convenience.replace_all_uses_with(output, source)
            model.graph.remove(node, safe=True)


def _without_weights(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    """The graph with an input in the place of every large initializer, and the initializers."""
    weights: dict[str, ir.TensorProtocol] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > _WEIGHT_BYTES and not value.is_graph_output():
            weights[name] = tensor
            del model.graph.initializers[name]
            value.const_value = None
            model.graph.inputs.append(value)
        elif isinstance(tensor, ir.ExternalTensor):
            # The libraries do not know the directory of the data file.
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
    return ir.to_proto(model), weights


def _with_weights(proto: onnx.ModelProto, weights: dict[str, ir.TensorProtocol]) -> ir.Model:
    model = ir.from_proto(proto)
    for value in list(model.graph.inputs):
        if value.name in weights:
            model.graph.inputs.remove(value)
            value.const_value = weights[value.name]
            model.graph.register_initializer(value)
    return model


def _upgraded(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    version = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if version >= _OPSET:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, _OPSET)
    except Exception as error:
        # The converter raises RuntimeError and ConvertError, which is not exported.
        cause = f"opset {version} cannot be upgraded to {_OPSET}: {str(error).strip().splitlines()[0]}"
        raise UserError(name, cause, "export the model with opset 17 or newer") from error


def _inferred(proto: onnx.ModelProto, name: str) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        cause = f"its shapes contradict each other: {str(error).strip().splitlines()[0]}"
        raise UserError(name, cause, "export the model again; onnx.shape_inference says the same") from error


def _folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Constants folded.

    Shapes are not: graphsurgeon then changes float constants to integers in place, also those that others read.
    """
    with G_LOGGER.suppress(G_LOGGER.ERROR):
        graph = gs.import_onnx(proto)
        graph.toposort()
        graph.fold_constants(fold_shapes=False, size_threshold=_FOLDED_BYTES, should_exclude_node=_is_kept)
        graph.cleanup()
        folded: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    return folded


def _is_kept(node: gs.Node) -> bool:
    """Whether a node stays though all it reads is constant."""
    return node.op in _RANDOM or (node.op == "Transpose" and len(node.inputs[0].shape or ()) == 2)
