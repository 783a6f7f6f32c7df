"""What the build process and its worker say to each other: one JSON object a line.

The job is the first line on the worker's standard input; the input then stays open, and its end tells the worker that
nobody waits for it any more. Events come back on the worker's standard output.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from fptq_export.build.profiles import Profile
from fptq_export.build.targets import Target

__all__ = [
    "Built",
    "Event",
    "Failed",
    "Job",
    "Progressed",
    "event_from_line",
    "job_from_line",
    "line_from_event",
    "line_from_job",
]


@dataclass(frozen=True)
class Job:
    """What the worker builds."""

    target: Target
    onnx_path: Path
    weights_path: Path
    """A path (of a file that need not exist) in the directory where external weights are looked up."""
    engine_path: Path
    """Where the worker writes; a temporary name."""
    log_path: Path
    """Name the log will have, for messages; the worker's standard error is that file."""
    profiles: tuple[Profile, ...]
    compute_capabilities: tuple[str, ...]
    optimization_level: int | None
    memory_pools: dict[str, int]
    """Member of `MemoryPoolType` -> bytes."""
    plugin_library: Path | None = None
    """Library of the plugins the graph needs."""
    embed_plugin: bool = False
    """Whether the engine is to carry it."""


@dataclass(frozen=True)
class Progressed:
    """How far the build is."""

    fraction: float
    """0 to 1; never falls."""
    kind: Literal["progressed"] = "progressed"


@dataclass(frozen=True)
class Failed:
    """The worker gave up; the fields of a `UserError`. Without a hint, the last errors of the log are the cause."""

    where: str
    cause: str
    hint: str
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Built:
    """The engine is written."""

    engine_bytes: int
    library_version: str
    peak_memory_bytes: int
    kind: Literal["built"] = "built"


Event: TypeAlias = Progressed | Failed | Built

_JOB = TypeAdapter(Job)
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def line_from_job(job: Job) -> bytes:
    """One line, with its end."""
    return _JOB.dump_json(job) + b"\n"


def job_from_line(line: bytes) -> Job:
    """Undo `line_from_job`."""
    return _JOB.validate_json(line)


def line_from_event(event: Event) -> bytes:
    """One line, with its end."""
    return _EVENT.dump_json(event) + b"\n"


def event_from_line(line: bytes) -> Event:
    """Undo `line_from_event`."""
    return _EVENT.validate_json(line)
