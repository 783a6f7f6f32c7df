"""Architectures that could only be exported with weights that silently stay in float are refused."""

from __future__ import annotations

import pytest
from transformers import MixtralConfig

from fptq_export.errors import UserError
from fptq_export.trace.from_hf import traced_from_config


def test_stacked_experts_are_refused_before_tracing() -> None:
    """Mixtral's experts are three-dimensional parameters; the error names one of them."""
    config = MixtralConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=2, vocab_size=64,
    )  # fmt: skip
    with pytest.raises(UserError, match="dense decoder") as caught:
        traced_from_config(config, "fp32")
    assert "mlp.experts" in str(caught.value)
