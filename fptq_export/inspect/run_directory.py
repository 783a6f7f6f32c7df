"""What a run directory holds: what was asked, what each stage wrote, and whether that is still so."""

from __future__ import annotations

from pathlib import Path

from fptq_export.inspect.engine_file import inspect_engine
from fptq_export.inspect.policy_file import sections_from_policy
from fptq_export.inspect.report import Cell, Inspection, Section
from fptq_export.package.manifest import FileRecord, Manifest, manifest_of_run, record_from_file
from fptq_export.package.run_of_engine import engines_of_run
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.policy import read_policy

__all__ = ["inspect_run"]

_MIB = 1 << 20


def inspect_run(directory: Path) -> Inspection:
    """Look at a run directory. Files are hashed anew where size or time is not what was recorded.

    Raises:
        UserError: It has no manifest, or a file in it cannot be read.
    """
    manifest = manifest_of_run(directory)
    sections, problems = [_about(manifest), _files(manifest)], _changes(manifest, directory)
    precision: tuple[str, ...] = ()
    policy = RunDirectory(directory).policy
    if policy.is_file():
        sections += sections_from_policy(read_policy(policy))
    for record in engines_of_run(manifest):
        engine = directory / record.path
        if engine.is_file():
            looked = inspect_engine(engine, directory)
            sections += looked.sections
            precision += looked.precision_problems
            problems += looked.file_problems
    return Inspection(
        path=str(directory),
        kind="run",
        sections=tuple(sections),
        precision_problems=precision,
        file_problems=tuple(dict.fromkeys(problems)),
    )


def _about(manifest: Manifest) -> Section:
    rows: list[tuple[Cell, ...]] = [
        ("command", manifest.command),
        ("model", manifest.options.model),
        ("written by", f"fptq-export {manifest.tool_version}"),
        *((name, version) for name, version in manifest.environment.items()),
    ]
    return Section(name="about", title="run", columns=("what", "value"), rows=tuple(rows))


def _files(manifest: Manifest) -> Section:
    rows = tuple(
        (stage, file.path, "removed on purpose" if file.removed else f"{file.bytes / _MIB:.2f} MiB")
        for stage, record in manifest.stages.items()
        for file in record.outputs
    )
    return Section(
        name="files", title="files, by the stage that wrote them", columns=("stage", "file", "size"), rows=rows
    )


def _changes(manifest: Manifest, directory: Path) -> list[str]:
    """Files that are not what the manifest says, and hashes on which two of its stages disagree."""
    problems = []
    written: dict[str, FileRecord] = {}
    for stage, record in manifest.stages.items():
        for file in record.outputs:
            written[file.path] = file
            path = directory / file.path
            if file.removed:
                continue
            if not path.is_file():
                problems.append(f"{path}: is missing; {stage} wrote it")
            elif record_from_file(path, directory, file).sha256 != file.sha256:
                problems.append(f"{path}: is not what {stage} wrote (SHA-256): it, or the manifest, was changed")
    for stage, record in manifest.stages.items():
        for file in record.inputs:
            known = written.get(file.path)
            if known is not None and known.sha256 != file.sha256:
                problems.append(f"{directory / file.path}: has changed since {stage} read it")
    return problems
