"""Hadamard matrices of many orders, and multiplication by them without ever forming them.

A Hadamard matrix H of order n holds +1 and -1, and H H^T = n I. Orders 2^k are Sylvester's; q + 1 (q = 3 mod 4) and
2 (q + 1) (q = 1 mod 4) with q prime are Paley's (J. Math. Phys. 12, 1933); Kronecker products give the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Rotation", "hadamard_factors", "hadamard_from_factors", "rotation_of_size"]

_LARGEST_SYLVESTER = 64
"""Order of the factors that a power of two is split into: a product of few small matrices costs least."""
_SEED = 20240330
"""Of the signs. Fixed, so that a model is always rotated alike."""


@dataclass(frozen=True)
class Rotation:
    """Q = diag(signs) H / sqrt(n): orthogonal, n x n, with H the Kronecker product of `factors`.

    Without the signs, a stream whose channels have a common mean would become one with an outlier: the sum of all
    channels is one of the new ones (QuaRot's "randomized" Hadamard matrix).
    """

    signs: torch.Tensor
    """float64 [n], +1 and -1."""
    factors: tuple[torch.Tensor, ...]
    """float64, square."""

    @property
    def size(self) -> int:
        """Channels: n."""
        return len(self.signs)

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows x Q, computed and given in float64: [m, n] -> [m, n]."""
        x = rows.to(torch.float64) * self.signs
        before = 1
        for factor in self.factors:
            x = factor.T @ x.reshape(len(rows) * before, len(factor), -1)
            before *= len(factor)
        return x.reshape(rows.shape).div_(math.sqrt(self.size))


def rotation_of_size(size: int) -> Rotation | None:
    """The rotation of vectors of `size` channels; None where no Hadamard matrix of that order is known here."""
    factors = hadamard_factors(size)
    if factors is None:
        return None
    signs = np.random.default_rng(_SEED).choice([-1.0, 1.0], size)
    return Rotation(torch.from_numpy(signs), tuple(torch.from_numpy(factor).to(torch.float64) for factor in factors))


def hadamard_factors(order: int) -> tuple[NDArray[np.int8], ...] | None:
    """Hadamard matrices whose Kronecker product has the given order, or None where the constructions give none."""
    if order < 1:
        return None
    base = order // (order & -order)
    if base == 1:
        return _sylvester_factors(order)
    # The smallest Paley matrix leaves most to Sylvester's, which split into small factors.
    paley_order = 4 * base
    while order % paley_order == 0:
        paley = _paley(paley_order)
        if paley is not None:
            return (paley, *_sylvester_factors(order // paley_order))
        paley_order *= 2
    return None


def hadamard_from_factors(factors: tuple[NDArray[np.int8], ...]) -> NDArray[np.int8]:
    """Their Kronecker product."""
    return reduce(np.kron, factors, np.ones((1, 1), np.int8))


def _sylvester_factors(order: int) -> tuple[NDArray[np.int8], ...]:
    factors = []
    while order > 1:
        size = min(order, _LARGEST_SYLVESTER)
        two = np.array([[1, 1], [1, -1]], np.int8)
        factors.append(hadamard_from_factors((two,) * (size.bit_length() - 1)))
        order //= size
    return tuple(factors)


def _paley(order: int) -> NDArray[np.int8] | None:
    """Paley's first or second construction, whichever gives the order."""
    if _is_prime(order - 1) and order % 4 == 0:
        return _conference(order - 1, lower=-1) + np.eye(order, dtype=np.int8)
    q = order // 2 - 1
    if order % 2 == 0 and q % 4 == 1 and _is_prime(q):
        conference = _conference(q, lower=1)
        twisted = np.kron(np.eye(q + 1, dtype=np.int8), np.array([[1, -1], [-1, -1]], np.int8))
        result: NDArray[np.int8] = np.kron(conference, np.array([[1, 1], [1, -1]], np.int8)) + twisted
        return result
    return None


def _conference(q: int, *, lower: int) -> NDArray[np.int8]:
    """Zeros on the diagonal, +-1 elsewhere, C C^T = q I: int8 [q + 1, q + 1]; the core is the Legendre symbol of i - j.

    Args:
        q: An odd prime.
        lower: The first column below the diagonal: -1 makes C skew (q = 3 mod 4), 1 symmetric (q = 1 mod 4).
    """
    legendre = np.full(q, -1, np.int8)
    legendre[np.unique(np.arange(1, q) ** 2 % q)] = 1
    legendre[0] = 0
    index = np.arange(q)
    matrix = np.zeros((q + 1, q + 1), np.int8)
    matrix[0, 1:] = 1
    matrix[1:, 0] = lower
    matrix[1:, 1:] = legendre[(index[:, None] - index) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
