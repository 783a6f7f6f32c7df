"""Hadamard matrices in integers, and the rotation that is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calib.rotation.hadamard import hadamard_factors, hadamard_from_factors, rotation_of_size

FLOAT64_UNIT = 2.0**-53
HIDDEN_SIZES = (576, 640, 768, 896, 960, 1536, 2048, 2304, 2560, 2880, 3072, 3584, 4096, 5120, 5376, 6656, 8192)
"""Of SmolLM2, Gemma, Qwen, LLaMA, Phi and gpt-oss models."""
ROTATED_SIZES = (64, 576, 960)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 36, 60, 64, 104, 180, 576])
def test_rows_are_orthogonal_in_integers(order: int) -> None:
    """H H^T = n I with entries +1 and -1, for both of Paley's constructions, Sylvester's and their products."""
    factors = hadamard_factors(order)
    assert factors is not None
    matrix = hadamard_from_factors(factors).astype(np.int64)
    assert matrix.shape == (order, order)
    assert (np.abs(matrix) == 1).all()
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order, dtype=np.int64))


@pytest.mark.parametrize("order", [-4, 0, 3, 6, 18, 50, 92, 116, 172])
def test_order_without_a_construction_is_refused(order: int) -> None:
    """None, not a matrix that is almost one: orders that are no multiple of 4, and those these constructions miss."""
    assert hadamard_factors(order) is None
    assert rotation_of_size(order) is None


@pytest.mark.parametrize("size", HIDDEN_SIZES)
def test_usual_hidden_sizes_have_one(size: int) -> None:
    """The factors multiply to the size, and none is so large that rotating would cost what a dense matrix does."""
    factors = hadamard_factors(size)
    assert factors is not None
    assert int(np.prod([len(factor) for factor in factors])) == size
    assert max(len(factor) for factor in factors) <= 180


@pytest.mark.parametrize("size", ROTATED_SIZES)
def test_applying_is_multiplying_by_the_dense_matrix(size: int) -> None:
    """Factor by factor gives x diag(signs) H / sqrt(n).

    Entries of x are at most 8, so every partial sum is at most 8 n; n additions a product on either side, and a last
    division: 2 (n + 2) roundings of that size, over sqrt(n).
    """
    rotation, factors = rotation_of_size(size), hadamard_factors(size)
    assert rotation is not None
    assert factors is not None
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-8, 8)
    dense = torch.from_numpy(hadamard_from_factors(factors)).double()
    wanted = (x * rotation.signs) @ dense / size**0.5
    allowed = 2 * (size + 2) * FLOAT64_UNIT * 8 * size / size**0.5
    assert (rotation.apply(x) - wanted).abs().max().item() <= allowed


@pytest.mark.parametrize("size", ROTATED_SIZES)
def test_common_mean_is_spread(size: int) -> None:
    """A vector of ones stays no outlier: without signs it would become one channel of sqrt(n).

    Each new channel is a sum of n random signs over sqrt(n), so |channel| > 5 has probability below 2 exp(-12.5).
    """
    rotation = rotation_of_size(size)
    assert rotation is not None
    rotated = rotation.apply(torch.ones(1, size))
    assert rotated.abs().max().item() < 5.0
    assert size**0.5 > 5.0


def test_signs_are_always_the_same() -> None:
    """Two runs rotate alike: a policy made with one belongs to the other."""
    first, second = rotation_of_size(64), rotation_of_size(64)
    assert first is not None
    assert second is not None
    assert torch.equal(first.signs, second.signs)
    assert set(first.signs.tolist()) == {-1.0, 1.0}
