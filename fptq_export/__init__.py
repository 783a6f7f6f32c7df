"""Export Hugging Face LLMs to TensorRT engines quantized with FPTQ (W4A8).

Importing this package needs no torch, no TensorRT and no GPU.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
