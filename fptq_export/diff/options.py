"""What a diff is asked to do."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

__all__ = ["CANDIDATES", "Candidate", "DiffOptions", "Thresholds"]

Candidate = Literal["fake-quant", "onnx", "tensorrt"]
CANDIDATES: tuple[Candidate, ...] = get_args(Candidate)
"""In the order they run and are printed."""


class Thresholds(BaseModel):
    """Limits of every candidate; None allows anything. Means are those of prefill and of decode steps, each alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_ppl_increase: NonNegativeFloat | None = None
    """Largest relative increase of perplexity over the windows (0.1 is 10 %)."""
    max_kl: NonNegativeFloat | None = None
    """Largest mean KL divergence, in nats."""
    min_cosine: float | None = Field(default=None, ge=-1.0, le=1.0)
    """Smallest mean cosine of logits."""
    min_psnr: float | None = None
    """Smallest mean PSNR of logits, in decibel."""
    min_top1: float | None = Field(default=None, ge=0.0, le=1.0)
    """Smallest share of tokens where both put the same token first."""


class DiffOptions(Thresholds):
    """Options of `fptq-export diff`, checked; `eval_seq` is `--eval-seq`."""

    source: str
    """A run directory."""
    output: Path | None = None
    """Where `diff.json` goes; None is the run directory."""
    systems: tuple[Candidate, ...] | None = Field(default=None, min_length=1)
    """None takes all that the run and this machine have."""
    reference: Literal["fp32", "fp16"] = "fp32"
    """Type of the torch model that the others are compared with."""
    engine: Path | None = None
    """The TensorRT engine; None is that of the run."""
    text: str = "builtin"
    """`builtin` (held out), a `.txt`, `.jsonl` or `.npz` file, or a data set id."""
    eval_windows: NonNegativeInt = 4
    """Windows of the text; 0 takes all."""
    eval_seq: int = Field(default=256, ge=3)
    """Tokens a window."""
    decode_steps: PositiveInt = 16
    """Decode steps after the head of each window, and free-running steps after that of the first."""
    seed: NonNegativeInt = 0
    """Order of a data set's documents."""
    save_io: Path | None = None
    """Directory for inputs and reference outputs in the formats of Polygraphy and trtexec; None writes none."""
    trust_remote_code: bool = False

    def thresholds(self) -> Thresholds:
        """The limits alone."""
        return Thresholds(**{name: getattr(self, name) for name in Thresholds.model_fields})
