"""A torch model behind arrays: prefill and decode agree, and a cache can be used twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calib.load import checkpoint_from_directory, model_from_checkpoint
from calib.session import TorchCausalSession

STEPS = 4
IDS = np.arange(40, dtype=np.int64).reshape(2, 20)
LOGIT_TOLERANCE = 2 * 7 * 130 * 2.0**-24
"""Relative to the largest logit: 2 layers of 7 linears, each a sum of at most 128 products, in another order."""


@pytest.fixture(params=["tiny_llama_dir", "tiny_opt_dir"])
def session(request: pytest.FixtureRequest) -> TorchCausalSession:
    checkpoint = checkpoint_from_directory(request.getfixturevalue(request.param), "tiny")
    return TorchCausalSession(model_from_checkpoint(checkpoint, torch.float32), "tiny fp32")


def test_decoding_continues_the_prompt(session: TorchCausalSession) -> None:
    """Logits of the last tokens, one by one with the cache, are those of one long prompt."""
    whole, _ = session.prefill(IDS)
    assert whole.dtype == np.float32
    assert whole.shape == (2, 20, 512)
    first, cache = session.prefill(IDS[:, :-STEPS])
    parts = [first]
    for step in range(STEPS, 0, -1):
        token = IDS[:, -step : IDS.shape[1] - step + 1]
        logits, cache = session.decode(token, cache)
        assert logits.shape == (2, 1, 512)
        parts.append(logits)
    assert np.abs(np.concatenate(parts, axis=1) - whole).max() <= LOGIT_TOLERANCE * np.abs(whole).max()


def test_cache_stays_valid_after_it_was_used(session: TorchCausalSession) -> None:
    """Two continuations of one prompt do not disturb each other."""
    _, cache = session.prefill(IDS)
    first, _ = session.decode(IDS[:, :1], cache)
    session.decode(IDS[:, 1:2], cache)
    again, _ = session.decode(IDS[:, :1], cache)
    assert np.array_equal(first, again)


def test_session_has_the_name_of_reports(session: TorchCausalSession) -> None:
    """The name is what the caller chose."""
    assert session.name == "tiny fp32"
