"""A command line to run the road with, and copies of a finished run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fptq_export.cli import main
from tests.support.models import SMALL

__all__ = ["FILES", "SMALL", "Command", "Outcome"]

FILES = frozenset(
    {
        "build.log",
        "proof.json",
        "generation_config.json",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "model.qdq.onnx",
        "model.w4a8.onnx",
        "model.w4a8.onnx.data",
        "policy.json",
        "policy.safetensors",
        "sites.json",
        "stats.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "verify.json",
    }
)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """The command line silences libraries for its process; tests share one."""
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command line in this process."""

    def run(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(int(code), captured.out, captured.err)

    return run


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change; the manifest still names the engine of the original."""
    return Path(shutil.copytree(finished_run / "run", tmp_path / "run"))
