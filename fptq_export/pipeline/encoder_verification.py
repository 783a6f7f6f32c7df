"""Accuracy of an encoder's run: the torch FP32 model against the W4A8 graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from calib.batches import TextOptions, evaluation_batches
from calib.documents import needs_tokenizer
from calib.load import Checkpoint, model_from_checkpoint, tokenizer_from_checkpoint
from calib.padding import PADDING
from calib.session import TorchEncoderSession
from fptq_export.options import RunOptions
from fptq_export.pipeline.task_options import check_length
from fptq_export.progress import Progress
from fptq_export.sites import Sites
from fptq_export.tasks import is_half
from fptq_export.verify.compare_encoders import compare_encoders
from fptq_export.verify.encoder_report import EncoderReport
from fptq_export.verify.encoder_sessions import OnnxEncoderSession

__all__ = ["verify_encoder"]


def verify_encoder(
    checkpoint: Checkpoint, w4a8: Path, sites: Sites, options: RunOptions, progress: Progress
) -> EncoderReport:
    """Compare the quantized graph with the FP32 model on texts that calibration did not see."""
    check_length("--eval-seq", options.eval_seq, sites)
    wanted = TextOptions(options.eval_text, options.eval_sentences, options.eval_seq, options.seed)
    tokenizer = tokenizer_from_checkpoint(checkpoint) if needs_tokenizer(options.eval_text) else None
    vocab_size = checkpoint.config.get_text_config().vocab_size
    model = model_from_checkpoint(checkpoint, torch.float32)
    encoder = model.get_encoder() if is_half(checkpoint.task) else model
    batches = evaluation_batches(wanted, tokenizer, vocab_size, encoder=True)
    real = batches.tokens != PADDING
    padding = getattr(checkpoint.config, "pad_token_id", None) or 0
    return compare_encoders(
        TorchEncoderSession(encoder, "torch fp32"),
        OnnxEncoderSession(w4a8, threads=None, name=w4a8.name),
        np.where(real, batches.tokens, padding),
        real.astype(np.int64),
        batches.description,
        progress,
    )
