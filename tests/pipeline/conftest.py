"""One finished run of the whole road on a tiny model, and a command line to run more."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fptq_export.cli import main

SMALL = ("--calib-size", "2", "--calib-seq", "64", "--eval-windows", "1", "--eval-seq", "80", "--decode-steps", "4")
"""Enough for every code path. The window is longer than the prompt of the decode comparison."""
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


@pytest.fixture(scope="session")
def finished_run(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run/` and `out.plan` of the tiny LLaMA, in one directory. Not to be changed: copy it."""
    directory = tmp_path_factory.mktemp("finished")
    run, engine = directory / "run", directory / "out.plan"
    assert main([str(tiny_llama_dir), "-o", str(run), "--engine", str(engine), *SMALL]) == 0
    logging.disable(logging.NOTSET)
    return directory


@pytest.fixture
def run_copy(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change; the manifest still names the engine of the original."""
    return Path(shutil.copytree(finished_run / "run", tmp_path / "run"))
