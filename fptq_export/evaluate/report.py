"""`eval.json`: what was measured of which system."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from fptq_export.evaluate.options import System
from fptq_export.verify.perplexity import PerplexityFigures

__all__ = [
    "EVAL_SCHEMA_VERSION",
    "EvalReport",
    "MetricFigures",
    "MetricResult",
    "SystemRecord",
    "TaskResult",
    "TextResult",
]

EVAL_SCHEMA_VERSION: Literal[1] = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SystemRecord(_Model):
    """One way of running the model."""

    system: System
    runs: str
    """What computed the logits: library, precision and file."""
    files: dict[str, str]
    """SHA-256 of the files that define it, by path; empty for a model that is no run directory."""
    seconds: float
    """From loading to the last figure."""
    peak_memory_bytes: int
    """Largest resident memory of the process meanwhile; memory that an earlier system left is included."""


class TextResult(_Model):
    """Perplexity of one text, window by window without overlap; a window's first token is not predicted."""

    source: str
    description: str
    sha256: str
    """Of the token ids: equal texts have equal hashes."""
    windows: PositiveInt
    window_tokens: PositiveInt
    perplexity: dict[System, PerplexityFigures]


class MetricFigures(_Model):
    """A metric of one system."""

    value: float
    stderr: float | None
    """Standard error over the documents as lm-eval computes it; null where it has none for the metric."""


class MetricResult(_Model):
    """A metric of a task or group."""

    metric: str
    filter: str
    """Which of the task's ways of reading an answer; `none` for most."""
    higher_is_better: bool | None
    figures: dict[System, MetricFigures]


class TaskResult(_Model):
    """A task, or a group of tasks, of lm-evaluation-harness."""

    task: str
    is_group: bool
    version: str | None
    num_fewshot: NonNegativeInt | None
    documents: PositiveInt
    """Documents evaluated."""
    metrics: tuple[MetricResult, ...]


class EvalReport(_Model):
    """`eval.json`. Written again after each system, so that an interrupted run keeps what it measured."""

    schema_version: Literal[1] = EVAL_SCHEMA_VERSION
    tool_version: str
    command: str
    environment: dict[str, str]
    """Versions of Python and of the libraries that took part."""
    model: str
    max_length: PositiveInt
    """Longest input of a task in tokens."""
    seed: NonNegativeInt
    limit: PositiveInt | None
    """Documents a task was cut to; such figures compare with nothing but each other."""
    systems: tuple[SystemRecord, ...]
    texts: tuple[TextResult, ...]
    tasks: tuple[TaskResult, ...]
