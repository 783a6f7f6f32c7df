"""Debug: which layer of a run's graph broke, one decoder block at a time -> `debug.json`.

The graph that is measured is `model.w4a8.onnx`, with its codes, scales and folded norms; the model that it is measured
against is the float one that it was made from.
"""
