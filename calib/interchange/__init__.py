"""Checkpoints of other tools: read compressed-tensors, GPTQ and AWQ, write compressed-tensors."""

from calib.interchange.convert import directory_from_quantized, quantization_from_directory

__all__ = ["directory_from_quantized", "quantization_from_directory"]
