"""Runs stages that write files, and skips those whose inputs, options and outputs have not changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.files import remove_partial_files
from fptq_export.memory import PeakMemory
from fptq_export.package.manifest import (
    FileRecord,
    Manifest,
    StageRecord,
    key_from_parts,
    record_from_file,
    relative_name,
    write_manifest,
)

__all__ = ["Stage", "StageRunner"]


@dataclass(frozen=True)
class Stage:
    """One arrow of the road.

    Attributes:
        name: What the manifest calls it.
        parts: Options and versions its result depends on.
        inputs: Files it reads.
        outputs: Files it writes, each under a temporary name first.
        run: Does the work; returns figures for the summary.
        edited_output: An output that people edit, with the option that takes it back in.
    """

    name: str
    parts: Mapping[str, Any]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    run: Callable[[], Mapping[str, Any]]
    edited_output: tuple[Path, str] | None = None


class StageRunner:
    """Runs stages in the order they are given and keeps the manifest.

    A stage is skipped when its key (options, tool version, hashes of its inputs) and its outputs are those the manifest
    records. A record is dropped before its stage starts and written after it ends, so a run that is killed in between
    starts that stage again.

    Args:
        directory: Run directory; the manifest lies in it.
        manifest: What is known so far.
        console: Where skipped stages are reported.
    """

    def __init__(self, directory: Path, manifest: Manifest, console: Console) -> None:
        self._directory = directory
        self._console = console
        self._producers: dict[Path, Stage] = {}
        self.manifest = manifest
        self.running_key = ""
        """Key of the stage that runs: what it leaves unfinished belongs to it."""

    def run(self, stage: Stage) -> StageRecord:
        """Run a stage, or skip it. Returns its record."""
        self._producers.update(dict.fromkeys(stage.outputs, stage))
        inputs = tuple(self._input_record(stage, path) for path in stage.inputs)
        key = self._key(stage, inputs)
        known = self.manifest.stages.get(stage.name)
        if known is not None:
            if known.key == key and self._intact(known):
                self._console.print(f"{stage.name}: up to date", style="dim")
                return known
            self._refuse_to_overwrite_an_edit(stage, known)
        return self._execute(stage, inputs, key)

    def skip(self, name: str) -> None:
        """Forget a stage that this run does not have."""
        if name in self.manifest.stages:
            self._save({other: record for other, record in self.manifest.stages.items() if other != name})

    def wrote(self, name: str, path: Path) -> bool:
        """Whether the manifest records a file among the outputs of a stage."""
        record = self.manifest.stages.get(name)
        return record is not None and any(file.path == relative_name(path, self._directory) for file in record.outputs)

    def remove_outputs(self, name: str, paths: tuple[Path, ...]) -> None:
        """Remove files of a finished stage; the manifest says that this was on purpose."""
        names = {relative_name(path, self._directory) for path in paths}
        record = self.manifest.stages[name]
        outputs = tuple(
            file.model_copy(update={"removed": True}) if file.path in names else file for file in record.outputs
        )
        self._save({**self.manifest.stages, name: record.model_copy(update={"outputs": outputs})})
        for path in paths:
            path.unlink(missing_ok=True)

    def _key(self, stage: Stage, inputs: tuple[FileRecord, ...]) -> str:
        hashes = {file.path: file.sha256 for file in inputs}
        outputs = [relative_name(path, self._directory) for path in stage.outputs]
        parts = {"stage": stage.name, "tool": __version__, "parts": stage.parts, "inputs": hashes, "outputs": outputs}
        return key_from_parts(parts)

    def _input_record(self, stage: Stage, path: Path) -> FileRecord:
        name = relative_name(path, self._directory)
        written = self._written_by_another(stage, name)
        if not path.exists():
            if written is not None and written.removed:
                return written
            raise UserError(
                str(path), f"{stage.name} needs this file and it is missing", "run the stage that writes it"
            )
        if written is not None and not self._is_intact(written):
            hint = "replay it with --policy" if path.suffix == ".json" else "run the stage that writes it again"
            raise UserError(
                str(path), "was changed since this tool wrote it, and other files belong to what it was", hint
            )
        return record_from_file(path, self._directory, written or self._read_before(name))

    def _read_before(self, name: str) -> FileRecord | None:
        """The latest record of a file that a stage has read: weights of many gigabytes are hashed once, not by each."""
        records = [file for record in self.manifest.stages.values() for file in record.inputs if file.path == name]
        return max(records, key=lambda file: file.modified_ns, default=None)

    def _written_by_another(self, stage: Stage, name: str) -> FileRecord | None:
        """The record of an input that another stage wrote; a policy that is replayed in place is its own output."""
        for other, record in self.manifest.stages.items():
            for file in record.outputs:
                if file.path == name and other != stage.name:
                    return file
        return None

    def _intact(self, record: StageRecord) -> bool:
        return all(self._is_intact(file) for file in record.outputs)

    def _is_intact(self, file: FileRecord) -> bool:
        path = self._directory / file.path
        if not path.exists():
            return file.removed
        return record_from_file(path, self._directory, file).sha256 == file.sha256

    def _refuse_to_overwrite_an_edit(self, stage: Stage, record: StageRecord) -> None:
        if stage.edited_output is None:
            return
        path, option = stage.edited_output
        file = next(file for file in record.outputs if file.path == relative_name(path, self._directory))
        if path.exists() and not self._is_intact(file):
            raise UserError(
                str(path),
                "was changed since this tool wrote it, and this run would overwrite the change",
                f"to use it: {option} {path}; to drop it: delete the file",
            )

    def _execute(self, stage: Stage, inputs: tuple[FileRecord, ...], key: str) -> StageRecord:
        self._write_missing_inputs(stage)
        self._save({name: record for name, record in self.manifest.stages.items() if name != stage.name})
        remove_partial_files(self._directory)
        for path in set(stage.outputs) - set(stage.inputs):
            path.unlink(missing_ok=True)
        self.running_key = key
        started = time.monotonic()
        with PeakMemory() as memory:
            summary = stage.run()
        record = StageRecord(
            key=key,
            inputs=inputs,
            outputs=tuple(record_from_file(path, self._directory) for path in stage.outputs),
            seconds=time.monotonic() - started,
            peak_memory_bytes=memory.bytes,
            summary=dict(summary),
        )
        self._save({**self.manifest.stages, stage.name: record})
        return record

    def _write_missing_inputs(self, stage: Stage) -> None:
        """Run the stages again whose outputs were removed on purpose and are needed now."""
        for path in stage.inputs:
            if not path.exists():
                producer = self._producers[path]
                self._execute(
                    producer, self.manifest.stages[producer.name].inputs, self.manifest.stages[producer.name].key
                )

    def _save(self, stages: Mapping[str, StageRecord]) -> None:
        self.manifest = self.manifest.model_copy(update={"stages": dict(stages)})
        write_manifest(self.manifest, self._directory)
