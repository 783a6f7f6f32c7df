"""Traced tiny models with a policy, and what the rewrites make of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fptq_export.policy import Activation, Policy, PolicyArrays, Precision
from fptq_export.progress import NoProgress
from fptq_export.rewrite import RewritePaths, lower_for_tensorrt, rewrite
from tests.support.policies import measured_absmax, rtn_policy
from tests.support.traced import Traced

__all__ = ["Rewritten", "rewritten_with"]


@dataclass(frozen=True)
class Rewritten:
    """A model, the policy it was given, and the three graphs that come out."""

    traced: Traced
    policy: Policy
    arrays: PolicyArrays
    qdq: Path
    w4a8: Path
    lowered: Path


def rewritten_with(
    traced: Traced,
    tiers: Mapping[str, Activation],
    ids: NDArray[np.int64],
    directory: Path,
    precisions: Mapping[str, Precision] | None = None,
) -> Rewritten:
    """Quantize a traced model and write every form of it.

    Args:
        traced: The model.
        tiers: Torch path -> tier; the others stay float.
        ids: Tokens to calibrate with.
        directory: Where the files go; `policy.json` beside them.
        precisions: Torch path -> precision of linears in `tiers` that are not `w4a8`.
    """
    absmax = measured_absmax(traced, ids)
    policy, arrays = rtn_policy(traced, directory / "policy.json", tiers, absmax, precisions=precisions)
    names = ("model.qdq.onnx", "model.w4a8.onnx", "model.lowered.onnx")
    qdq, w4a8, lowered = (directory / name for name in names)
    rewrite(RewritePaths(traced.model, qdq, w4a8), traced.sites, policy, arrays, NoProgress())
    lower_for_tensorrt(w4a8, lowered)
    return Rewritten(traced, policy, arrays, qdq, w4a8, lowered)
