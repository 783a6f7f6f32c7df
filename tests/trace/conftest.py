"""Tiny random models, each traced once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.models import model_once, tiny_gemma
from tests.support.traced import Traced, traced_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]


@pytest.fixture(scope="session")
def gemma_fp16(make_model_dir: ModelDirFactory) -> Traced:
    """Norms that multiply by 1 + w, tied head; one layer."""
    return traced_once(model_once(make_model_dir, tiny_gemma()), "fp16")
