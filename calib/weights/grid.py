"""Which group scales a method may store: any float16, or integer multiples of one unit an output channel."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calib.weights.scales import storable_scale

__all__ = ["IntegerGrid", "ScaleGrid"]


@dataclass(frozen=True)
class ScaleGrid:
    """Every normal float16; positive unless `signed`."""

    signed: bool

    def nearest(self, scales: torch.Tensor, rows: slice) -> torch.Tensor:
        """The closest scale that may be stored: float32 [groups, rows] -> the same, exact in float16.

        Args:
            scales: Wanted scales. Without `signed`, one that is not positive becomes the smallest.
            rows: Which output channels these are.
        """
        del rows
        return storable_scale(scales if self.signed else scales.clamp(min=0.0)).to(torch.float32)


@dataclass(frozen=True)
class IntegerGrid(ScaleGrid):
    """Scales n x unit with integer n, `lowest` <= |n| <= `highest`. All products must be exact in float16."""

    unit: torch.Tensor
    """float32 [out], positive. Where it is not finite, scales become NaN or infinite."""
    lowest: torch.Tensor
    """float32 [out], at least 1: smaller integers would give a scale below the smallest normal float16."""
    highest: int

    def nearest(self, scales: torch.Tensor, rows: slice) -> torch.Tensor:
        """As for `ScaleGrid`."""
        unit, lowest = self.unit[rows], self.lowest[rows]
        integers = (scales / unit).round_()
        magnitudes = torch.maximum(integers.abs(), lowest).clamp_(max=float(self.highest))
        negative = (integers < 0) if self.signed else torch.zeros_like(integers, dtype=torch.bool)
        # An unsigned grid has no scale on the other side of zero: the nearest is the lowest.
        magnitudes = magnitudes if self.signed else torch.where(integers < 0, lowest.expand_as(integers), magnitudes)
        return torch.where(negative, -magnitudes, magnitudes) * unit
