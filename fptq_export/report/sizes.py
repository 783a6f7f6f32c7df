"""How many bytes the files of a run have, as its manifest recorded them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.report.documents import RunDocuments

__all__ = ["Sizes", "sizes_from_run"]


@dataclass(frozen=True)
class Sizes:
    """Bytes; None where the file was not written."""

    model: int | None
    """The traced graph with its weights."""
    quantized: int | None
    """`model.w4a8.onnx` with its weights."""
    engine: int | None


def sizes_from_run(documents: RunDocuments) -> Sizes:
    """Sizes of what the stages wrote, also of files that `--no-keep` removed."""
    files, engine = RunDirectory(documents.directory), documents.manifest.options.engine
    return Sizes(
        _bytes(documents, "trace", files.model.name, f"{files.model.name}.data"),
        _bytes(documents, "rewrite", files.w4a8.name, f"{files.w4a8.name}.data"),
        _bytes(documents, "build", engine.name) if engine is not None else None,
    )


def _bytes(documents: RunDocuments, stage: str, *names: str) -> int | None:
    record = documents.manifest.stages.get(stage)
    outputs = record.outputs if record is not None else ()
    return sum(file.bytes for file in outputs if Path(file.path).name in names) or None
