"""Accuracy of a decoder's run: the torch FP32 model against the W4A8 decoder graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from calib.batches import held_out_windows
from calib.halves import source_and_target
from calib.load import Checkpoint, model_from_checkpoint, tokenizer_from_checkpoint
from calib.session import TorchDecoderSession, TorchEncoderSession
from fptq_export.options import RunOptions
from fptq_export.progress import Progress
from fptq_export.verify.compare import compare_windows
from fptq_export.verify.decode import CacheBound
from fptq_export.verify.decoder_sessions import OnnxDecoderSession
from fptq_export.verify.report import VerifyReport
from fptq_export.verify.sessions import CausalSession

__all__ = ["verify_decoder"]


def verify_decoder(checkpoint: Checkpoint, w4a8: Path, options: RunOptions, progress: Progress) -> VerifyReport:
    """Compare the quantized decoder with the FP32 model on held-out text: each window continues its own first half.

    Both read the hidden states of the FP32 encoder, so that what is measured is the decoder; the encoder has a report
    of its own.
    """
    windows = held_out_windows(tokenizer_from_checkpoint(checkpoint), options.eval_windows, options.eval_seq)
    sources, targets = source_and_target(windows, checkpoint.config)
    model = model_from_checkpoint(checkpoint, torch.float32)
    encoder = TorchEncoderSession(model.get_encoder(), "torch fp32 encoder")
    candidate = OnnxDecoderSession(w4a8, threads=None, name=w4a8.name)

    def sessions(index: int) -> tuple[CausalSession, CausalSession]:
        source = sources[index : index + 1]
        hidden = encoder.hidden(source, np.ones_like(source))
        return TorchDecoderSession(model, "torch fp32", hidden), candidate.behind(hidden)

    bound = CacheBound(rounding="int8", layers=candidate.layers)
    return compare_windows(sessions, targets, options.decode_steps, progress, cache_bound=bound)
