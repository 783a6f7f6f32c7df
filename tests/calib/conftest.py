"""Tiny checkpoints with hand-made sites, statistics and policies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config, PretrainedConfig

from calib.load import Checkpoint, checkpoint_from_directory
from calib.stats import Stats
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites
from tests.support.checkpoints import llama_sites

StatsFactory = Callable[[dict[str, float]], Stats]


@pytest.fixture(scope="session")
def llama(tiny_llama_dir: Path) -> Checkpoint:
    """The tiny LLaMA: hidden 64, MLP 128, 2 layers."""
    return checkpoint_from_directory(tiny_llama_dir, "tiny-llama")


@pytest.fixture(scope="session")
def gpt2(make_model_dir: Callable[[PretrainedConfig], Path]) -> Checkpoint:
    """A random GPT-2: Conv1D linears that store [in, out], one of them square, and a tied head."""
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=512, n_positions=128, bos_token_id=0, eos_token_id=1)
    return checkpoint_from_directory(make_model_dir(config), "gpt2")


@pytest.fixture(scope="session")
def sites(llama: Checkpoint) -> Sites:
    """Its sites."""
    return llama_sites(llama)


@pytest.fixture(scope="session")
def make_stats(sites: Sites) -> StatsFactory:
    """Give a function that makes statistics in which a linear's input reaches a given magnitude, 1 if none is given.

    Linears that share an input share its maxima. Channels run from 0 (a dead one) to the largest.
    """

    def make(absmax: dict[str, float]) -> Stats:
        reach = {
            linear.input: absmax[name] for linear in sites.linears for name in absmax if linear.path.endswith(name)
        }
        channels = {
            linear.path: np.linspace(0.0, 1.0, linear.in_features, dtype=np.float32)
            * np.float32(reach.get(linear.input, 1.0))
            for linear in sites.linears
        }
        return Stats(channels, 1024, "hand-made")

    return make


@pytest.fixture
def silent() -> NoProgress:
    """No progress display."""
    return NoProgress()
