"""TensorRT's own INT4 weight-only linear, as a baseline: y = x @ dequantize(INT4 weight), x FP16."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fptq_export.packing import packed_from_int4

__all__ = ["int4_linear", "plan_from_model"]


def int4_linear(codes: NDArray[np.int8], scales: NDArray[np.float16], group_size: int) -> onnx.ModelProto:
    """DequantizeLinear and MatMul; codes INT4 [in, out], scales [in/group_size, out], x [M, in] with M dynamic."""
    rows, columns = codes.shape
    packed = packed_from_int4(codes.reshape(-1)).tobytes()
    constants = [
        helper.make_tensor("codes", TensorProto.INT4, [rows, columns], packed, raw=True),
        numpy_helper.from_array(scales, "scales"),
    ]
    nodes = [
        helper.make_node(
            "DequantizeLinear", ["codes", "scales"], ["weight"], "dequantize", axis=0, block_size=group_size
        ),
        helper.make_node("MatMul", ["x", "weight"], ["y"], "linear"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["M", size])
        for name, size in (("x", rows), ("y", columns))
    ]
    graph = helper.make_graph(nodes, "int4", ends[:1], ends[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def plan_from_model(trt: Any, model: onnx.ModelProto, m: int, compute_capability: str | None = None) -> bytes:
    """Build an engine for exactly M rows.

    Args:
        trt: `tensorrt` or `tensorrt_rtx`.
        model: One of `int4_linear`.
        m: Rows of x.
        compute_capability: As `SM80`: build for a GPU that is not there; TensorRT for RTX only.
    """
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        raise RuntimeError(parser.get_error(0).desc())
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    shape = (m, model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)
    profile.set_shape("x", shape, shape, shape)
    config.add_optimization_profile(profile)
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[compute_capability], 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT builds no engine of its INT4 linear")
    return bytes(plan)
