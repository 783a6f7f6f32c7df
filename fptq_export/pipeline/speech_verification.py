"""Accuracy of a half of an encoder-decoder of speech: the torch FP32 model against the W4A8 graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from calib.features import FeatureWindows
from calib.load import Checkpoint, model_from_checkpoint
from calib.session import TorchDecoderSession, TorchFeatureSession
from fptq_export.options import RunOptions
from fptq_export.pipeline.speech import evaluation_windows
from fptq_export.progress import Progress
from fptq_export.tasks import gives_hidden_states
from fptq_export.verify.compare import compare_windows
from fptq_export.verify.compare_encoders import compare_feature_encoders
from fptq_export.verify.decode import CacheBound
from fptq_export.verify.decoder_sessions import OnnxSpeechDecoderSession
from fptq_export.verify.encoder_report import EncoderReport
from fptq_export.verify.encoder_sessions import OnnxFeatureSession
from fptq_export.verify.report import VerifyReport
from fptq_export.verify.sessions import CausalSession

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["verify_speech"]


def verify_speech(
    checkpoint: Checkpoint, w4a8: Path, options: RunOptions, progress: Progress
) -> VerifyReport | EncoderReport:
    """Compare a half with the FP32 model: the encoder's hidden states, or the decoder on the texts of the windows.

    Either decoder reads the hidden states of the FP32 encoder, so that what is measured is the decoder.
    """
    windows = evaluation_windows(checkpoint, options)
    model = model_from_checkpoint(checkpoint, torch.float32)
    encoder = TorchFeatureSession(model.get_encoder(), "torch fp32")
    if gives_hidden_states(checkpoint.task):
        candidate = OnnxFeatureSession(w4a8, threads=None, name=w4a8.name)
        return compare_feature_encoders(encoder, candidate, windows.features, windows.description, progress)
    return _compare_decoders(model, encoder, OnnxSpeechDecoderSession(w4a8, threads=None), windows, options, progress)


def _compare_decoders(
    model: PreTrainedModel,
    encoder: TorchFeatureSession,
    candidate: OnnxSpeechDecoderSession,
    windows: FeatureWindows,
    options: RunOptions,
    progress: Progress,
) -> VerifyReport:
    def sessions(index: int) -> tuple[CausalSession, CausalSession]:
        hidden = encoder.hidden(windows.features[index : index + 1])
        return TorchDecoderSession(model, "torch fp32", hidden), candidate.behind(hidden)

    bound = CacheBound(rounding="int8", layers=candidate.layers)
    return compare_windows(sessions, windows.ids, options.decode_steps, progress, cache_bound=bound)
