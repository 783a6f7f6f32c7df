"""Policies of traced tiny models, and checkpoints written from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.interchange.write import WriteOptions, write_checkpoint
from calib.load import Checkpoint, checkpoint_from_directory, checkpoint_from_model
from fptq_export.policy import Policy, PolicyArrays
from fptq_export.progress import NoProgress
from fptq_export.sites import Sites
from tests.support.policies import measured_absmax, mixed_tiers, rtn_policy
from tests.support.quantized import QuantizedCheckpoint, write_quantized
from tests.support.traced import Traced

IDS = np.arange(48, dtype=np.int64).reshape(2, 24)
Tiers = Literal["mixed", "static", "equalized", "per_token"]


@dataclass(frozen=True)
class Decided:
    """A policy, its arrays and the model it belongs to."""

    checkpoint: Checkpoint
    sites: Sites
    policy: Policy
    arrays: PolicyArrays
    maxima: dict[str, NDArray[np.float32]]

    def write(self, directory: Path, **options: Any) -> Path:
        """Write it as a checkpoint; FP32 unless told otherwise."""
        directory.mkdir()
        wanted = WriteOptions(**{"dtype": "fp32", **options})
        write_checkpoint(self.checkpoint, self.sites, self.policy, self.arrays, directory, wanted)
        return directory


Decide = Callable[[str, Tiers], Decided]
ReadBack = Callable[[Path], Checkpoint]


@pytest.fixture
def decide(request: pytest.FixtureRequest, tmp_path: Path) -> Decide:
    """Give a function that makes a round-to-nearest policy for `llama`, `opt` or `gemma`."""

    def run(family: str, tiers: Tiers) -> Decided:
        traced: Traced = request.getfixturevalue(f"{family}_fp32")
        chosen = mixed_tiers(traced.sites)
        if tiers != "mixed":
            linears = [traced.sites.linear(path) for path in chosen]
            tier = "static" if tiers == "equalized" else tiers
            chosen = {x.path: "lae_static" if tiers == "equalized" and x.site else tier for x in linears}
        maxima = measured_absmax(traced, IDS)
        policy, arrays = rtn_policy(traced, tmp_path / "policy.json", chosen, maxima)
        return Decided(checkpoint_from_directory(traced.checkpoint, family), traced.sites, policy, arrays, maxima)

    return run


@pytest.fixture
def read_back(tmp_path: Path) -> ReadBack:
    """Give a function that opens a quantized checkpoint as a run does."""

    def read(directory: Path) -> Checkpoint:
        workdir = tmp_path / f"opened-{directory.name}"
        return checkpoint_from_model(str(directory), workdir=workdir, trust_remote_code=False, progress=NoProgress())

    return read


@pytest.fixture
def quantized(tiny_llama_dir: Path, tmp_path: Path) -> Callable[..., QuantizedCheckpoint]:
    """Give a function that writes the tiny LLaMA as a GPTQ or AWQ checkpoint of random codes."""

    def write(layout: str, group_size: int = 32) -> QuantizedCheckpoint:
        return write_quantized(tiny_llama_dir, tmp_path / layout, layout, group_size)

    return write


def logits(model: Any) -> NDArray[np.float32]:
    """Logits of `IDS`, float32."""
    with torch.inference_mode():
        values: NDArray[np.float32] = model(input_ids=torch.from_numpy(IDS)).logits.to(torch.float32).numpy()
    return values
