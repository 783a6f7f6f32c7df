"""Monitor: what production collected of the output `range_monitor`, against the policy -> `monitor.json`.

Services may import it: it loads neither torch nor ONNX nor a runtime.
"""
