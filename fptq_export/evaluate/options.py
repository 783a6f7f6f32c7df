"""What an evaluation is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

__all__ = ["SYSTEMS", "EvalOptions", "System"]

System = Literal["float", "fake-quant", "onnx"]
SYSTEMS: tuple[System, ...] = get_args(System)
"""In the order they run and are printed; ratios are to the first."""


class EvalOptions(BaseModel):
    """Options of `fptq-export eval`, checked; `eval_seq` is `--eval-seq`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """A run directory, or a model: Hugging Face directory, hub id or `.gguf` file."""
    output: Path | None = None
    """Where `eval.json` goes; None is the run directory, or `NAME-eval`."""
    systems: tuple[System, ...] | None = Field(default=None, min_length=1)
    """None takes all that the source has."""
    text: tuple[str, ...] = ("builtin",)
    """Texts for perplexity: `builtin` (held out), `.txt`, `.jsonl` or `.npz` files, data set ids. May be empty."""
    eval_windows: NonNegativeInt = 8
    """Windows of each text; 0 takes all."""
    eval_seq: int = Field(default=512, ge=2)
    """Tokens a window."""
    tasks: tuple[str, ...] = ()
    """Tasks, groups and tags of lm-evaluation-harness."""
    task_path: Path | None = None
    """Directory with task files (YAML) of the user's own."""
    num_fewshot: NonNegativeInt | None = None
    """Solved examples before each question; None leaves it to the task."""
    limit: PositiveInt | None = None
    """Documents of each task, from the first on; None takes all."""
    max_length: int | None = Field(default=None, ge=2)
    """Longest input of a task in tokens; None takes the model's own limit, at most 2048."""
    seed: NonNegativeInt = 0
    """Choice of solved examples, and order of data sets."""
    trust_remote_code: bool = False
