"""What a session is opened on: a run directory, an engine or a graph; and which backend runs it here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fptq_export.doctor.machine import machine_of_here
from fptq_export.doctor.plan import PlanQuestion, report_on_plan
from fptq_export.errors import UserError
from fptq_export.package.manifest import Manifest, manifest_of_run, read_manifest
from fptq_export.package.run_of_engine import engines_of_run, run_of_engine
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.range_outputs import RangeOutputs, read_range_outputs
from fptq_export.runtime.engine_session import engine_problem
from fptq_export.runtime.limits import Limits
from fptq_export.tasks import CAUSAL_LM

__all__ = ["Backend", "Choice", "Source", "backend_for", "limits_of", "ranges_of_source", "source_from_path"]

Backend = Literal["onnxruntime", "tensorrt"]
_GRAPH = ".onnx"


@dataclass(frozen=True)
class Source:
    """Files that belong together."""

    directory: Path
    """Has the tokenizer."""
    graph: Path
    """The portable graph; it need not be there."""
    engine: Path | None = None
    manifest: Manifest | None = None
    """None for a graph without a run."""


@dataclass(frozen=True)
class Choice:
    """A backend, and why not the engine."""

    backend: Backend
    note: str = ""


def source_from_path(path: Path, engine: Path | None = None) -> Source:
    """Find what belongs to a run directory, an engine or a graph.

    Args:
        path: One of the three.
        engine: Another engine of that run than the last one built.

    Raises:
        UserError: There is no such file, no run that the engine is of, or the run is not of a causal language model.
    """
    if path.is_dir():
        manifest = manifest_of_run(path)
        built = [path / record.path for record in engines_of_run(manifest)]
        source = Source(path, RunDirectory(path).w4a8, engine or (built[0] if built else None), manifest)
    elif not path.is_file():
        raise UserError(str(path), "no such file", "give a run directory, an engine, or an ONNX graph")
    elif path.suffix == _GRAPH:
        source = Source(path.parent, path, engine, read_manifest(path.parent))
    else:
        run = run_of_engine(path)
        if run is None:
            raise UserError(
                str(path), "no manifest beside it names it", "give its run directory, and the engine with it"
            )
        source = Source(run.directory, RunDirectory(run.directory).w4a8, path, run.manifest)
    _check_task(source)
    return source


def backend_for(source: Source, wanted: Backend | Literal["auto"]) -> Choice:
    """What runs the model here: the engine if there is one and a GPU, else ONNX Runtime, which is then said.

    Raises:
        UserError: The engine is wanted and cannot run here, or a GPU is here and the engine will not load on it.
    """
    if wanted == "onnxruntime":
        return Choice("onnxruntime")
    reason = _engine_reason(source)
    if reason is not None:
        if wanted == "tensorrt":
            hint = 'leave backend at "auto" to run the portable graph in ONNX Runtime'
            raise UserError(str(source.engine or source.directory), reason, hint)
        return Choice("onnxruntime", reason)
    if source.engine is None:
        raise AssertionError("an engine that is not there has a reason")
    report = report_on_plan(PlanQuestion(source.engine, source.directory), machine_of_here())
    for check in report.checks:
        if check.status == "problem":
            raise UserError(str(source.engine), check.text, check.fix)
    return Choice("tensorrt")


def limits_of(source: Source) -> Limits:
    """What the run of a graph was asked for, which its engines take."""
    if source.manifest is None:
        return Limits()
    options = source.manifest.options
    return Limits(options.max_input_len, options.max_kv_len, options.max_batch_size)


def ranges_of_source(source: Source) -> RangeOutputs | None:
    """What the rows of the output `range_monitor` are; None where the run was not asked for one.

    Raises:
        UserErrors: `range_outputs.json` was changed.
    """
    path = RunDirectory(source.directory).range_outputs
    return read_range_outputs(path) if path.is_file() else None


def _check_task(source: Source) -> None:
    task = source.manifest.options.task if source.manifest is not None else "auto"
    if task not in ("auto", CAUSAL_LM):
        cause = f"is a run of a {task}, which writes no text by itself"
        raise UserError(str(source.directory), cause, "give the run of a causal language model")


def _engine_reason(source: Source) -> str | None:
    if source.manifest is None:
        return "it is a graph without a run directory, which would name an engine"
    return engine_problem(source.manifest, source.engine)
