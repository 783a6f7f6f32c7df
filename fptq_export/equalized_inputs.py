"""What calibration saw of the inputs of linears, as the equalized graph holds them.

Equalization divides what a fold site produces by s, so a linear behind it reads x / s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fptq_export.policy import Policy, PolicyArrays
from fptq_export.sites import Sites

__all__ = ["EqualizedInputs"]


@dataclass(frozen=True)
class EqualizedInputs:
    """Reads a policy's arrays, one at a time."""

    policy: Policy
    arrays: PolicyArrays
    sites: Sites | None
    """None where the file is not at hand: then extension sites, which it alone names, are not known."""

    def site(self, path: str) -> str | None:
        """Fold site of a linear's input, where the policy equalizes it."""
        site = self._site_of.get(path, self.policy.layers[path].site)
        return site if site in self._equalized else None

    def scales(self, path: str) -> NDArray[np.float32] | None:
        """S of a linear's input, float32 [in]; None where it is not equalized.

        Raises:
            UserError: The arrays lack it, or it has another shape.
        """
        site = self.site(path)
        return None if site is None else self.arrays.read(f"{site}.equalization", self._shape(path))

    def channel_absmax(self, path: str) -> NDArray[np.float32] | None:
        """Largest magnitude of each input channel after equalization, float32 [in]; None where none was measured.

        Raises:
            UserError: An array has another shape than the policy says.
        """
        name = f"{path}.input_absmax"
        if name not in self.arrays:
            return None
        absmax: NDArray[np.float32] = self.arrays.read(name, self._shape(path))
        s = self.scales(path)
        return absmax if s is None else absmax / s

    def absmax(self, path: str) -> float | None:
        """The largest of these."""
        channels = self.channel_absmax(path)
        return None if channels is None else float(channels.max())

    def _shape(self, path: str) -> tuple[int]:
        return (self.policy.layers[path].in_features,)

    @cached_property
    def _site_of(self) -> Mapping[str, str]:
        return {} if self.sites is None else self.sites.site_by_consumer()

    @cached_property
    def _equalized(self) -> frozenset[str]:
        return frozenset(self.policy.equalizations())
