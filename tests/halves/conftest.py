"""One run of each half of a tiny T5 and Whisper, and of the language half of a tiny LLaVA, from config to engines."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fptq_export.sites import read_sites
from tests.families.registry import HALVES as FAMILIES_OF_HALVES
from tests.families.registry import SPEECH_HALVES
from tests.support.models import model_once, tiny_t5, tiny_whisper
from tests.support.traced import Traced
from tests.support.vision_language import tiny_llava

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

HEAD_SEED, HEAD_SPREAD = 3, 0.15
HALVES = ("encoder", "decoder")
FAMILY_OF_HALF = dict(zip(HALVES, FAMILIES_OF_HALVES, strict=True))
"""Half -> its row of the support table."""
SPEECH_FAMILY_OF_HALF = dict(zip(HALVES, SPEECH_HALVES, strict=True))
SHORT = ("--dtype", "fp32", "--calib-size", "4", "--calib-seq", "64", "--eval-seq", "80")
"""Options of a short run; windows are longer than the prompt of the decode comparison."""
OF_HALF = {"encoder": ("--eval-sentences", "9"), "decoder": ("--eval-windows", "1", "--decode-steps", "4")}
TIERS = ("--v0", "3", "--v1", "6")
"""Thresholds between the magnitudes of the tiny model's inputs, so that each half has all three tiers."""
TIERS_OF_WHISPER = ("--v0", "3.7", "--v1", "6")
TIERS_OF_LLAVA = ("--v0", "4", "--v1", "6")


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
def half_dirs(t5_dir: Path, make_model_dir: ModelDirFactory) -> dict[str, Path]:
    """Half -> the model it is exported from: the encoder is that of the original T5, whose MLP has a ReLU.

    Two traces, as of one model, show what is special about either.
    """
    return {"encoder": model_once(make_model_dir, tiny_t5(gated=False)), "decoder": t5_dir}


@pytest.fixture(scope="session")
def t5_run(half_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with both halves, `out.encoder.plan` and `out.decoder.plan` beside it. Not to be changed: copy it."""
    from fptq_export.cli import main

    directory = tmp_path_factory.mktemp("t5")
    engine = ("--compute-capability", "8.9", "--builder-optimization-level", "0")
    for half, model in half_dirs.items():
        words = [str(model), "--task", f"seq2seq-{half}", "-o", str(directory / "run" / half), *engine]
        plan = directory / f"out.{half}.plan"
        assert main([*words, "--engine", str(plan), *SHORT, *OF_HALF[half], *TIERS]) == 0
        logging.disable(logging.NOTSET)
    return directory / "run"


@pytest.fixture(scope="session")
def whisper_dir(make_model_dir: ModelDirFactory) -> Path:
    """A tiny Whisper."""
    return model_once(make_model_dir, tiny_whisper())


@pytest.fixture(scope="session")
def features_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six windows of features and their texts."""
    random = np.random.default_rng(0)
    ids = random.integers(3, 512, (6, 20))
    ids[:, 0] = tiny_whisper().decoder_start_token_id
    file = tmp_path_factory.mktemp("features") / "features.npz"
    np.savez(file, input_features=random.standard_normal((6, 16, 24), np.float32), decoder_input_ids=ids)
    return file


@pytest.fixture(scope="session")
def whisper_run(whisper_dir: Path, features_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` with both halves of Whisper, made by one command. Not to be changed: copy it."""
    from fptq_export.cli import main

    directory = tmp_path_factory.mktemp("whisper")
    words = [str(whisper_dir), "-o", str(directory / "run"), "--engine", str(directory / "out.plan"), "--dtype", "fp32"]
    engine = ("--compute-capability", "8.9", "--builder-optimization-level", "0")
    data = ("--calib-data", str(features_file), "--decode-steps", "4")
    assert main([*words, *engine, *data, *TIERS_OF_WHISPER]) == 0
    logging.disable(logging.NOTSET)
    return directory / "run"


@pytest.fixture(scope="session")
def whisper_graphs(whisper_run: Path, whisper_dir: Path) -> dict[str, Traced]:
    """Half -> its traced graph in FP32."""
    return {
        half: Traced(
            whisper_run / half / "model.onnx", read_sites(whisper_run / half / "sites.json"), whisper_dir, "fp32"
        )
        for half in HALVES
    }


@pytest.fixture(scope="session")
def llava_dir(make_model_dir: ModelDirFactory) -> Path:
    """A tiny LLaVA."""
    return model_once(make_model_dir, tiny_llava())


@pytest.fixture(scope="session")
def llava_run(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` of the language half of LLaVA, `out.plan` beside it. Not to be changed: copy it."""
    from fptq_export.cli import main

    directory = tmp_path_factory.mktemp("llava")
    engine = ("--engine", str(directory / "out.plan"), "--compute-capability", "8.9")
    words = (str(llava_dir), "-o", str(directory / "run"), *engine, "--builder-optimization-level", "0")
    assert main([*words, *SHORT, *OF_HALF["decoder"], *TIERS_OF_LLAVA]) == 0
    logging.disable(logging.NOTSET)
    return directory / "run"


@pytest.fixture(scope="session")
def llava_graph(llava_run: Path, llava_dir: Path) -> Traced:
    """Its traced graph in FP32."""
    return Traced(llava_run / "model.onnx", read_sites(llava_run / "sites.json"), llava_dir, "fp32")


@pytest.fixture(scope="session")
def t5_graphs(t5_run: Path, half_dirs: dict[str, Path]) -> dict[str, Traced]:
    """Half -> its traced graph in FP32."""
    return {
        half: Traced(t5_run / half / "model.onnx", read_sites(t5_run / half / "sites.json"), model, "fp32")
        for half, model in half_dirs.items()
    }
