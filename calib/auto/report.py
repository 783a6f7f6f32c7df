"""`auto.json`: the budget, what was chosen, and what other budgets would give."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fptq_export.files import read_json_model, write_json_model

__all__ = ["AutoReport", "ParetoPoint", "PolicyTotals", "read_auto_report", "write_auto_report"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PolicyTotals(_Model):
    """A policy as a whole, over the linears that are quantized."""

    effective_bits: float
    """Bits a weight, scales included."""
    decode_us: float
    """Modelled or measured microseconds of all linears for one token."""
    dynamic_layers: int
    """Linears whose input is quantized token by token."""
    predicted_kl: float = Field(ge=0.0)
    """Sum over linears, nats a token."""
    measured_kl: float | None = None
    """Of the model with the whole policy against the float model, nats a token."""


class ParetoPoint(_Model):
    """The best choice under one budget of bits."""

    effective_bits: float
    decode_us: float
    predicted_kl: float = Field(ge=0.0)
    predicted_perplexity_ratio: float
    """exp(KL): the increase of perplexity over the float model, if text is as likely as that model says."""


class AutoReport(_Model):
    """`auto.json`."""

    schema_version: Literal[1] = 1
    effective_bits: float | None
    """The budget: asked for, or that of the paper's policy."""
    max_kl: float | None
    max_dynamic_layers: int | None
    cost: str
    """Where decode times come from."""
    kept: Literal["auto", "paper"]
    """`paper` where the choice measured worse than the paper's policy and that one meets the budget."""
    auto: PolicyTotals
    paper: PolicyTotals
    pareto: tuple[ParetoPoint, ...]


def write_auto_report(report: AutoReport, path: Path) -> None:
    """Write `auto.json` in one step."""
    write_json_model(report, path)


def read_auto_report(path: Path) -> AutoReport:
    """Read `auto.json`. Raises UserErrors naming every field that is wrong."""
    return read_json_model(path, AutoReport)
