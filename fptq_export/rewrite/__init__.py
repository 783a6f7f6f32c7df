"""Rewrite: `model.onnx` and a policy -> `model.qdq.onnx`, `model.w4a8.onnx`, and the lowered graph of a target."""

from fptq_export.rewrite.graph_form import GraphForm, check_form
from fptq_export.rewrite.passes import Lowered, RewritePaths, lower_for_plugin, lower_for_tensorrt, rewrite

__all__ = ["GraphForm", "Lowered", "RewritePaths", "check_form", "lower_for_plugin", "lower_for_tensorrt", "rewrite"]
