"""What the inputs of an exported causal language model hold beside its KV cache, and what the cache's are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["PAST", "PRESENT", "SCALE", "WRITE_INDICES", "feed_from_ids"]

PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
"""Input of a cache: layer, and which of the two."""
PRESENT = re.compile(r"present\.(\d+)\.(key|value)")
"""The output that goes back into it."""
SCALE = "_scale"
"""Behind the name of a cache of INT8 codes: its scales."""
WRITE_INDICES = "write_indices"
"""Input of graphs with a static cache: slots of each sequence that are filled before the call."""


def feed_from_ids(
    input_ids: NDArray[np.int64],
    past_length: int,
    slots: int,
    dtypes: Mapping[str, np.dtype[Any]],
    given: Mapping[str, NDArray[Any]] | None = None,
) -> dict[str, NDArray[Any]]:
    """Every input beside the cache, for sequences without padding.

    Args:
        input_ids: New tokens, int64 [B, S].
        past_length: Tokens in the cache.
        slots: Length of a static cache; 0 for one that grows.
        dtypes: Input -> its type; no other input is given.
        given: Inputs that are no matter of ids.

    Returns:
        Contiguous arrays: `input_ids` and `position_ids` [B, S], `attention_mask` [B, past + S] or [B, slots],
        `write_indices` [B].
    """
    batch, length = input_ids.shape
    arrays = {
        "input_ids": input_ids,
        "attention_mask": np.ones((batch, slots or past_length + length)),
        "position_ids": np.broadcast_to(np.arange(past_length, past_length + length), (batch, length)),
        WRITE_INDICES: np.full(batch, past_length),
        **(given or {}),
    }
    return {name: np.ascontiguousarray(arrays[name], dtype) for name, dtype in dtypes.items()}
