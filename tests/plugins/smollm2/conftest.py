"""The emulated kernels and a finished run of SmolLM2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugins.emulation.conftest import kernels as kernels
from tests.plugins.smollm2.real_linears import RealModel

TOKENS = 17


@pytest.fixture(scope="session")
def real_model(smollm2_run: Path, tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    """SmolLM2 with its policy, lowered for the plugin, and what its linears read for 17 tokens of text."""
    return RealModel(smollm2_run, tmp_path_factory.mktemp("smollm2-plugin"), TOKENS)
