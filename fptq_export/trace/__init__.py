"""Trace: a Hugging Face model, decoder, encoder or a half of a larger one -> `model.onnx` and `sites.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fptq_export.graph_io import data_path, save_graph, write_weights
from fptq_export.progress import Progress
from fptq_export.sites import Sites, write_sites
from fptq_export.stored_tensor import StoredTensor
from fptq_export.tasks import CAUSAL_LM, SEQ2SEQ_DECODER, VLM_DECODER, Task, gives_hidden_states
from fptq_export.trace.clean_up import clean_up, strip_trace_metadata
from fptq_export.trace.expand_gemm import expand_gemm
from fptq_export.trace.find_sites import sites_from_graph
from fptq_export.trace.share_tied_weights import share_tied_weights
from fptq_export.trace.weights import attach_weights, transpose_linear_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fptq_export.trace.from_hf import TracedModel

__all__ = ["trace"]


def trace(
    config: PretrainedConfig,
    weights: Mapping[str, StoredTensor],
    dtype: str,
    model_path: Path,
    sites_path: Path,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
    task: Task = CAUSAL_LM,
) -> Sites:
    """Write the ONNX graph of a model and the map of its linears.

    Args:
        config: Config of the model.
        weights: Tensor name -> where it is stored; experts have a tensor for each projection, however they are stored.
        dtype: `fp16`, `bf16` or `fp32`.
        model_path: Where `model.onnx` goes; its weights go to `model.onnx.data` beside it.
        sites_path: Where `sites.json` goes.
        progress: Where to report.
        trust_remote_code: Whether code from the model repository may run.
        task: A causal language model with its cache, an encoder, or a half of an encoder-decoder or of a
            vision-language model.

    Returns:
        What was written to `sites_path`.

    Raises:
        UserError: The architecture cannot be traced, has no linear, or needs a tensor the checkpoint lacks.
    """
    with progress.task("Tracing the model", total=None):
        traced = _traced(config, dtype, task, trust_remote_code)
    graph = traced.graph
    with progress.task("Cleaning the graph", total=None):
        share_tied_weights(graph, weights, traced.tied)
        attach_weights(graph, weights, traced.buffers, traced.tied)
        expand_gemm(graph)
        transpose_linear_weights(graph)
        clean_up(graph)
        sites = sites_from_graph(graph, traced.linears, traced.roles)
        sites = sites.model_copy(update={"max_sequence": traced.max_sequence, "outside": traced.outside})
        strip_trace_metadata(graph)
    with progress.task("Writing the weights", total=None, unit="tensors") as writing:
        write_weights(graph, data_path(model_path), lambda done, total: writing.update(done, total))
    save_graph(graph, model_path)
    write_sites(sites, sites_path)
    return sites


def _traced(config: PretrainedConfig, dtype: str, task: Task, trust_remote_code: bool) -> TracedModel:
    # Imports torch, which the other stages do not need.
    from fptq_export.trace.decoder_from_hf import traced_decoder_from_config
    from fptq_export.trace.encoder_from_hf import traced_encoder_from_config
    from fptq_export.trace.from_hf import traced_from_config
    from fptq_export.trace.language_half_from_hf import traced_language_half_from_config

    if gives_hidden_states(task):
        return traced_encoder_from_config(config, dtype, trust_remote_code=trust_remote_code, task=task)
    of_part = {SEQ2SEQ_DECODER: traced_decoder_from_config, VLM_DECODER: traced_language_half_from_config}
    from_config = of_part.get(task, traced_from_config)
    return from_config(config, dtype, trust_remote_code=trust_remote_code)
