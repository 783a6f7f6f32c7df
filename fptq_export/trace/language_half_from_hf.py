"""The language half of a vision-language model -> an ONNX graph that reads embeddings, with no weights in memory.

Tracing works as for language models (`from_hf`): under `FakeTensorMode`, from the config alone. The table of token
embeddings is not part of the graph, and neither is anything that turns images into embeddings.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from fptq_export.errors import UserError
from fptq_export.language_half import check_language_half, cut_to_language_half, modules_outside
from fptq_export.tasks import VLM_DECODER, auto_class
from fptq_export.trace.fake_tracing import fake_tracing
from fptq_export.trace.from_hf import (
    SAMPLE_BATCH,
    SAMPLE_SEQUENCE,
    TORCH_DTYPES,
    KeyValue,
    TracedModel,
    computed_buffers,
    graph_with_cache,
    refuse_stacked_weights,
    run_with_cache,
    sample_inputs,
    sample_past,
    user_errors_from_torch,
)
from fptq_export.trace.graph_names import name_dimensions, name_initializers
from fptq_export.trace.model_linears import linears_from_model, roles_from_model

__all__ = ["traced_language_half_from_config"]


class _FlatLanguageHalf(nn.Module):
    """The model behind its embeddings, with the cache as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.wrapped = model

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: list[KeyValue],
    ) -> tuple[torch.Tensor, list[KeyValue]]:
        """Logits [batch, sequence, vocab], and keys and values [batch, heads, total, head_dim] of every layer."""
        inputs = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, "position_ids": position_ids}
        return run_with_cache(self.wrapped, inputs, past_key_values)


def traced_language_half_from_config(
    config: PretrainedConfig, dtype: str, *, trust_remote_code: bool = False
) -> TracedModel:
    """Trace the language half of a vision-language model from the config of the whole.

    Args:
        config: Config of the whole model; its weights are not needed.
        dtype: `fp16`, `bf16` or `fp32`: the type of weights, activations and of the embeddings that are read.
        trust_remote_code: Whether code from the model repository may run.

    Returns:
        The graph with inputs `inputs_embeds` [batch, sequence, hidden], `attention_mask`, `position_ids` and
        `past_key_values.N.key/value`, and outputs `logits`, `present.N.key/value`; batch, sequence and past length are
        dynamic. Embeddings are what the model's embedding gives: a factor that the decoder applies to them is in the
        graph.

    Raises:
        UserError: Its decoder needs more of an image than embeddings, or torch cannot trace it.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"
    torch_dtype = TORCH_DTYPES[dtype]
    with fake_tracing():
        with no_init_weights():  # some draw weights by the values of others, and fake tensors have none
            model = _empty_model(config, torch_dtype, trust_remote_code)
        check_language_half(model)
        outside = modules_outside(model)
        tied = model.get_expanded_tied_weights_keys(all_submodels=True)
        cut_to_language_half(model)
        refuse_stacked_weights(model)
        with user_errors_from_torch(model):
            ids = torch.zeros(SAMPLE_BATCH, SAMPLE_SEQUENCE, dtype=torch.long)
            embeds = torch.zeros_like(model.get_input_embeddings()(ids))
            cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
            past = sample_past(model, torch_dtype, cache)
            beside = {name: sample for name, sample in sample_inputs().items() if name != "input_ids"}
            graph = graph_with_cache(_FlatLanguageHalf(model), {"inputs_embeds": embeds, **beside}, past)
    name_initializers(graph)
    tokens = ("batch", "sequence")
    names = {"inputs_embeds": (*tokens, None), "position_ids": tokens, "attention_mask": ("batch", "total")}
    name_dimensions(graph, names)
    return TracedModel(
        graph,
        computed_buffers(lambda: _empty_model(config, torch_dtype, trust_remote_code)),
        tied,
        linears_from_model(model),
        roles_from_model(model),
        outside=outside,
    )


def _empty_model(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    try:
        model: PreTrainedModel = auto_class(config, VLM_DECODER).from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    except ValueError as error:
        raise UserError(
            f"model type {config.model_type!r}",
            f"is not a vision-language model that transformers knows ({str(error).splitlines()[0]})",
            "export a model that turns images and text into text (LLaVA, SmolVLM, ...)",
        ) from error
    model.eval()
    return model
