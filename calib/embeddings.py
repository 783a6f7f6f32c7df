"""The embedding of every token as a table, for a graph that reads embeddings."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import torch

from calib.load import Checkpoint, model_from_checkpoint, stored_dtype
from fptq_export.language_half import EMBEDDINGS
from fptq_export.tensor_writer import TensorSpec, tensor_writer

__all__ = ["write_embeddings"]

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def write_embeddings(checkpoint: Checkpoint, dtype: str, path: Path) -> None:
    """Write what the model's embedding gives for each token: row i of `embeddings` [vocab, hidden] is token i.

    A factor that the embedding module applies is in the table; one that the decoder applies is in the graph.

    Args:
        checkpoint: A model with an embedding of its tokens.
        dtype: `fp16`, `bf16` or `fp32`: the type of the table, and that in which the embedding is computed.
        path: Where the file goes, a safetensors file.
    """
    embedding = model_from_checkpoint(checkpoint, stored_dtype(checkpoint)).get_input_embeddings().to(_DTYPES[dtype])
    with torch.inference_mode():
        table = embedding(torch.arange(embedding.get_parameter("weight").shape[0]))
    values = table.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if dtype == "bf16" else table.numpy()
    with tensor_writer(path, {EMBEDDINGS: TensorSpec(np.dtype(values.dtype), values.shape)}) as writer:
        writer.write(EMBEDDINGS, values)
