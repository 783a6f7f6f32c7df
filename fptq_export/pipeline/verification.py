"""Accuracy of a run: the torch FP32 model against the W4A8 graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import torch

from calib.batches import held_out_windows
from calib.load import Checkpoint, model_from_checkpoint, tokenizer_from_checkpoint
from calib.session import TorchCausalSession
from fptq_export.options import RunOptions
from fptq_export.progress import Progress
from fptq_export.verify.compare import PROMPT_TOKENS, compare_sessions
from fptq_export.verify.decode import CacheBound
from fptq_export.verify.encoder_report import EncoderReport, gate_cosine, report_from_file
from fptq_export.verify.polygraphy_diff import diff_sessions
from fptq_export.verify.report import VerifyReport, gate, gate_cache
from fptq_export.verify.sessions import OnnxCausalSession

__all__ = ["check_gates", "verify"]


def verify(checkpoint: Checkpoint, w4a8: Path, options: RunOptions, progress: Progress) -> VerifyReport:
    """Compare the quantized graph with the FP32 model on held-out text."""
    windows = held_out_windows(tokenizer_from_checkpoint(checkpoint), options.eval_windows, options.eval_seq)
    reference = TorchCausalSession(model_from_checkpoint(checkpoint, torch.float32), "torch fp32")
    candidate = OnnxCausalSession(w4a8, threads=None, name=w4a8.name)
    report = compare_sessions(
        reference,
        candidate,
        windows,
        options.decode_steps,
        progress,
        cache_bound=CacheBound(rounding="int8", layers=candidate.layers),
    )
    return report.model_copy(update={"polygraphy": diff_sessions(reference, candidate, windows[0, :PROMPT_TOKENS])})


def check_gates(verify_path: Path, options: RunOptions) -> None:
    """Raises GateError when the graph's cache is wrong, its perplexity too high or its embeddings too far off."""
    report = report_from_file(verify_path)
    if isinstance(report, EncoderReport):
        gate_cosine(report, options.min_cosine)
        return
    gate_cache(report)
    gate(report, options.max_ppl_increase)
