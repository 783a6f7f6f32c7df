"""A half of a model as a model of token windows, for calibration; and how a window is split for a decoder.

The encoder reads rows of tokens as any encoder does. The decoder is taught on text: the first half of a window is what
the encoder reads, and the second half is what the decoder continues it with (teacher forcing). An encoder of speech
reads features, and the decoder behind it the whole window, which is the text in them.
The language half of a vision-language model reads the embeddings of a window's tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_outputs import BaseModelOutput

from calib.load import Checkpoint, model_from_checkpoint, skeleton_from_checkpoint
from fptq_export.halves import cut_to_decoder, cut_to_encoder, encoder_path, paths_of_half
from fptq_export.language_half import cut_to_language_half, is_outside, modules_outside
from fptq_export.tasks import SEQ2SEQ_DECODER, SEQ2SEQ_ENCODER, VLM_DECODER, Half, is_half, reads_features

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["calibrated_model_from_checkpoint", "paths_of_task", "source_and_target"]


def source_and_target(
    windows: NDArray[np.int64], config: PreTrainedConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What the encoder and what the decoder reads of text windows.

    The last token of the source becomes the one that ends a text, and the first of the target the one that the decoder
    starts with, where the config names them.

    Args:
        windows: int64 [n, seq], seq >= 2, without padding.
        config: Of the model.

    Returns:
        int64 [n, seq - seq // 2] and [n, seq // 2].
    """
    length = windows.shape[1] - windows.shape[1] // 2
    source, target = windows[:, :length].copy(), windows[:, length:].copy()
    ends: int | list[int] | None = config.eos_token_id
    end = ends[0] if isinstance(ends, list) else ends
    start: int | None = getattr(config, "decoder_start_token_id", None)
    if end is not None:
        source[:, -1] = end
    if start is not None:
        target[:, 0] = start
    return source, target


def paths_of_task(checkpoint: Checkpoint, paths: Iterable[str]) -> list[str]:
    """Those of the torch paths of a checkpoint's model that lie in the graph of its task: all, or those of a half."""
    if checkpoint.task == VLM_DECODER:
        outside = modules_outside(skeleton_from_checkpoint(checkpoint))
        return [path for path in paths if not is_outside(path, outside)]
    if not is_half(checkpoint.task):
        return list(paths)
    return paths_of_half(paths, encoder_path(skeleton_from_checkpoint(checkpoint)), checkpoint.task)


def calibrated_model_from_checkpoint(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """What calibration runs on windows of tokens: the model, or a half of it, under the torch paths of the whole.

    Args:
        checkpoint: Says which half.
        dtype: Floating-point type of the parameters. The encoder before a decoder runs in float32.
    """
    model = model_from_checkpoint(checkpoint, dtype)
    if checkpoint.task == VLM_DECODER:
        cut_to_language_half(model)
    if is_half(checkpoint.task):
        half: Any = model
        of_task = _SPEECH_FORWARDS if reads_features(checkpoint.config) else _TEXT_FORWARDS
        half.forward = of_task[checkpoint.task](model)
        half.base_model_prefix = ""  # no part of it runs alone
    return model


def _encoder_forward(model: PreTrainedModel) -> Any:
    encoder = cut_to_encoder(model)

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, *, use_cache: bool = False) -> Any:
        del use_cache  # an encoder has none
        return encoder(input_ids=input_ids, attention_mask=attention_mask)

    return forward


def _decoder_forward(model: PreTrainedModel) -> Any:
    encoder, decode = cut_to_decoder(model), model.forward

    def forward(input_ids: torch.Tensor, *, use_cache: bool = False) -> Any:
        source, target = (torch.from_numpy(ids) for ids in source_and_target(input_ids.numpy(), model.config))
        hidden = encoder.to(torch.float32)(input_ids=source).last_hidden_state
        return decode(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden), decoder_input_ids=target, use_cache=use_cache
        )

    return forward


def _speech_encoder_forward(model: PreTrainedModel) -> Any:
    encoder = cut_to_encoder(model)

    def forward(input_ids: torch.Tensor, input_features: torch.Tensor, *, use_cache: bool = False) -> Any:
        del input_ids, use_cache  # the places of its positions, and it has no cache
        return encoder(input_features)

    return forward


def _speech_decoder_forward(model: PreTrainedModel) -> Any:
    encoder, decode = cut_to_decoder(model), model.forward

    def forward(input_ids: torch.Tensor, input_features: torch.Tensor, *, use_cache: bool = False) -> Any:
        hidden = encoder.to(torch.float32)(input_features).last_hidden_state
        return decode(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden), decoder_input_ids=input_ids, use_cache=use_cache
        )

    return forward


_TEXT_FORWARDS: Mapping[Half, Callable[[PreTrainedModel], Any]] = {
    SEQ2SEQ_ENCODER: _encoder_forward,
    SEQ2SEQ_DECODER: _decoder_forward,
}
_SPEECH_FORWARDS: Mapping[Half, Callable[[PreTrainedModel], Any]] = {
    SEQ2SEQ_ENCODER: _speech_encoder_forward,
    SEQ2SEQ_DECODER: _speech_decoder_forward,
}
