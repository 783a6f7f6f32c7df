"""Rewrite: `model.onnx` and a policy -> `model.qdq.onnx`, `model.w4a8.onnx`, and the lowered graph of a target."""

from fptq_export.rewrite.passes import GraphForm, Lowered, RewritePaths, lower_for_plugin, lower_for_tensorrt, rewrite

__all__ = ["GraphForm", "Lowered", "RewritePaths", "lower_for_plugin", "lower_for_tensorrt", "rewrite"]
