"""How far a whole policy moves the prediction of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray

from calib.fake_quant import applied_policy
from fptq_export.policy import Policy
from fptq_export.sites import Sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["log_probs_from_windows", "measured_kl"]


def log_probs_from_windows(model: PreTrainedModel, windows: torch.Tensor) -> list[torch.Tensor]:
    """The float model's prediction: float32 [seq, vocabulary] for each window of int64 [windows, seq]."""
    with torch.inference_mode():
        return [
            model(input_ids=window[None], use_cache=False).logits[0].to(torch.float32).log_softmax(dim=-1)
            for window in windows
        ]


def measured_kl(
    model: PreTrainedModel,
    windows: torch.Tensor,
    expected: Sequence[torch.Tensor],
    policy: Policy,
    arrays: Mapping[str, NDArray[Any]],
    sites: Sites,
) -> float:
    """KL divergence of the model with a policy from the float model, nats a token.

    Args:
        model: The float model; it is the same afterwards.
        windows: int64 [windows, seq].
        expected: Its log probabilities, from `log_probs_from_windows`.
        policy: Complete.
        arrays: Its arrays.
        sites: Fold sites of the policy.
    """
    total = 0.0
    with applied_policy(model, policy, arrays, sites):
        for window, before in zip(windows, expected, strict=True):
            (after,) = log_probs_from_windows(model, window[None])
            total += float((before.exp() * (before - after)).sum(dtype=torch.float64))
    return max(total / windows.numel(), 0.0)
