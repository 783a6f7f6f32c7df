"""Tiny traced models with policies that use every tier, and what the rewrites make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.policy import Policy, PolicyArrays, Precision
from fptq_export.progress import NoProgress
from fptq_export.rewrite import RewritePaths, lower_for_tensorrt, rewrite
from tests.support.policies import measured_absmax, mixed_precisions, mixed_tiers, rtn_policy
from tests.support.traced import Traced

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]


@dataclass(frozen=True)
class Rewritten:
    """A model, the policy it was given, and the three graphs that come out."""

    traced: Traced
    policy: Policy
    arrays: PolicyArrays
    qdq: Path
    w4a8: Path
    lowered: Path


@pytest.fixture(scope="session")
def ids() -> NDArray[np.int64]:
    """Tokens to calibrate with and to compare on, [2, 8]."""
    return np.random.default_rng(7).integers(0, 512, (2, 8))


@pytest.fixture(scope="session")
def llama_rewritten(llama_fp32: Traced, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """LLaMA in FP32; the head stays float."""
    return _rewritten(llama_fp32, ids, tmp_path_factory.mktemp("llama-fp32"), exclude=("lm_head",))


@pytest.fixture(scope="session")
def llama_rewritten_fp16(
    llama_fp16: Traced, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> Rewritten:
    """LLaMA in FP16; the head stays float."""
    return _rewritten(llama_fp16, ids, tmp_path_factory.mktemp("llama-fp16"), exclude=("lm_head",))


@pytest.fixture(scope="session")
def opt_rewritten(opt_fp32: Traced, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """OPT in FP32, the tied head quantized too."""
    return _rewritten(opt_fp32, ids, tmp_path_factory.mktemp("opt-fp32"), exclude=())


@pytest.fixture(scope="session")
def llama_precisions(llama_fp32: Traced, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """LLaMA in FP32 with all precisions and tiers; linears that read one tensor differ in precision."""
    directory = tmp_path_factory.mktemp("precisions-fp32")
    return _rewritten(llama_fp32, ids, directory, exclude=(), precisions=mixed_precisions(llama_fp32.sites))


@pytest.fixture(scope="session")
def llama_precisions_fp16(
    llama_fp16: Traced, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory
) -> Rewritten:
    """The same in FP16."""
    directory = tmp_path_factory.mktemp("precisions-fp16")
    return _rewritten(llama_fp16, ids, directory, exclude=(), precisions=mixed_precisions(llama_fp16.sites))


def _rewritten(
    traced: Traced,
    ids: NDArray[np.int64],
    directory: Path,
    exclude: tuple[str, ...],
    precisions: Mapping[str, Precision] | None = None,
) -> Rewritten:
    absmax = measured_absmax(traced, ids)
    tiers = mixed_tiers(traced.sites, exclude)
    policy, arrays = rtn_policy(traced, directory / "policy.json", tiers, absmax, precisions=precisions)
    names = ("model.qdq.onnx", "model.w4a8.onnx", "model.lowered.onnx")
    qdq, w4a8, lowered = (directory / name for name in names)
    rewrite(RewritePaths(traced.model, qdq, w4a8), traced.sites, policy, arrays, NoProgress())
    lower_for_tensorrt(w4a8, lowered)
    return Rewritten(traced, policy, arrays, qdq, w4a8, lowered)
