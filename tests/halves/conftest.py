"""One run of a tiny T5 1.1: both halves, from config to engines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from calib.load import checkpoint_from_directory
from fptq_export.progress import NoProgress
from fptq_export.sites import read_sites
from fptq_export.tasks import SEQ2SEQ_DECODER
from fptq_export.trace import trace
from tests.support.models import model_once, tiny_t5
from tests.support.traced import Traced

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

HEAD_SEED, HEAD_SPREAD = 3, 0.15
HALVES = ("encoder", "decoder")
ORIGINAL = "decoder of the original"
"""ReLU MLP, and a head that is scaled and tied to the embedding."""
GRAPHS = (*HALVES, ORIGINAL)
SHORT = (
    *("--dtype", "fp32", "--calib-size", "4", "--calib-seq", "64", "--eval-windows", "1", "--eval-seq", "80"),
    *("--decode-steps", "4", "--eval-sentences", "9"),
)
"""Options of a short run; windows are longer than the prompt of the decode comparison."""
TIERS = ("--v0", "3", "--v1", "6")
"""Thresholds between the magnitudes of the tiny model's inputs, so that each half has all three tiers."""


@pytest.fixture(scope="session")
def t5_dir(make_model_dir: ModelDirFactory) -> Path:
    """T5 1.1 as its authors store it: config and transformers tie the head, but the file holds another one."""
    directory = model_once(make_model_dir, tiny_t5(gated=True))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    if "lm_head.weight" not in tensors:
        generator = torch.Generator().manual_seed(HEAD_SEED)
        head = torch.randn(tensors["shared.weight"].shape, generator=generator)
        tensors["lm_head.weight"] = head * HEAD_SPREAD
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="session")
def t5_run(t5_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with both halves, `out.encoder.plan` and `out.decoder.plan` beside it. Not to be changed: copy it."""
    from fptq_export.cli import main

    directory = tmp_path_factory.mktemp("t5")
    engine = ("--engine", str(directory / "out.plan"), "--compute-capability", "8.9")
    words = [str(t5_dir), "-o", str(directory / "run"), *engine, "--builder-optimization-level", "0", *SHORT, *TIERS]
    assert main(words) == 0
    logging.disable(logging.NOTSET)
    return directory / "run"


@pytest.fixture(scope="session")
def t5_graphs(t5_run: Path, t5_dir: Path, make_model_dir: ModelDirFactory) -> dict[str, Traced]:
    """Name -> traced graph in FP32: both halves of T5 1.1, and the decoder of the original T5."""
    original = model_once(make_model_dir, tiny_t5(gated=False))
    model, sites = (original.with_name(f"{original.name}-decoder") / name for name in ("model.onnx", "sites.json"))
    checkpoint = checkpoint_from_directory(original, "t5", task=SEQ2SEQ_DECODER)
    stored = {name: entry.stored for name, entry in checkpoint.tensors.items()}
    trace(checkpoint.config, stored, "fp32", model, sites, NoProgress(), task=SEQ2SEQ_DECODER)
    return {
        **{
            half: Traced(t5_run / half / "model.onnx", read_sites(t5_run / half / "sites.json"), t5_dir, "fp32")
            for half in HALVES
        },
        ORIGINAL: Traced(model, read_sites(sites), original, "fp32"),
    }
