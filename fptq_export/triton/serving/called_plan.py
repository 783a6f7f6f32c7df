"""`plan.json`: what a text model knows of the engine it calls."""

from __future__ import annotations

from typing import Final

from pydantic import BaseModel, ConfigDict

from fptq_export.range_outputs import RangeOutputs
from fptq_export.triton.plan_facts import PlanFacts

__all__ = ["CALLED_PLAN_FILE", "CalledPlan", "text_problem"]

CALLED_PLAN_FILE: Final = "plan.json"
_FED = frozenset({"input_ids", "attention_mask", "position_ids", "write_indices"})
"""Inputs that a text model fills."""


class CalledPlan(BaseModel):
    """An engine in the same repository; the text model calls the version of its own number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    plan: str
    """Name of its model."""
    stateful: bool
    """Whether the server keeps the cache."""
    facts: PlanFacts
    ranges: RangeOutputs | None = None
    """What the rows of its output `range_monitor` are, where it has one."""


def text_problem(facts: PlanFacts) -> str | None:
    """Why an engine does not write text by itself; None where it does."""
    names = {item.name for item in facts.inputs}
    if not facts.cache:
        return "the engine has no KV cache"
    if "input_ids" not in names or names - _FED:
        return f"the engine reads {', '.join(sorted(names - _FED)) or 'no tokens'}, which no text model gives"
    if any(item.past.data_type == "BF16" for item in facts.cache):
        return "the cache is BF16, a type that NumPy, which the Python backend uses, does not have"
    if facts.batch_dims and facts.cache[0].past.dims[0] > 1:
        return f"the engine takes {facts.cache[0].past.dims[0]} texts a call, no fewer"
    return None
