"""What calibration measured: the largest magnitude of every input channel of every linear."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fptq_export.errors import UserError
from fptq_export.files import atomic_path, os_errors_from_safetensors

__all__ = ["STATS_SCHEMA_VERSION", "Stats", "read_stats", "write_stats"]

STATS_SCHEMA_VERSION: Literal[1] = 1
_METADATA_KEY = "fptq_stats"
_SUFFIX = ".input_absmax"


@dataclass(frozen=True)
class Stats:
    """Exact running maxima."""

    channel_absmax: Mapping[str, NDArray[np.float32]]
    """Linear path -> max over tokens of |x_j|, float32 [in]."""
    tokens: int
    """Tokens seen."""
    description: str
    """Which tokens, for people."""

    def absmax(self, path: str) -> float:
        """The largest magnitude of a linear's input, v in the FPTQ rule.

        Raises:
            UserError: The linear was not observed.
        """
        if path not in self.channel_absmax:
            raise UserError(f"layer {path}", "the calibration statistics do not cover it", "calibrate again")
        return float(self.channel_absmax[path].max())

    def merge(self, other: Stats) -> Stats:
        """The statistics of both runs together; exact, because the maximum of maxima is the maximum.

        Raises:
            UserError: The runs observed different linears.
        """
        mine = {path: absmax.shape for path, absmax in self.channel_absmax.items()}
        theirs = {path: absmax.shape for path, absmax in other.channel_absmax.items()}
        if mine != theirs:
            odd = next(path for path in (*mine, *theirs) if mine.get(path) != theirs.get(path))
            raise UserError(
                f"layer {odd}",
                f"the runs to merge differ there: {mine.get(odd, 'absent')} and {theirs.get(odd, 'absent')}",
                "merge statistics of one model only",
            )
        merged = {path: np.maximum(absmax, other.channel_absmax[path]) for path, absmax in self.channel_absmax.items()}
        return Stats(merged, self.tokens + other.tokens, f"{self.description}; {other.description}")


class _Metadata(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = STATS_SCHEMA_VERSION
    tokens: NonNegativeInt
    description: str


def write_stats(stats: Stats, path: Path) -> None:
    """Write `stats.safetensors` in one step: `<layer>.input_absmax` float32 [in], and JSON metadata."""
    metadata = _Metadata(tokens=stats.tokens, description=stats.description)
    arrays = {f"{layer}{_SUFFIX}": absmax for layer, absmax in stats.channel_absmax.items()}
    with atomic_path(path) as partial, os_errors_from_safetensors(path):
        save_file(arrays, str(partial), metadata={_METADATA_KEY: metadata.model_dump_json()})


def read_stats(path: Path) -> Stats:
    """Read `stats.safetensors`.

    Raises:
        UserError: The file is missing, damaged, or not written by `write_stats`.
    """
    if not path.is_file():
        raise UserError(str(path), "no such file", "run the calibrate stage first")
    try:
        with safe_open(str(path), framework="np") as file:
            metadata = _Metadata.model_validate_json((file.metadata() or {})[_METADATA_KEY])
            names = sorted(file.keys())
            absmax = {name.removesuffix(_SUFFIX): file.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        raise UserError(str(path), f"not calibration statistics ({error})", "delete it and calibrate again") from None
    return Stats(absmax, metadata.tokens, metadata.description)
