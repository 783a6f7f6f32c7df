"""What calibration measured: the largest magnitude of every input channel of every linear, and histograms on demand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, NonNegativeInt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from calib.histograms import BINS, Histogram
from fptq_export.errors import UserError
from fptq_export.files import atomic_path, os_errors_from_safetensors

__all__ = ["STATS_SCHEMA_VERSION", "Stats", "read_stats", "write_stats"]

STATS_SCHEMA_VERSION: Literal[1] = 1
_METADATA_KEY = "fptq_stats"
_SUFFIX = ".input_absmax"
_COUNTS, _EXPONENT = ".input_histogram", ".input_histogram_exponent"


@dataclass(frozen=True)
class Stats:
    """Exact running maxima."""

    channel_absmax: Mapping[str, NDArray[np.float32]]
    """Linear path -> max over tokens of |x_j|, float32 [in]."""
    tokens: int
    """Tokens seen."""
    description: str
    """Which tokens, for people."""
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    """Linear path -> histogram of |x| over tokens and channels; empty unless a range calibrator asked for them."""

    def histogram(self, path: str) -> Histogram:
        """The histogram of a linear's input.

        Raises:
            UserError: None was measured.
        """
        if path not in self.histograms:
            raise UserError(f"layer {path}", "the calibration statistics have no histogram of it", "calibrate again")
        return self.histograms[path]

    def absmax(self, path: str) -> float:
        """The largest magnitude of a linear's input, v in the FPTQ rule.

        Raises:
            UserError: The linear was not observed.
        """
        if path not in self.channel_absmax:
            raise UserError(f"layer {path}", "the calibration statistics do not cover it", "calibrate again")
        return float(self.channel_absmax[path].max())

    def merge(self, other: Stats) -> Stats:
        """The statistics of both runs together; exact, as maxima and counts are.

        Raises:
            UserError: The runs observed different linears, or histograms of different ones.
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
        if self.histograms.keys() != other.histograms.keys():
            odd = min(self.histograms.keys() ^ other.histograms.keys())
            raise UserError(f"layer {odd}", "only one of the runs to merge has its histogram", "calibrate again")
        histograms = {path: counts.merge(other.histograms[path]) for path, counts in self.histograms.items()}
        merged = {path: np.maximum(absmax, other.channel_absmax[path]) for path, absmax in self.channel_absmax.items()}
        description = f"{self.description}; {other.description}"
        return Stats(merged, self.tokens + other.tokens, description, histograms)


class _Metadata(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = STATS_SCHEMA_VERSION
    tokens: NonNegativeInt
    description: str


def write_stats(stats: Stats, path: Path) -> None:
    """Write `stats.safetensors` in one step: `<layer>.input_absmax` float32 [in], and JSON metadata.

    Where there are histograms, `<layer>.input_histogram` int64 [2048] and `<layer>.input_histogram_exponent` int32 [1].
    """
    metadata = _Metadata(tokens=stats.tokens, description=stats.description)
    arrays: dict[str, NDArray[Any]] = {f"{layer}{_SUFFIX}": absmax for layer, absmax in stats.channel_absmax.items()}
    for layer, histogram in stats.histograms.items():
        arrays[f"{layer}{_COUNTS}"] = histogram.counts
        arrays[f"{layer}{_EXPONENT}"] = np.array([histogram.exponent], np.int32)
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
            arrays = {name: file.get_tensor(name) for name in names}
            histograms = {
                layer: Histogram(_counts(arrays[name]), int(arrays[f"{layer}{_EXPONENT}"].item()))
                for name in names
                if (layer := name.removesuffix(_COUNTS)) != name
            }
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(str(path), f"not calibration statistics ({error})", "delete it and calibrate again") from None
    absmax = {name.removesuffix(_SUFFIX): array for name, array in arrays.items() if name.endswith(_SUFFIX)}
    return Stats(absmax, metadata.tokens, metadata.description, histograms)


def _counts(array: NDArray[Any]) -> NDArray[np.int64]:
    if array.shape != (BINS,) or array.dtype != np.int64 or (array < 0).any():
        raise ValueError(f"a histogram is {array.dtype} {list(array.shape)}, not {BINS} counts")
    return array
