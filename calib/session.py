"""Torch models behind the interfaces that verification compares models through."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["TorchCausalSession", "TorchEncoderSession"]


class TorchCausalSession:
    """Prefill and decode with the KV cache carried; arrays in, arrays out.

    Args:
        model: In eval mode.
        name: For reports.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.name = name
        self._model: Any = model

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Cache]:
        """Run a prompt: int64 [B, S] -> logits float32 [B, S, V], cache of S tokens."""
        return self._run(input_ids, None)

    def decode(self, input_ids: NDArray[np.int64], cache: Cache) -> tuple[NDArray[np.float32], Cache]:
        """Run the next token: int64 [B, 1], cache -> logits float32 [B, 1, V], a new cache; the old one stays valid."""
        return self._run(input_ids, copy.deepcopy(cache))

    def _run(self, input_ids: NDArray[np.int64], cache: Cache | None) -> tuple[NDArray[np.float32], Cache]:
        with torch.inference_mode():
            output = self._model(input_ids=torch.from_numpy(input_ids), past_key_values=cache, use_cache=True)
        logits: NDArray[np.float32] = output.logits.to(torch.float32).numpy()
        return logits, output.past_key_values


class TorchEncoderSession:
    """Tokens to hidden states; arrays in, arrays out.

    Args:
        model: The body, in eval mode.
        name: For reports.
    """

    def __init__(self, model: PreTrainedModel, name: str) -> None:
        self.name = name
        self._model: Any = model

    def hidden(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run texts: int64 [B, S] and a mask of 1 and 0 -> hidden states float32 [B, S, H]."""
        with torch.inference_mode():
            output = self._model(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(attention_mask))
        hidden: NDArray[np.float32] = output.last_hidden_state.to(torch.float32).numpy()
        return hidden
