"""Decoders of encoder-decoders that run: causal language models behind what an encoder gave."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fptq_export.verify.sessions import FLOAT_TYPES, INTEGER_TYPES, OnnxCausalSession

__all__ = ["OnnxDecoderSession", "OnnxSpeechDecoderSession"]

_HIDDEN, _MASK = "encoder_hidden_states", "encoder_attention_mask"


class OnnxDecoderSession(OnnxCausalSession):
    """ONNX Runtime (CPU) on the decoder of an encoder-decoder.

    Inputs of the graph: `input_ids` [B, S], `encoder_hidden_states` [B, source, H], `encoder_attention_mask`
    [B, source] and, for each layer N, `past_key_values.N.key` and `.value` [B, H, past, D]. Outputs as those of a
    language model. It runs after `behind` only.
    """

    inputs: ClassVar = {"input_ids": INTEGER_TYPES, _HIDDEN: FLOAT_TYPES, _MASK: INTEGER_TYPES}

    def behind(
        self, hidden: NDArray[np.float32], attention_mask: NDArray[np.int64] | None = None
    ) -> OnnxDecoderSession:
        """The same session for a batch of sources.

        Args:
            hidden: What the encoder gives, float32 [B, source, H].
            attention_mask: int64 [B, source]: 1 for tokens, 0 for padding; None where all are tokens.
        """
        bound = copy.copy(self)
        mask: NDArray[Any] = np.ones(hidden.shape[:2], np.int64) if attention_mask is None else attention_mask
        bound._given = {_HIDDEN: hidden, _MASK: mask}
        return bound


class OnnxSpeechDecoderSession(OnnxDecoderSession):
    """The same behind an encoder of speech: windows have one length, so the graph has no `encoder_attention_mask`."""

    inputs: ClassVar = {"input_ids": INTEGER_TYPES, _HIDDEN: FLOAT_TYPES}
