"""Tiny random models, each traced once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.traced import Traced, traced_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@pytest.fixture(scope="session")
def llama_fp32(tiny_llama_dir: Path) -> Traced:
    """RMSNorm, gated MLP, grouped-query attention, untied head."""
    return traced_once(tiny_llama_dir, "fp32")


@pytest.fixture(scope="session")
def llama_fp16(tiny_llama_dir: Path) -> Traced:
    """The same in FP16, from an FP32 checkpoint."""
    return traced_once(tiny_llama_dir, "fp16")


@pytest.fixture(scope="session")
def opt_fp32(tiny_opt_dir: Path) -> Traced:
    """LayerNorm with bias, ReLU MLP on two-dimensional tensors, biases, tied head."""
    return traced_once(tiny_opt_dir, "fp32")


@pytest.fixture(scope="session")
def gemma_fp16(make_model_dir: Callable[[PretrainedConfig], Path]) -> Traced:
    """Norms that multiply by 1 + w, tied head; one layer."""
    from transformers import GemmaConfig

    config = GemmaConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=512,
        max_position_embeddings=512,
    )
    return traced_once(make_model_dir(config), "fp16")
