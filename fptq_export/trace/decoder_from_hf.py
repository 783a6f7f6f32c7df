"""The decoder of an encoder-decoder -> an ONNX graph with a KV cache of its self-attention, with no weights in memory.

Keys and values of the encoder's hidden states are computed in every call: the cache holds the decoder's own tokens
only. Tracing works as for language models (`from_hf`): under `FakeTensorMode`, from the config alone.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import BaseModelOutput

from fptq_export.errors import UserError
from fptq_export.halves import cut_to_decoder
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
    name_dimensions,
    name_initializers,
    refuse_stacked_weights,
    sample_past,
    user_errors_from_torch,
)
from fptq_export.trace.model_linears import linears_from_model, roles_from_model

__all__ = ["traced_decoder_from_config"]

_SAMPLE_SOURCE = 7
"""Tokens of the sample's encoder: another number than those of the samples in `from_hf`."""
_SOURCE = ("batch", "source")


class _FlatDecoder(nn.Module):
    """The model behind its encoder, with the cache as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        past_key_values: list[KeyValue],
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """Logits [batch, sequence, vocab], and keys and values [batch, heads, total, head_dim] of self-attention."""
        cache = EncoderDecoderCache(DynamicCache(past_key_values), DynamicCache())
        output = self.wrapped(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits, keys_and_values(cache.self_attention_cache)


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
        from the length of the past.

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
            inputs = _sample_inputs(encoder)
            past = sample_past(model, torch_dtype, _cache_after(model, inputs))
            graph = graph_with_cache(_FlatDecoder(model), inputs, past)
    name_initializers(graph)
    hidden = (*_SOURCE, None)
    names = {"input_ids": ("batch", "sequence"), "encoder_hidden_states": hidden, "encoder_attention_mask": _SOURCE}
    name_dimensions(graph, names)
    return TracedModel(
        graph,
        computed_buffers(lambda: _empty_model(config, torch_dtype, trust_remote_code)),
        tied,
        linears_from_model(model),
        roles_from_model(model),
    )


def _empty_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForSeq2SeqLM.from_config(
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


def _sample_inputs(encoder: nn.Module) -> dict[str, torch.Tensor]:
    """Samples of the graph's inputs before the cache; what the encoder gives tells size and type of hidden states."""
    source = torch.zeros(SAMPLE_BATCH, _SAMPLE_SOURCE, dtype=torch.long)
    hidden = encoder(input_ids=source).last_hidden_state
    return {
        "input_ids": torch.zeros(SAMPLE_BATCH, SAMPLE_SEQUENCE, dtype=torch.long),
        "encoder_hidden_states": torch.zeros_like(hidden),
        "encoder_attention_mask": torch.ones_like(source),
    }


def _cache_after(model: nn.Module, inputs: dict[str, torch.Tensor]) -> object:
    """The cache of self-attention after the sample's tokens."""
    output = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=inputs["encoder_hidden_states"]),
        decoder_input_ids=inputs["input_ids"],
        use_cache=True,
    )
    cache = output.past_key_values
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
