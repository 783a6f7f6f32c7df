"""Language models behind embeddings that run on tokens: each token's embedding comes from a table."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fptq_export.errors import UserError
from fptq_export.language_half import EMBEDDINGS
from fptq_export.verify.sessions import FLOAT_TYPES, INTEGER_TYPES, OnnxCausalSession

__all__ = ["OnnxEmbeddingSession"]

_EMBEDS = "inputs_embeds"
_MATRIX_RANK = 2


class OnnxEmbeddingSession(OnnxCausalSession):
    """ONNX Runtime (CPU) on a language model whose graph reads `inputs_embeds` [B, S, H] in place of `input_ids`.

    Args:
        path: The ONNX file.
        embeddings: A safetensors file with a tensor `embeddings` [vocab, H]: row i is the embedding of token i.
        options: Those of `OnnxCausalSession`.

    Raises:
        UserError: As `OnnxCausalSession`, or the table is missing or is not of the graph's width.
    """

    inputs: ClassVar = {_EMBEDS: FLOAT_TYPES, "attention_mask": INTEGER_TYPES, "position_ids": INTEGER_TYPES}

    def __init__(self, path: Path, embeddings: Path, **options: Any) -> None:
        super().__init__(path, **options)
        if not embeddings.is_file():
            raise UserError(str(embeddings), "no such file", "trace the model again")
        table = load_file(embeddings).get(EMBEDDINGS)
        width = next(value.shape[-1] for value in self._session.get_inputs() if value.name == _EMBEDS)
        if table is None or table.ndim != _MATRIX_RANK or table.shape[1] != width:
            found = "no embeddings" if table is None else f"embeddings {list(table.shape)}"
            cause = f"holds {found}, and {path.name} reads {width} numbers a token"
            raise UserError(str(embeddings), cause, "trace the model again")
        self._table = table

    def _ids_feed(self, input_ids: NDArray[np.int64], past_length: int, slots: int) -> dict[str, NDArray[Any]]:
        bound = copy.copy(self)  # as a decoder behind its hidden states: what is given stands among the inputs
        bound._given = {_EMBEDS: self._table[input_ids]}
        return super(OnnxEmbeddingSession, bound)._ids_feed(input_ids, past_length, slots)
