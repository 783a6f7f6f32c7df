"""Architectures that could only be exported with weights that silently stay in float are refused."""

from __future__ import annotations

import pytest
from transformers import GptOssConfig

from fptq_export.errors import UserError
from fptq_export.trace.from_hf import traced_from_config


def test_experts_that_are_no_plain_linears_are_refused_before_tracing() -> None:
    """GPT-OSS has biases and interleaved, clamped gates ; module and cause are named."""
    config = GptOssConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, num_local_experts=2, vocab_size=64,
    )  # fmt: skip
    with pytest.raises(UserError, match="its experts have biases") as caught:
        traced_from_config(config, "fp32")
    assert caught.value.where == "module model.layers.0.mlp.experts"
