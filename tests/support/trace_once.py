"""torch traces each architecture once a session: most tests want its graph, and few what torch does.

A trace takes 10 seconds and depends on the config, the type and the code alone. Weights are attached afterwards, anew
for every model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from fptq_export.tasks import Task
    from fptq_export.trace.from_hf import TracedModel

    Trace = Callable[..., TracedModel]

__all__ = ["remembered"]


def remembered(trace: Trace) -> Trace:
    """`traced_from_config`, or that of another task, that gives a copy of what it gave for the same arguments."""
    known: dict[str, TracedModel] = {}

    def traced(config: PretrainedConfig, dtype: str, *, trust_remote_code: bool = False, **task: Task) -> TracedModel:
        if trust_remote_code:
            return trace(config, dtype, trust_remote_code=True, **task)
        fields = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        key = json.dumps([type(config).__name__, dtype, fields, task], sort_keys=True, default=str)
        if key not in known:
            known[key] = trace(config, dtype, **task)
        return dataclasses.replace(known[key], graph=known[key].graph.clone())

    return traced
