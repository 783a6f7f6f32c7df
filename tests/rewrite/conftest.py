"""Tiny traced models with policies that use every tier, and what the rewrites make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.policy import Precision
from tests.support.policies import mixed_precisions, mixed_tiers
from tests.support.rewritten import Rewritten, rewritten_with
from tests.support.traced import Traced

__all__ = ["Rewritten"]

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]


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
    return rewritten_with(traced, mixed_tiers(traced.sites, exclude), ids, directory, precisions)
