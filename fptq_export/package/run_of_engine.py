"""Which run an engine comes from: the manifest that names it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fptq_export.errors import UserError
from fptq_export.files import sha256_from_file
from fptq_export.package.manifest import MANIFEST_FILE, FileRecord, Manifest, read_manifest

__all__ = ["BUILD", "EngineRun", "engines_of_run", "recorded", "run_of_engine", "search_places"]

BUILD = "build"
"""The stage that writes engines."""
_BESIDE_AN_ENGINE = frozenset({"build.log", "proof.json"})
"""What else that stage writes."""


@dataclass(frozen=True)
class EngineRun:
    """The run directory whose manifest names an engine."""

    directory: Path
    manifest: Manifest
    record: FileRecord
    """Of the engine, in the manifest."""
    sha256: str
    """Of the engine as it is now."""

    @property
    def is_same(self) -> bool:
        """Whether the file is the one that was recorded."""
        return self.sha256 == self.record.sha256


def run_of_engine(engine: Path, directory: Path | None = None) -> EngineRun | None:
    """Find the manifest that names an engine: by its hash, else by its name.

    Args:
        engine: The engine's file.
        directory: The run directory, or one that holds a copy of its manifest; by default the engine's directory and
            the directories in it are looked through.

    Raises:
        UserError: A manifest that could be the engine's cannot be read, or `directory` has none that names an engine.
    """
    places = search_places(engine) if directory is None else [directory]
    sha256 = sha256_from_file(engine) if places else ""
    found: list[EngineRun] = []
    unreadable: list[UserError] = []
    for place in places:
        try:
            manifest = read_manifest(place)
        except UserError as error:
            unreadable.append(error)
            continue
        if manifest is not None:
            found += [EngineRun(place, manifest, record, sha256) for record in engines_of_run(manifest)]
    for match in (*(run for run in found if run.is_same), *(run for run in found if _named(run) == engine.name)):
        return match
    if unreadable:
        raise unreadable[0]
    if directory is not None:
        if found:
            return found[0]
        raise UserError(str(directory), f"has no {MANIFEST_FILE} that names an engine", "give the run directory")
    return None


def recorded(run: EngineRun, name: str) -> FileRecord | None:
    """What the stage that built the engine recorded of a file of the run directory that it read or wrote."""
    stage = run.manifest.stages[BUILD]
    return next((file for file in (*stage.inputs, *stage.outputs) if file.path == name), None)


def search_places(engine: Path) -> list[Path]:
    """Directories with a manifest: the engine's own, and those in it."""
    parent = engine.absolute().parent
    return [place for place in (parent, *sorted(parent.iterdir())) if (place / MANIFEST_FILE).is_file()]


def engines_of_run(manifest: Manifest) -> Iterator[FileRecord]:
    """The engines that a run built; their paths are relative to its directory."""
    stage = manifest.stages.get(BUILD)
    for file in stage.outputs if stage is not None else ():
        if Path(file.path).name not in _BESIDE_AN_ENGINE:
            yield file


def _named(run: EngineRun) -> str:
    return Path(run.record.path).name
