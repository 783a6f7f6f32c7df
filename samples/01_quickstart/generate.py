"""Greedy generation with the portable W4A8 graph in stock ONNX Runtime: `python generate.py RUN_DIRECTORY PROMPT`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

NEW_TOKENS = 24


def main(directory: Path, prompt: str) -> None:
    """Print the prompt and what the model makes of it."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    options = onnxruntime.SessionOptions()
    # The default quantizes the activations of INT4 MatMuls once more; 1 runs them as the policy says.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(str(directory / "model.w4a8.onnx"), options)
    past_inputs = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    past = [np.zeros((1, value.shape[1], 0, value.shape[3]), np.float16) for value in past_inputs]
    ids = tokenizer.encode(prompt).ids
    step = ids
    for _ in range(NEW_TOKENS):
        feed = {
            "input_ids": np.array([step], np.int64),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids) - len(step), len(ids), dtype=np.int64)[None],
            **{value.name: tensor for value, tensor in zip(past_inputs, past, strict=True)},
        }
        logits, *past = session.run(None, feed)
        step = [int(logits[0, -1].argmax())]
        ids = ids + step
    print(tokenizer.decode(ids))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
