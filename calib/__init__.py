"""The PyTorch half: opens a model, calibrates it and decides its policy (FPTQ, arXiv 2308.15987).

It meets the ONNX half only in `sites.json`, `policy.json` and `policy.safetensors`, whose schemas are
leaves of `fptq_export`.
"""
