"""Models and versions in a model repository: each appears whole, or not at all.

A model or a version is put together beside the repository and then renamed into it, so that a server that polls never
sees half of one, and a killed command leaves what was there.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fptq_export.errors import UserError
from fptq_export.files import PARTIAL_SUFFIX, atomic_path, write_text
from fptq_export.triton.protobuf import config_from_text, text_from_config

__all__ = ["CONFIG_FILE", "ModelVersion", "next_version", "staging", "versions_of", "write_script", "write_version"]

CONFIG_FILE = "config.pbtxt"


@dataclass(frozen=True)
class ModelVersion:
    """A version of a model."""

    name: str
    config: Any
    """`model_config_pb2.ModelConfig` of that name."""
    version: int
    copies: Mapping[str, Path]
    """Name in the version's directory -> the file it is a copy of. A second name of the run's file would let a change
    there reach a model that serves, and data files with two names are refused (`graph_io`)."""
    texts: Mapping[str, str]
    """Name in the version's directory -> what the file says."""


def versions_of(model: Path) -> list[int]:
    """The versions of a model, the smallest first."""
    entries = model.iterdir() if model.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.is_dir() and entry.name.isdecimal())


def next_version(models: list[Path], wanted: int | None) -> int:
    """A version that none of the models has.

    Raises:
        UserError: One of them has the wanted version.
    """
    taken = {version for model in models for version in versions_of(model)}
    if wanted is None:
        return max(taken, default=0) + 1
    if wanted in taken:
        where = next(model for model in models if wanted in versions_of(model))
        hint = "leave out --version to take the next free one, or remove that version"
        raise UserError(str(where / str(wanted)), "this version is there already", hint)
    return wanted


@contextmanager
def staging(repository: Path) -> Iterator[Path]:
    """A directory on the repository's file system, which no server looks into; gone afterwards."""
    repository.parent.mkdir(parents=True, exist_ok=True)
    directory = repository.parent / f".{repository.name}{PARTIAL_SUFFIX}"
    shutil.rmtree(directory, ignore_errors=True)  # of a command that was killed
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def write_version(model: ModelVersion, repository: Path, scratch: Path) -> Path:
    """Add a version to a model, or a model to the repository; the version's directory.

    Args:
        model: What to write.
        repository: Where to.
        scratch: As `staging` gives it.

    Raises:
        UserError: The model that is there has a config that cannot be read, or is another kind of model.
    """
    target = repository / model.name
    staged = scratch / model.name
    files = staged / str(model.version)
    files.mkdir(parents=True)
    for name, source in model.copies.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(source, files / name)
    for name, text in model.texts.items():
        write_text(text, files / name)
    config = text_from_config(model.config)
    if not target.exists():
        write_text(config, staged / CONFIG_FILE)
        repository.mkdir(exist_ok=True)
        staged.rename(target)
    else:
        _check_kind(target, model.config)
        files.rename(target / str(model.version))
        if (target / CONFIG_FILE).read_text(encoding="utf-8") != config:
            write_text(config, target / CONFIG_FILE)
    return target / str(model.version)


def write_script(text: str, path: Path) -> None:
    """Write a script that can be executed."""
    with atomic_path(path) as partial:
        partial.write_text(text, encoding="utf-8")
    path.chmod(path.stat().st_mode | 0o111)


def _check_kind(target: Path, config: Any) -> None:
    path = target / CONFIG_FILE
    if not path.is_file():
        raise UserError(str(target), f"is there, and has no {CONFIG_FILE}", "choose another --name, or remove it")
    there = config_from_text(path.read_text(encoding="utf-8"), str(path))
    if (there.backend, there.platform) != (config.backend, config.platform):
        cause = f"is a model of backend {there.backend or there.platform!r}, not {config.backend!r}"
        raise UserError(str(target), cause, "choose another --name, or remove it")


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
