"""The tiny LLaMA with tokens to measure it on."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from calib.batches import TokenBatches
from calib.load import Checkpoint, model_from_checkpoint
from calib.stream import LoadModel

__all__ = ["TOKENS", "load_llama"]

TOKENS = TokenBatches(np.random.default_rng(0).integers(0, 100, (6, 32)), "random", "")


def load_llama(checkpoint: Checkpoint) -> LoadModel:
    """Give the model anew with each call."""
    return partial(model_from_checkpoint, checkpoint, torch.float32)
