"""The sections about the run itself: the proof of precision, calibration data, environment, command."""

from __future__ import annotations

import json
from collections.abc import Iterator

from fptq_export.pipeline.road import ROAD
from fptq_export.pipeline.summary import engine_rows
from fptq_export.report.blocks import Block, Cell, Code, Column, Missing, Section, Table, Text
from fptq_export.report.documents import RunDocuments
from fptq_export.report.numbers import number
from fptq_export.report.proof_blocks import proof_blocks

__all__ = ["calibration_section", "command_section", "environment_section", "proof_section"]

_GIB = 1 << 30


def proof_section(documents: RunDocuments) -> Section:
    """What the engine's layer list shows."""
    rows = engine_rows(documents.manifest)
    if not rows:
        text = "No engine was built, and the proof is read from an engine's own layer list."
        blocks: tuple[Block, ...] = (Missing(text, documents.command("build", "--engine", "out.plan")),)
    else:
        words = (
            "TensorRT wrote the list of layers that it built. Every quantized layer of the policy was looked up in it,"
            " with the type of its weights; a layer that is missing, or has another type, stops the build."
        )
        table = Table.of_texts("table-proof", "The engine's layer list", ("what", "value"), rows)
        proof = documents.proof
        missing = Missing("There is no proof of each layer.", documents.command("build", "--engine", "out.plan"))
        blocks = (Text(words), table, *(proof_blocks(proof) if proof is not None else (missing,)))
    return Section("proof", "Proof of precision", blocks)


def calibration_section(documents: RunDocuments) -> Section:
    """What the ranges come from."""
    record, options = documents.manifest.stages.get("calibrate"), documents.manifest.options
    if record is None:
        text = "Nothing was calibrated in this run: the policy was given, or the run did not get that far."
        blocks: tuple[Block, ...] = (Missing(text, documents.command_from_model("calibrate")),)
    else:
        rows = [(name.replace("_", " "), _words(value)) for name, value in record.summary.items()]
        rows += [("range of a static scale", options.range_calibrator), ("seed", str(options.seed))]
        blocks = (Table.of_texts("table-calibration", "Calibration data", ("what", "value"), rows),)
    return Section("calibration", "Calibration data", blocks)


def environment_section(documents: RunDocuments) -> Section:
    """Versions, times and memory."""
    rows = [("fptq-export", documents.manifest.tool_version), *documents.manifest.environment.items()]
    stages = documents.manifest.stages
    columns = (Column("stage"), Column("seconds", numeric=True), Column("peak memory, GiB", numeric=True))
    times = tuple(
        (Cell(name), number(stages[name].seconds, ".1f"), number(stages[name].peak_memory_bytes / _GIB, ".2f"))
        for name in ROAD
        if name in stages
    )
    tables = [Table.of_texts("table-environment", "Versions of what took part", ("what", "version"), rows)]
    if times:
        tables.append(Table("table-stages", "Time and peak memory of each stage", columns, times))
    return Section("environment", "Environment", tuple(tables))


def command_section(documents: RunDocuments) -> Section:
    """What to type to get this run again."""
    options = documents.manifest.options
    given = [(name, _words(value)) for name, value in _changed(documents)]
    blocks: list[Block] = [
        Text(f"The command that wrote this run last, for {options.model}:"),
        Code(documents.manifest.command),
    ]
    if given:
        rows = [(f"--{name.replace('_', '-')}", value) for name, value in given]
        blocks.append(Table.of_texts("table-options", "Options that are not the default", ("option", "value"), rows))
    return Section("command", "Command", tuple(blocks))


def _changed(documents: RunDocuments) -> Iterator[tuple[str, object]]:
    options = documents.manifest.options
    for name, field in type(options).model_fields.items():
        value = getattr(options, name)
        if value != field.default:
            yield name, value


def _words(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return json.dumps(value, default=str)
