"""Verify: the float model against its quantized graph -> `verify.json`.

Nothing is imported here, so that `report` (schema and gates) loads without ONNX Runtime.
"""
