"""Greedy generation with the portable W4A8 graph in stock ONNX Runtime: `python generate.py RUN_DIRECTORY PROMPT`.

All forms of the KV cache: one that grows with every call, or one of fixed length that is written at `write_indices`; of
floats, or of INT8 codes with their scales.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

NEW_TOKENS = 24
CACHE_TYPES = {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int8)": np.int8}


def main(directory: Path, prompt: str) -> None:
    """Print the prompt and what the model makes of it."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    options = onnxruntime.SessionOptions()
    # The default quantizes the activations of INT4 MatMuls once more; 1 runs them as the policy says.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3  # it warns that a static cache is copied at every call
    session = onnxruntime.InferenceSession(str(directory / "model.w4a8.onnx"), options)
    past_inputs = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    ids = tokenizer.encode(prompt).ids
    static = any(value.name == "write_indices" for value in session.get_inputs())
    slots = len(ids) + NEW_TOKENS if static else 0
    past = [np.zeros((1, value.shape[1], slots, value.shape[3]), CACHE_TYPES[value.type]) for value in past_inputs]
    step = ids
    for _ in range(NEW_TOKENS):
        filled = len(ids) - len(step)
        feed = {
            "input_ids": np.array([step], np.int64),
            "attention_mask": np.ones((1, slots or len(ids)), np.int64),
            "position_ids": np.arange(filled, len(ids), dtype=np.int64)[None],
            **({"write_indices": np.array([filled], np.int64)} if static else {}),
            **{value.name: tensor for value, tensor in zip(past_inputs, past, strict=True)},
        }
        logits, *past = session.run(None, feed)
        step = [int(logits[0, -1].argmax())]
        ids = ids + step
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
