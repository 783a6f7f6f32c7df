"""A tiny random LLaMA as ONNX, and a model small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tests.support.traced import Traced, torch_logits

VOCABULARY = 512


@dataclass(frozen=True)
class TinyLlama:
    """Graphs of one random model, and its logits in torch."""

    fp32: Path
    fp16: Path
    ids: NDArray[np.int64]
    """[2, 24]"""
    torch_logits: NDArray[np.float32]
    """FP32, [2, 24, 512]"""


@pytest.fixture(scope="session")
def tiny_llama(llama_fp32: Traced, llama_fp16: Traced, tmp_path_factory: pytest.TempPathFactory) -> TinyLlama:
    """The traced graphs under names of their own. Two layers, grouped-query attention; weights in external data."""
    directory = tmp_path_factory.mktemp("tiny-llama-onnx")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (2, 24))
    fp32, fp16 = (_renamed(traced.model, directory / f"{traced.dtype}.onnx") for traced in (llama_fp32, llama_fp16))
    return TinyLlama(fp32, fp16, ids, torch_logits(llama_fp32.checkpoint, ids))


def _renamed(graph: Path, path: Path) -> Path:
    ir.save(ir.load(graph), path, external_data=f"{path.name}.data")
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
