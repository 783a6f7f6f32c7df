"""The decoder of an encoder-decoder -> an ONNX graph with a KV cache of its self-attention, with no weights in memory.

Keys and values of the encoder's hidden states are computed in every call: the cache holds the decoder's own tokens
only. Behind an encoder of speech there are as many hidden states as it has positions, and no mask of them. Tracing
works as for language models (`from_hf`): under `FakeTensorMode`, from the config alone.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

from fptq_export.errors import UserError
from fptq_export.halves import cut_to_decoder, feature_shape
from fptq_export.tasks import SEQ2SEQ_DECODER, auto_class, reads_features
from fptq_export.trace.fake_tracing import fake_tracing
from fptq_export.trace.from_hf import (
    SAMPLE_BATCH,
    SAMPLE_SEQUENCE,
    TORCH_DTYPES,
    KeyValue,
    TracedModel,
    computed_buffers,
    graph_with_cache,
    keys_and_values,
    refuse_stacked_weights,
    sample_past,
    user_errors_from_torch,
)
from fptq_export.trace.graph_names import name_dimensions, name_initializers
from fptq_export.trace.model_linears import linears_from_model, roles_from_model

__all__ = ["traced_decoder_from_config"]

_SAMPLE_SOURCE = 7
"""Tokens of the sample's encoder: another number than those of the samples in `from_hf`."""
_SOURCE = ("batch", "source")
_HIDDEN = "encoder_hidden_states"


class _FlatDecoder(nn.Module):
    """The model behind its encoder, with the cache as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def run(
        self, input_ids: torch.Tensor, hidden: torch.Tensor, mask: torch.Tensor | None, past: list[KeyValue]
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """Logits [batch, sequence, vocab], and keys and values [batch, heads, total, head_dim] of self-attention."""
        cache = EncoderDecoderCache(DynamicCache(past), DynamicCache())
        output = self.wrapped(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, keys_and_values(cache.self_attention_cache)


class _TextDecoder(_FlatDecoder):
    """Behind texts of any length."""

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        past_key_values: list[KeyValue],
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """As `run`."""
        return self.run(input_ids, encoder_hidden_states, encoder_attention_mask, past_key_values)


class _SpeechDecoder(_FlatDecoder):
    """Behind windows of one length: there is nothing to mask."""

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, past_key_values: list[KeyValue]
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """As `run`."""
        return self.run(input_ids, encoder_hidden_states, None, past_key_values)


def traced_decoder_from_config(config: PretrainedConfig, dtype: str, *, trust_remote_code: bool = False) -> TracedModel:
    """Trace the decoder of an encoder-decoder from its config alone.

    Args:
        config: Config of the whole model; its weights are not needed.
        dtype: `fp16`, `bf16` or `fp32`: the type of weights and activations.
        trust_remote_code: Whether code from the model repository may run.

    Returns:
        The graph with inputs `input_ids` int64 [batch, sequence], `encoder_hidden_states` [batch, source, hidden],
        `encoder_attention_mask` int64 [batch, source] and `past_key_values.N.key/value`, and outputs `logits`,
        `present.N.key/value`; batch, sequence, source and past length are dynamic. Positions are counted by the model,
        from the length of the past. Behind an encoder of speech there is no mask, and source is the number of its
        positions.

    Raises:
        UserError: torch cannot trace it, or it keeps another cache than keys and values.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    torch_dtype = TORCH_DTYPES[dtype]
    with fake_tracing():
        with no_init_weights():  # some draw weights by the values of others, and fake tensors have none
            model = _empty_model(config, torch_dtype, trust_remote_code)
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        encoder = cut_to_decoder(model)
        refuse_stacked_weights(model)
        with user_errors_from_torch(model):
            speech = reads_features(config)
            inputs = _speech_inputs(encoder, config, torch_dtype) if speech else _text_inputs(encoder)
            past = sample_past(model, torch_dtype, _cache_after(model, inputs))
            flat = _SpeechDecoder(model) if speech else _TextDecoder(model)
            graph = graph_with_cache(flat, inputs, past, fixed=(_HIDDEN,) if speech else ())
    name_initializers(graph)
    hidden = ("batch", None, None) if speech else (*_SOURCE, None)
    name_dimensions(graph, {"input_ids": ("batch", "sequence"), _HIDDEN: hidden, "encoder_attention_mask": _SOURCE})
    return TracedModel(
        graph,
        computed_buffers(lambda: _empty_model(config, torch_dtype, trust_remote_code)),
        tied,
        linears_from_model(model),
        roles_from_model(model),
        config.max_target_positions if speech else None,
    )


def _empty_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model: PreTrainedModel = auto_class(config, SEQ2SEQ_DECODER).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except ValueError as error:
        raise UserError(
            f"model type {config.model_type!r}",
            f"is not an encoder-decoder that transformers knows ({str(error).splitlines()[0]})",
            "export an encoder-decoder like T5",
        ) from error
    model.eval()
    return model


def _text_inputs(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Samples of the graph's inputs before the cache; what the encoder gives tells size and type of hidden states."""
    source = torch.zeros(SAMPLE_BATCH, _SAMPLE_SOURCE, dtype=torch.long)
    hidden = encoder(input_ids=source).last_hidden_state
    return {**_sample_ids(), _HIDDEN: torch.zeros_like(hidden), "encoder_attention_mask": torch.ones_like(source)}


def _speech_inputs(encoder: nn.Module, config: PretrainedConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The same behind an encoder of speech."""
    hidden = encoder(torch.zeros(SAMPLE_BATCH, *feature_shape(encoder, config), dtype=dtype)).last_hidden_state
    return {**_sample_ids(), _HIDDEN: torch.zeros_like(hidden)}


def _sample_ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(SAMPLE_BATCH, SAMPLE_SEQUENCE, dtype=torch.long)}


def _cache_after(model: nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    """The cache of self-attention after the sample's tokens."""
    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=inputs[_HIDDEN]),
        decoder_input_ids=inputs["input_ids"],
        use_cache=True,
    )
    cache = output.past_key_values
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
