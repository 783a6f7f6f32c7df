"""Evaluate: perplexity and lm-evaluation-harness tasks of up to three systems, side by side -> `eval.json`.

The systems are the model in torch, the same model with the fake quantization of a policy, and the W4A8 graph in ONNX
Runtime. Nothing is imported here: the command line reads the options without loading torch.
"""
