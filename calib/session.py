"""Torch models behind the interfaces that verification compares models through."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_outputs import BaseModelOutput

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

__all__ = ["TorchCausalSession", "TorchDecoderSession", "TorchEncoderSession", "TorchFeatureSession"]


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
            output = self._model(**self._inputs(torch.from_numpy(input_ids)), past_key_values=cache, use_cache=True)
        logits: NDArray[np.float32] = output.logits.to(torch.float32).numpy()
        return logits, output.past_key_values

    def _inputs(self, input_ids: torch.Tensor) -> dict[str, Any]:
        """What the model is called with beside the cache."""
        return {"input_ids": input_ids}


class TorchDecoderSession(TorchCausalSession):
    """The decoder of an encoder-decoder behind hidden states that are given.

    Args:
        model: The whole model, in eval mode; its encoder is not run.
        name: For reports.
        hidden: What the encoder gives, float32 [B, source, H], without padding.
    """

    def __init__(self, model: PreTrainedModel, name: str, hidden: NDArray[np.float32]) -> None:
        super().__init__(model, name)
        self._encoded = BaseModelOutput(last_hidden_state=torch.from_numpy(hidden).to(model.dtype))

    def _inputs(self, input_ids: torch.Tensor) -> dict[str, Any]:
        return {"encoder_outputs": self._encoded, "decoder_input_ids": input_ids}


class TorchEncoderSession:
    """Tokens to hidden states; arrays in, arrays out.

    Args:
        model: The body, or the encoder of an encoder-decoder, in eval mode.
        name: For reports.
    """

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self.name = name
        self._model: Any = model

    def hidden(self, input_ids: NDArray[np.int64], attention_mask: NDArray[np.int64]) -> NDArray[np.float32]:
        """Run texts: int64 [B, S] and a mask of 1 and 0 -> hidden states float32 [B, S, H]."""
        with torch.inference_mode():
            output = self._model(input_ids=torch.from_numpy(input_ids), attention_mask=torch.from_numpy(attention_mask))
        hidden: NDArray[np.float32] = output.last_hidden_state.to(torch.float32).numpy()
        return hidden


class TorchFeatureSession:
    """Mel features to hidden states; arrays in, arrays out.

    Args:
        model: The encoder of an encoder-decoder of speech, in eval mode.
        name: For reports.
    """

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        self.name = name
        self._model: Any = model

    def hidden(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Run windows: float32 [B, mel bins, frames] -> hidden states float32 [B, S, H]."""
        with torch.inference_mode():
            output = self._model(torch.from_numpy(features))
        hidden: NDArray[np.float32] = output.last_hidden_state.to(torch.float32).numpy()
        return hidden
