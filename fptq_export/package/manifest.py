"""`manifest.json`: what a run was asked, what it wrote, from what, and how long that took.

It is also what a run resumes from: a stage whose key and outputs are unchanged is not run again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fptq_export.errors import UserError
from fptq_export.files import read_json_model, sha256_from_file, write_json_model
from fptq_export.options import RunOptions

__all__ = [
    "FileRecord",
    "Manifest",
    "StageRecord",
    "key_from_parts",
    "manifest_of_run",
    "read_manifest",
    "record_from_file",
    "write_manifest",
]

MANIFEST_FILE = "manifest.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Model):
    """A file a stage read or wrote."""

    path: str
    """Relative to the directory of the manifest where it lies inside, else absolute."""
    bytes: int
    modified_ns: int
    """Modification time; a file with the same size and time is not hashed again."""
    sha256: str
    removed: bool = False
    """Removed on purpose by `--no-keep`; written again only if a later stage needs it."""


class StageRecord(_Model):
    """One finished stage."""

    key: str
    """SHA-256 over the options the stage depends on and the hashes of its inputs."""
    inputs: tuple[FileRecord, ...]
    outputs: tuple[FileRecord, ...]
    seconds: float
    peak_memory_bytes: int
    """Largest resident memory of the process and its children while the stage ran."""
    summary: dict[str, Any] = Field(default_factory=dict)
    """Figures the summary table prints."""


class Manifest(_Model):
    """`manifest.json`."""

    schema_version: Literal[1] = 1
    tool_version: str
    command: str
    options: RunOptions
    environment: dict[str, str]
    """Versions of Python and of the libraries that took part."""
    stages: dict[str, StageRecord] = Field(default_factory=dict)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a run directory, or None when there is none.

    Raises:
        UserError: It is there and cannot be read.
    """
    path = directory / MANIFEST_FILE
    return read_json_model(path, Manifest) if path.is_file() else None


def manifest_of_run(directory: Path) -> Manifest:
    """The manifest of a directory that must be a run's.

    Raises:
        UserError: It has none, or one that cannot be read.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        cause, hint = f"is not a run directory (no {MANIFEST_FILE})", "give the DIR of an earlier fptq-export -o DIR"
        raise UserError(str(directory), cause, hint)
    return manifest


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Write `manifest.json` in one step."""
    write_json_model(manifest, directory / MANIFEST_FILE)


def key_from_parts(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `parts`."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record_from_file(path: Path, directory: Path, known: FileRecord | None = None) -> FileRecord:
    """Record a file; the hash of `known` is reused when size and modification time are the same."""
    status = path.stat()
    unchanged = known is not None and (known.bytes, known.modified_ns) == (status.st_size, status.st_mtime_ns)
    return FileRecord(
        path=relative_name(path, directory),
        bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        sha256=known.sha256 if known is not None and unchanged else sha256_from_file(path),
    )


def relative_name(path: Path, directory: Path) -> str:
    """`path` relative to `directory` when it lies inside, else absolute."""
    path, directory = path.absolute(), directory.absolute()
    return str(path.relative_to(directory)) if path.is_relative_to(directory) else str(path)
