"""`fptq-export inspect`: an engine, an ONNX graph, a policy or a run directory in words and tables."""
