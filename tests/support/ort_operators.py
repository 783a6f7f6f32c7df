"""One operator of domain `fptq.cpu` in a session of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from fptq_export.cpu.build import operators_path
from fptq_export.packing import packed_from_int4
from fptq_export.rewrite.lower_to_cpu import CPU_DOMAIN
from tests.support.w4a8_cases import Case

__all__ = ["Initializers", "initializers", "session_of"]

Initializers = dict[str, TensorProto]


def initializers(case: Case, name: str) -> Initializers:
    """Codes and scales of a weight in ONNX order."""
    codes = case.w_codes.T
    packed = packed_from_int4(codes.reshape(-1)).tobytes()
    tensor = TensorProto(name=f"{name}_codes", data_type=TensorProto.INT4, dims=codes.shape, raw_data=packed)
    scales = numpy_helper.from_array(np.ascontiguousarray(case.w_scale.T), f"{name}_scales")
    return {tensor.name: tensor, scales.name: scales}


def session_of(
    node: onnx.NodeProto,
    constants: Mapping[str, TensorProto],
    shape: list[Any] | None,
    threads: int = 1,
    **types: int,
) -> onnxruntime.InferenceSession:
    """A session of one node, on our operators.

    Args:
        node: Every input is a constant, or given by the caller; outputs are FLOAT.
        constants: By name.
        shape: Of the first input; None leaves its rank open.
        threads: Inside an operator.
        types: Inputs that the caller gives beside the first, which is FLOAT -> their types.
    """
    given = [helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, shape)]
    given += [helper.make_tensor_value_info(name, dtype, None) for name, dtype in types.items()]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    graph = helper.make_graph([node], "test", given, outputs, list(constants.values()))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(CPU_DOMAIN, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(operators_path()))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
