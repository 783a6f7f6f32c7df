"""What `doctor` found, as it is printed and as JSON."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from fptq_export.build.engine_facts import EngineFacts

__all__ = ["Check", "DoctorReport", "PlanReport", "Status"]

Status = Literal["ok", "note", "unknown", "problem"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Check(_Model):
    """One thing that was looked at."""

    what: str
    status: Status
    """`note` is worth knowing and harms nothing; `unknown` could not be looked at; `problem` is what to mend."""
    text: str
    fix: str = ""
    """The next step, where there is one."""


class PlanReport(_Model):
    """An engine file."""

    path: str
    facts: EngineFacts | None
    """What it was built for; None where nothing says so."""
    checks: tuple[Check, ...]
    verdict: str
    """Will it load here, in one sentence."""


class DoctorReport(_Model):
    """What `fptq-export doctor --json` prints."""

    schema_version: Literal[1] = 1
    tool_version: str
    machine: dict[str, str]
    checks: tuple[Check, ...]
    plan: PlanReport | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether there is nothing to mend."""
        checks = (*self.checks, *(self.plan.checks if self.plan is not None else ()))
        return all(check.status != "problem" for check in checks)
