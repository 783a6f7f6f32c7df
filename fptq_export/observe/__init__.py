"""Observe: a graph of the user and its input data -> what calibration keeps, by ONNX Runtime with extra outputs."""
