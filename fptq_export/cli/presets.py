"""Sets of options under one name, for who does not want to choose them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fptq_export.errors import UserError

__all__ = ["PRESETS", "values_of_preset"]

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {},
    "balanced": {"weight_method": "gptq", "equalizer": "search"},
    "accurate": {"weight_method": "gptq", "equalizer": "search", "v0": 0.0, "v1": 0.0, "group_size": 64},
}
"""Name -> fields of `RunOptions` in place of their defaults.

`paper` is FPTQ as published, and what runs without the option. `balanced` costs calibration time; which inputs are
static and which per-token is decided by the same rule. `accurate` has one INT8 scale a token for every input, and more
group scales to read."""


def values_of_preset(name: str) -> dict[str, Any]:
    """Options of a preset.

    Raises:
        UserError: There is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}", "is not a preset", f"use one of {', '.join(PRESETS)}")
    return dict(PRESETS[name])
