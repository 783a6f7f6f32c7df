"""Rewrite: `model.onnx` and a policy -> `model.qdq.onnx`, `model.w4a8.onnx`, and the lowered graph of a target."""

from fptq_export.rewrite.passes import RewritePaths, lower_for_tensorrt, rewrite

__all__ = ["RewritePaths", "lower_for_tensorrt", "rewrite"]
