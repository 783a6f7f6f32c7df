"""Accuracy of a run: the torch FP32 model against the W4A8 graph in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from calib.batches import held_out_windows
from calib.load import Checkpoint, model_from_checkpoint, tokenizer_from_checkpoint
from calib.session import TorchCausalSession
from fptq_export.options import RunOptions
from fptq_export.progress import Progress
from fptq_export.verify.all_logits import gives_last_only
from fptq_export.verify.compare import PROMPT_TOKENS, compare_sessions
from fptq_export.verify.decode import CacheBound
from fptq_export.verify.embedding_session import OnnxEmbeddingSession
from fptq_export.verify.encoder_report import EncoderReport, gate_cosine, report_from_file
from fptq_export.verify.graph_report import GraphReport, gate_outputs
from fptq_export.verify.last_token import last_token_figures, last_token_rows
from fptq_export.verify.polygraphy_diff import diff_sessions
from fptq_export.verify.report import LastTokenFigures, VerifyReport, gate, gate_cache, gate_last_token
from fptq_export.verify.sessions import OnnxCausalSession

__all__ = ["check_gates", "verify"]

_OpenGraph = Callable[..., OnnxCausalSession]
"""Opens the quantized graph; takes the options of a session."""


def verify(
    checkpoint: Checkpoint, w4a8: Path, options: RunOptions, progress: Progress, *, embeddings: Path | None = None
) -> VerifyReport:
    """Compare the quantized graph with the FP32 model on held-out text.

    A graph that gives the logits of the last token only is compared in the form that gives all of them, and the file
    itself with that form.

    Args:
        checkpoint: The float model.
        w4a8: The quantized graph.
        options: Of the run.
        progress: Where the comparison is reported.
        embeddings: The table of token embeddings, where the graph reads embeddings: what is compared is text.
    """
    open_graph: _OpenGraph = partial(OnnxCausalSession, w4a8, threads=None)
    if embeddings is not None:
        open_graph = partial(OnnxEmbeddingSession, w4a8, embeddings, threads=None)
    windows = held_out_windows(tokenizer_from_checkpoint(checkpoint), options.eval_windows, options.eval_seq)
    last = _last_token_figures(open_graph, windows[0], options) if gives_last_only(w4a8) else None
    reference = TorchCausalSession(model_from_checkpoint(checkpoint, torch.float32), "torch fp32")
    candidate = open_graph(name=w4a8.name, all_logits=True)
    report = compare_sessions(
        reference,
        candidate,
        windows,
        options.decode_steps,
        progress,
        cache_bound=CacheBound(rounding="int8", layers=candidate.layers),
    )
    polygraphy = diff_sessions(reference, candidate, windows[0, :PROMPT_TOKENS])
    return report.model_copy(update={"polygraphy": polygraphy, "last_token": last})


def _last_token_figures(open_graph: _OpenGraph, window: NDArray[np.int64], options: RunOptions) -> LastTokenFigures:
    """The file against its form that gives all logits, one in memory at a time."""
    prompt = max(1, min(PROMPT_TOKENS, len(window) - options.decode_steps))
    text = window[: prompt + options.decode_steps]
    last, every = (last_token_rows(open_graph(all_logits=all_logits), text, prompt) for all_logits in (False, True))
    return last_token_figures(last, every, options.dtype)


def check_gates(verify_path: Path, options: RunOptions) -> None:
    """Raises GateError for a wrong cache or last token, too high a perplexity, or embeddings or outputs too far off."""
    report = report_from_file(verify_path)
    if isinstance(report, EncoderReport):
        gate_cosine(report, options.min_cosine)
        return
    if isinstance(report, GraphReport):
        gate_outputs(report, options.min_cosine)
        return
    gate_last_token(report)
    gate_cache(report)
    gate(report, options.max_ppl_increase)
