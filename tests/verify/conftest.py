"""A tiny random LLaMA as ONNX, and a model small enough to follow by hand."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

VOCABULARY = 128
LAYERS = 2


@dataclass(frozen=True)
class TinyLlama:
    """Graphs of one random model, and its logits in torch."""

    fp32: Path
    fp16: Path
    ids: NDArray[np.int64]
    """[2, 24]"""
    torch_logits: NDArray[np.float32]
    """FP32, [2, 24, 128]"""


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """Two layers, grouped-query attention; weights in external data. Drawn widely, so that context sways the logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    directory = tmp_path_factory.mktemp("tiny-llama-onnx")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits.numpy()
    fp32 = _export(model, directory / "fp32.onnx")
    fp16 = _export(model.half(), directory / "fp16.onnx")
    return TinyLlama(fp32, fp16, ids, logits)


def _export(model: Any, path: Path) -> Path:
    import torch
    from transformers import DynamicCache

    class WithFlatCache(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any) -> Any:
            output = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=DynamicCache(past),
                use_cache=True,
            )
            return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]

    batch, length, past = 2, 3, 5
    config = model.config
    cache = [
        tuple(
            torch.zeros(batch, config.num_key_value_heads, past, config.head_dim, dtype=model.dtype) for _ in range(2)
        )
        for _ in range(config.num_hidden_layers)
    ]
    # Two tensors: torch.export takes one tensor in two places for one input.
    ids, positions = (torch.zeros(batch, length, dtype=torch.long) for _ in range(2))
    mask = torch.ones(batch, length + past, dtype=torch.long)
    auto = torch.export.Dim.AUTO
    ids_axes, cache_axes = {0: auto, 1: auto}, {0: auto, 2: auto}
    names = [f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.export.export(
            WithFlatCache(),
            (ids, mask, positions, cache),
            dynamic_shapes=(ids_axes, ids_axes, ids_axes, [(cache_axes, cache_axes)] * config.num_hidden_layers),
        )
        exported = torch.onnx.export(
            program,
            (),
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
            opset_version=21,
            verbose=False,
        )
    assert exported is not None
    ir.save(exported.model, str(path), external_data=f"{path.name}.data")
    return path


@dataclass(frozen=True)
class ToySession:
    """Logits = own row of the current token + mixed rows of the tokens before it; float32.

    The cache is (sum of rows of the tokens so far, how many), so that decode steps can be followed by hand.
    """

    name: str
    own: NDArray[np.float32]
    """[V, V]"""
    context: NDArray[np.float32]
    """[V, V]"""
    forgets: bool = False
    """Whether decode loses the cache, the defect that a broken graph has."""

    def prefill(self, input_ids: NDArray[np.int64]) -> tuple[NDArray[np.float32], Any]:
        """[B, S] -> logits [B, S, V], cache."""
        rows = self.context[input_ids]
        sums = np.cumsum(rows, axis=1)
        counts = np.arange(1, input_ids.shape[1] + 1)[None, :, None]
        logits = self.own[input_ids] + sums / counts
        return logits.astype(np.float32), (sums[:, -1], input_ids.shape[1])

    def decode(self, input_ids: NDArray[np.int64], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """[B, 1], cache -> logits [B, 1, V], cache."""
        total, count = (np.zeros_like(cache[0]), 0) if self.forgets else cache
        total = total + self.context[input_ids[:, 0]]
        logits = self.own[input_ids[:, 0]] + total / (count + 1)
        return logits[:, None].astype(np.float32), (total, count + 1)


@pytest.fixture
def make_toy() -> Callable[..., ToySession]:
    """Give a function that draws a toy model; the same seed is the same model."""

    def make(name: str = "toy", vocabulary: int = 16, seed: int = 0, forgets: bool = False) -> ToySession:
        rng = np.random.default_rng(seed)
        own, context = rng.normal(size=(2, vocabulary, vocabulary)).astype(np.float32) * np.float32(3.0)
        return ToySession(name, own, context, forgets)

    return make


@pytest.fixture
def toy(make_toy: Callable[..., ToySession]) -> ToySession:
    """A toy model of 16 tokens."""
    return make_toy()


@pytest.fixture
def windows() -> NDArray[np.int64]:
    """Three windows of 20 tokens below 16."""
    return np.random.default_rng(1).integers(0, 16, (3, 20))
