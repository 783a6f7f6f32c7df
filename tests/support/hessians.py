"""Hessians and objectives for tests of weight methods, in float64 where something is measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from calib.hessians import hessian_writer, owners_from_sites
from calib.weights import QuantizedWeight
from calib.weights.gptq import DAMPING
from fptq_export import numerics
from fptq_export.sites import Sites

FLOAT32_UNIT = 2.0**-24
"""Largest relative error of one float32 rounding."""


@dataclass(frozen=True)
class LowRankHessian:
    """diag(d) + V V^T: correlated channels, fast to make, and to measure with in float64, at any size."""

    directions: NDArray[np.float32]
    """V [channels, 16]."""
    diagonal: NDArray[np.float32]
    """d [channels], 0.5 to 2."""

    @classmethod
    def drawn(cls, channels: int, seed: int) -> LowRankHessian:
        """Standard normal directions."""
        rng = np.random.default_rng(seed)
        directions = rng.standard_normal((channels, 16)).astype(np.float32)
        return cls(directions, rng.uniform(0.5, 2.0, channels).astype(np.float32))

    def matrix(self) -> torch.Tensor:
        """float32 [channels, channels], to be damped by whoever uses it."""
        hessian = torch.from_numpy(self.directions @ self.directions.T)
        hessian.diagonal().add_(torch.from_numpy(self.diagonal))
        return hessian

    def damped_diagonal(self) -> NDArray[np.float64]:
        """The diagonal d with the damping of the methods, which is a part of the mean of diag H."""
        exact = self.diagonal.astype(np.float64)
        mean = exact.mean() + np.square(self.directions, dtype=np.float64).sum(axis=1).mean()
        damped: NDArray[np.float64] = exact + DAMPING * mean
        return damped

    def row_objectives(self, error: NDArray[np.float64]) -> NDArray[np.float64]:
        """Row by row e H e^T with the damped H, without making it: [out, channels] -> [out]."""
        along = np.square(error @ self.directions.astype(np.float64)).sum(axis=1)
        objectives: NDArray[np.float64] = (np.square(error) * self.damped_diagonal()).sum(axis=1) + along
        return objectives


def correlated_hessian(channels: int, seed: int, *, low_rank: bool = False) -> torch.Tensor:
    """Mean of x x^T over tokens with correlated channels: float32 [channels, channels].

    Args:
        channels: Size.
        seed: Of the draw.
        low_rank: A diagonal and 16 directions, which is fast to make at any size.
    """
    if low_rank:
        return LowRankHessian.drawn(channels, seed).matrix()
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((channels, channels)) + 2 * np.eye(channels)
    x = rng.standard_normal((8 * channels, channels)) @ mix
    return torch.from_numpy((x.T @ x / len(x)).astype(np.float32))


def damped64(hessian: torch.Tensor) -> NDArray[np.float64]:
    """The Hessian of the objective, damped as the methods do it."""
    result: NDArray[np.float64] = hessian.double().numpy().copy()
    mean = result.diagonal().mean()
    result[np.diag_indices_from(result)] += DAMPING * mean if mean > 0 else 1.0
    return result


def row_errors(weight: torch.Tensor, quantized: QuantizedWeight, group_size: int) -> NDArray[np.float64]:
    """Code x scale - weight: [out, in]."""
    codes, scales = quantized.codes.numpy(), quantized.scales.numpy()
    error: NDArray[np.float64] = numerics.dequantize_weight(codes, scales, group_size) - weight.double().numpy()
    return error


def row_objectives(error: NDArray[np.float64], hessian: NDArray[np.float64]) -> NDArray[np.float64]:
    """Row by row e H e^T: [out]."""
    objectives: NDArray[np.float64] = ((error @ hessian) * error).sum(axis=1)
    return objectives


def objective_rounding(
    weight: torch.Tensor, error: NDArray[np.float64], hessian: NDArray[np.float64]
) -> NDArray[np.float64]:
    """How far a float32 evaluation of e H e^T may be from the truth, row by row: [out].

    e is rounded twice (product and difference), by at most u (2|w| + 2|e|) in all. The two inner products of length n
    and their products add at most (2n + 2) u |e| |H| |e|^T (Higham, Accuracy and Stability, 3.5), and the damped
    diagonal of H 2u of it.
    """
    magnitude = np.abs(error)
    of_error = FLOAT32_UNIT * (2 * np.abs(weight.double().numpy()) + 2 * magnitude)
    spread = np.abs(hessian)
    terms = (2 * len(hessian) + 4) * FLOAT32_UNIT * ((magnitude @ spread) * magnitude).sum(axis=1)
    bound: NDArray[np.float64] = terms + 2 * ((magnitude @ spread) * of_error).sum(axis=1)
    bound += ((of_error @ spread) * of_error).sum(axis=1)
    return bound


def write_hessians(path: Path, sites: Sites, *, exclude: tuple[str, ...] = ("lm_head",)) -> None:
    """Make `hessians.safetensors` up: correlated channels whose magnitudes grow a hundredfold from first to last."""
    owners = set(owners_from_sites(sites, [x.path for x in sites.linears if x.path not in exclude]).values())
    sizes = {owner: sites.linear(owner).in_features for owner in owners}
    with hessian_writer(path, sizes) as write:
        for seed, (owner, size) in enumerate(sorted(sizes.items())):
            gain = torch.logspace(-1.0, 1.0, size)
            write(owner, correlated_hessian(size, seed, low_rank=True) * gain[:, None] * gain)
