"""A decoder that no released library knows, with the quirks that discovery has to cope with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

__all__ = ["QUIRKS", "UnknownConfig", "UnknownForCausalLM"]

QUIRKS = ("", "called twice", "residual after norm", "extra reader of norm", "shared weight")
"""What a block does differently: every linear of it is called twice; the MLP's residual starts behind its norm; a
parameter reads the norm beside the linears; its MLP has the first block's weight."""


class UnknownConfig(PreTrainedConfig):
    """One of `QUIRKS` for each block."""

    model_type = "unknown-to-all"

    def __init__(self, quirks: Sequence[str] = ("",), **kwargs: Any) -> None:
        assert set(quirks) <= set(QUIRKS)
        self.quirks = list(quirks)
        self.num_hidden_layers = len(quirks)
        self.hidden_size = 64
        self.vocab_size = 512
        # transformers ties any two parameters under this name.
        super().__init__(**{"tie_word_embeddings": "shared weight" in quirks, **kwargs})


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class _Block(nn.Module):
    """One head of attention, then a linear behind tanh: no exact place to fold."""

    def __init__(self, config: UnknownConfig, index: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.index, self.quirk = index, config.quirks[index]
        self.norm, self.mlp_norm = _Norm(size), _Norm(size)
        self.query, self.key, self.value, self.out, self.mlp_in, self.mlp_out = (
            nn.Linear(size, size, bias=False) for _ in range(6)
        )
        if self.quirk == "extra reader of norm":
            self.gate = nn.Parameter(torch.zeros(size, 1))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        for _ in range(2 if self.quirk == "called twice" else 1):
            hidden = hidden + self._attention(self.norm(hidden), mask, past_key_values)
            x = self.mlp_norm(hidden)
            y = self.mlp_out(torch.tanh(self.mlp_in(x)))
            if self.quirk == "extra reader of norm":
                y = y * torch.sigmoid(x @ self.gate)
            hidden = y + (x if self.quirk == "residual after norm" else hidden)
        return hidden

    def _attention(self, x: torch.Tensor, mask: torch.Tensor, past_key_values: Cache | None) -> torch.Tensor:
        keys, values = self.key(x)[:, None], self.value(x)[:, None]
        if past_key_values is not None and self.quirk != "called twice":
            keys, values = past_key_values.update(keys, values, self.index)
        elif past_key_values is not None:
            past_key_values.update(keys, values, self.index)
        scores = self.query(x)[:, None] @ keys.transpose(2, 3) / x.shape[-1] ** 0.5
        length = keys.shape[2]
        probabilities = torch.softmax(scores + mask[..., mask.shape[-1] - length :], dim=-1)
        mixed: torch.Tensor = self.out((probabilities @ values)[:, 0])
        return mixed


class _Body(nn.Module):
    def __init__(self, config: UnknownConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = _Norm(config.hidden_size)


class UnknownForCausalLM(PreTrainedModel):
    """The whole model."""

    config_class = UnknownConfig
    base_model_prefix = "model"

    def __init__(self, config: UnknownConfig) -> None:
        super().__init__(config)
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        first = "model.layers.0.mlp_in.weight"
        shared = [index for index, quirk in enumerate(config.quirks) if quirk == "shared weight"]
        self._tied_weights_keys = {f"model.layers.{index}.mlp_in.weight": first for index in shared}
        for index in shared:
            self.model.layers[index].mlp_in.weight = self.model.layers[0].mlp_in.weight
        self.post_init()  # type: ignore[no-untyped-call]  # transformers leaves it without annotations

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, sequence, vocab] of a causal model without positions."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        hidden = self.model.embedding(input_ids)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        tokens = torch.arange(input_ids.shape[1] + past)
        mask = torch.where(tokens[None] <= tokens[past:, None], 0.0, -1e4).to(hidden.dtype)
        for block in self.model.layers:
            hidden = block(hidden, mask[None, None], past_key_values)
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(hidden)), past_key_values=past_key_values)


AutoConfig.register(UnknownConfig.model_type, UnknownConfig)
AutoModelForCausalLM.register(UnknownConfig, UnknownForCausalLM)
