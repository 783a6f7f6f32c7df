"""Encoder-decoders in torch and as graphs, for tests of either half."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.modeling_outputs import Seq2SeqLMOutput

from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.rewrite.fold_equalization import FoldEqualization
from fptq_export.sites import Sites
from fptq_export.tasks import SEQ2SEQ_DECODER, auto_class
from tests.families.registry import Family
from tests.support.traced import Traced, causal_feed

__all__ = [
    "SpeechForced",
    "TeacherForced",
    "check_sites",
    "check_statistics",
    "decoder_feed",
    "folded_graph",
    "seq2seq_model",
    "speech_feed",
]

SUM_ORDER = 128 * 2.0**-24
"""Sums over at most 128 terms in another order, relative to the largest: other matrix shapes."""


def seq2seq_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model of a checkpoint, as transformers loads it; parameters that share storage are set apart."""
    from transformers import AutoConfig

    whole = auto_class(AutoConfig.from_pretrained(directory), SEQ2SEQ_DECODER)
    model = whole.from_pretrained(directory, dtype=dtype, attn_implementation="eager").to(dtype)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return model.eval()


class TeacherForced(nn.Module):
    """A half as a function of tokens: what its graph gives, as `logits`.

    Args:
        model: The whole model.
        graph: Name of the graph that gives the same: `encoder`, or one that starts with `decoder`.
        source: Tokens of the encoder before the decoder, int64 [batch, source].
    """

    def __init__(self, model: nn.Module, graph: str, source: NDArray[np.int64]) -> None:
        super().__init__()
        self._model: Any = model
        self._encodes = graph == "encoder"
        self._source = torch.from_numpy(source)

    def forward(self, input_ids: torch.Tensor) -> Seq2SeqLMOutput:
        """Hidden states of the encoder, or logits of the decoder behind the encoder's source."""
        if self._encodes:
            return Seq2SeqLMOutput(logits=self._model.get_encoder()(input_ids=input_ids).last_hidden_state)
        output = self._model(input_ids=self._source, decoder_input_ids=input_ids, use_cache=False)
        return Seq2SeqLMOutput(logits=output.logits)


class SpeechForced(nn.Module):
    """A half of a model of speech as a function of tokens, behind or instead of which its features are given.

    Args:
        model: The whole model.
        half: `encoder` or `decoder`.
        features: float32 [batch, mel bins, frames].
    """

    def __init__(self, model: nn.Module, half: str, features: NDArray[np.float32]) -> None:
        super().__init__()
        self._model: Any = model
        self._encodes = half == "encoder"
        self._features = torch.from_numpy(features).to(next(model.parameters()).dtype)

    def forward(self, input_ids: torch.Tensor) -> Seq2SeqLMOutput:
        """Hidden states of the encoder, which reads no tokens, or logits of the decoder."""
        if self._encodes:
            return Seq2SeqLMOutput(logits=self._model.get_encoder()(self._features).last_hidden_state)
        output = self._model(input_features=self._features, decoder_input_ids=input_ids, use_cache=False)
        return Seq2SeqLMOutput(logits=output.logits)


def folded_graph(traced: Traced, scales: Mapping[str, NDArray[np.float32]], target: Path) -> Path:
    """Write a traced graph with the equalization of its sites folded in."""
    graph = load_graph(traced.model)
    FoldEqualization(traced.sites, scales)(graph)
    write_weights(graph, data_path(target))
    save_graph(graph, target)
    return target


def speech_feed(
    graph: Path, ids: NDArray[np.int64], hidden: NDArray[np.float32], past: dict[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """Inputs of a decoder of speech: as `decoder_feed`, without a mask of the source."""
    feed = decoder_feed(graph, ids, hidden, past=past)
    del feed["encoder_attention_mask"]
    return feed


def decoder_feed(
    graph: Path,
    ids: NDArray[np.int64],
    hidden: NDArray[np.float32],
    mask: NDArray[np.int64] | None = None,
    past: dict[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Inputs of a decoder: ids [batch, sequence] behind hidden states [batch, source, H] and a past, or none."""
    feed = causal_feed(graph, ids, past)
    del feed["attention_mask"], feed["position_ids"]
    all_tokens = np.ones(hidden.shape[:2], np.int64)
    return {**feed, "encoder_hidden_states": hidden, "encoder_attention_mask": all_tokens if mask is None else mask}


def check_sites(sites: Sites, family: Family) -> str:
    """Sites and refusals are those of a family; gives what stands in the support table."""
    found = [(site.kind, " ".join(path.rpartition(".")[2] for path in site.consumers)) for site in sites.fold_sites]
    assert found == list(family.sites)
    reasons = {linear.path: linear.no_site_reason or "" for linear in sites.linears if linear.site is None}
    for path, reason in reasons.items():
        assert [words for end, words in family.no_site.items() if path.endswith(end) and words in reason], reason
    assert sites.unmatched == ()
    return f"{len(sites.site_by_consumer())} of {len(sites.linears)}"


def check_statistics(
    channel_absmax: Mapping[str, NDArray[np.float32]],
    hessians: Mapping[str, torch.Tensor],
    inputs: Mapping[str, NDArray[np.float32]],
    count: int,
) -> None:
    """Maxima and second moments of each linear are those of what it reads.

    Args:
        channel_absmax: Path -> float32 [in].
        hessians: Path -> mean of x x^T, [in, in].
        inputs: Path -> what the linear reads in the whole model, [rows, in].
        count: Rows that calibration counts.
    """
    for path, x in inputs.items():
        largest = np.abs(x).max(axis=0)
        bound = SUM_ORDER * largest.max()
        np.testing.assert_allclose(channel_absmax[path], largest, rtol=0.0, atol=bound, err_msg=path)
        moments = x.T @ x
        actual = hessians[path].numpy() * count
        np.testing.assert_allclose(actual, moments, rtol=0.0, atol=len(x) * SUM_ORDER * moments.max(), err_msg=path)
