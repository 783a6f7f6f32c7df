"""Diff: how far each form of a quantized model lies from the float model, on real text -> `diff.json`.

Prefill of windows, decode steps with the KV cache carried, and the first token at which free-running texts part.
Nothing is imported here: the command line reads the options without loading torch.
"""
