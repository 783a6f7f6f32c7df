"""`stats.json`: what each distinct input of the model's linears looks like."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt

from fptq_export.policy import Activation

__all__ = ["ACTIVATIONS_SCHEMA_VERSION", "ActivationsReport", "HistogramFigures", "InputFigures", "Source"]

ACTIVATIONS_SCHEMA_VERSION: Final = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Source(_Model):
    """Which tokens the model read."""

    description: str
    sha256: str
    tokens: PositiveInt


class HistogramFigures(_Model):
    """How often magnitudes lie in [2^(exponent + i), 2^(exponent + i + 1)); the first entry holds all smaller ones."""

    exponent: int
    counts: tuple[int, ...]


class InputFigures(_Model):
    """One tensor that linears read; magnitudes are those before equalization unless they say otherwise."""

    linears: tuple[str, ...]
    """Torch paths; all of them read this tensor."""
    channels: PositiveInt
    activation: Activation | None
    """What the run's policy does with it, or what the paper's rule would; null where it stays float."""
    absmax: NonNegativeFloat
    """v: the largest magnitude in calibration."""
    median: NonNegativeFloat
    """Half of the magnitudes are below it: the end of the histogram's bin."""
    p999: NonNegativeFloat
    """99.9 % of the magnitudes are below it."""
    channel_median: NonNegativeFloat
    """Median over channels of a channel's largest magnitude."""
    outlier_channels: tuple[int, ...]
    """Channels whose largest magnitude is above `OUTLIER_RATIO` times that, largest first."""
    part_absmax: tuple[NonNegativeFloat, ...]
    """v of each part of the calibration text."""
    held_out_absmax: NonNegativeFloat
    """The largest magnitude of the held-out text."""
    static_range: PositiveFloat | None
    """Largest magnitude that the static scale covers, after equalization; null without a static scale."""
    held_out_ratio: NonNegativeFloat | None
    """Largest held-out magnitude after equalization over that range, or over what calibration itself reached where
    a range calibrator clips; null without a static scale."""
    exceeding_channels: tuple[int, ...]
    """Channels that exceed it on held-out text, largest excess first."""
    histogram: HistogramFigures
    """Of calibration."""
    held_out_histogram: HistogramFigures
    warnings: tuple[str, ...]


class ActivationsReport(_Model):
    """The file."""

    schema_version: Literal[1] = ACTIVATIONS_SCHEMA_VERSION
    tool_version: str
    command: str
    environment: dict[str, str]
    model: str
    v0: NonNegativeFloat
    v1: NonNegativeFloat
    """Thresholds of the rule."""
    max_range_ratio: float = Field(ge=1.0)
    calibration: Source
    held_out: Source
    inputs: tuple[InputFigures, ...]
    """In the order of the model."""

    @property
    def suspicious(self) -> tuple[InputFigures, ...]:
        """Inputs with a warning."""
        return tuple(found for found in self.inputs if found.warnings)
