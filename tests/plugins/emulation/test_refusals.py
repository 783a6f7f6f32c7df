"""Calls that fptqW4A8Linear must refuse before it launches anything."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.plugins.emulation import cases
from tests.plugins.emulation.harness import (
    BAD_ALIGNMENT,
    BAD_CONFIG,
    CUDA_ERROR,
    FLOAT16,
    GEMM,
    NULL_POINTER,
    OK,
    PER_TOKEN,
    SMALL_WORKSPACE,
    STATIC,
    TILES,
    Args,
    Config,
    Desc,
    Kernels,
    aligned_copy,
    gemm,
)
from tests.plugins.emulation.weights import GROUP, TWO_LEVEL, random_weight

M, N, K = 6, 24, 256


class Call:
    """A call that is right, to be made wrong in one place."""

    def __init__(self, kernels: Kernels, scheme: int = GROUP, mode: int = STATIC) -> None:
        rng = cases.generator(40)
        weight = random_weight(rng, N, K, scheme, 64)
        self.kernels = kernels
        self.desc = Desc(M, N, K, 64, scheme, mode, FLOAT16, 1)
        self.config = gemm(TILES[0], 2)
        size = kernels.c.fptqWorkspaceBytes(ctypes.byref(self.desc), ctypes.byref(self.config))
        self.arrays: dict[str, NDArray[Any]] = {
            "x": aligned_copy(cases.random_x(rng, M, K)),
            "weight_codes": aligned_copy(weight.codes),
            "weight_scales": aligned_copy(weight.scale_bytes),
            "x_scale": aligned_copy(np.ones(1, np.float32)),
            "bias": aligned_copy(np.zeros(N, np.float16)),
            "y": aligned_copy(np.full((M, N), 7, np.float16)),
            "workspace": aligned_copy(np.zeros(size, np.uint8)),
        }
        if weight.channel_scales is not None:
            self.arrays["channel_scales"] = aligned_copy(weight.channel_scales)
        self.args = Args(**{name: array.ctypes.data for name, array in self.arrays.items()}, workspace_bytes=size)

    def run(self, fail_launch: int = -1) -> int:
        """Its status."""
        self.kernels.c.emulation_reset()
        self.kernels.options(fail_launch=fail_launch)
        for name, array in self.arrays.items():
            self.kernels.add_range(array, name, writable=name in ("y", "workspace"))
        return int(
            self.kernels.c.fptqW4A8Linear(
                ctypes.byref(self.desc), ctypes.byref(self.config), ctypes.byref(self.args), None
            )
        )

    def untouched(self) -> bool:
        """Whether no output was written."""
        return bool((self.arrays["y"] == 7).all())


def test_the_unchanged_call_is_accepted(kernels: Kernels) -> None:
    """Every refusal below is refused for what it changes."""
    for scheme in (GROUP, TWO_LEVEL):
        for mode in (STATIC, PER_TOKEN):
            call = Call(kernels, scheme, mode)
            assert call.run() == OK
            assert not call.untouched()


@pytest.mark.parametrize(
    "name", ["x", "weight_codes", "weight_scales", "x_scale", "bias", "y", "workspace", "channel_scales"]
)
def test_a_missing_pointer(kernels: Kernels, name: str) -> None:
    """A null pointer that the problem needs is an error."""
    call = Call(kernels, TWO_LEVEL)
    setattr(call.args, name, None)
    assert call.run() == NULL_POINTER
    assert call.untouched()


@pytest.mark.parametrize("name", ["x_scale", "bias", "channel_scales"])
def test_a_pointer_that_is_not_needed(kernels: Kernels, name: str) -> None:
    """Per token without bias and two_level, these are not read."""
    call = Call(kernels, GROUP, PER_TOKEN)
    call.desc.has_bias = 0
    setattr(call.args, name, None)
    assert call.run() == OK


@pytest.mark.parametrize("name", ["weight_codes", "weight_scales", "y", "workspace"])
def test_a_misaligned_pointer(kernels: Kernels, name: str) -> None:
    """Everything but x and bias is read or written in vectors."""
    call = Call(kernels)
    setattr(call.args, name, getattr(call.args, name) + 8)
    assert call.run() == BAD_ALIGNMENT
    assert call.untouched()


def test_a_small_workspace(kernels: Kernels) -> None:
    """One byte too few is too few."""
    call = Call(kernels)
    call.args.workspace_bytes -= 1
    assert call.run() == SMALL_WORKSPACE
    assert call.untouched()


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(GEMM, 16, 128, 64, 16, 32, 5, 1),
        Config(GEMM, 16, 128, 32, 16, 32, 6, 1),
        Config(GEMM, 128, 128, 64, 64, 64, 4, 1),
        Config(GEMM, 16, 128, 64, 16, 32, 6, 0),
        Config(GEMM, 16, 128, 64, 16, 32, 6, 5),
        Config(2, 16, 128, 64, 16, 32, 6, 1),
    ],
)
def test_a_configuration_of_another_problem(kernels: Kernels, config: Config) -> None:
    """No kernel for the tile, registers that do not suffice, more parts than groups: refused."""
    call = Call(kernels)
    call.config = config
    assert call.run() == BAD_CONFIG
    assert call.untouched()


@pytest.mark.parametrize("launch", [0, 1, 2])
def test_a_failed_launch(kernels: Kernels, launch: int) -> None:
    """Quantization, GEMM or reduction: whichever launch fails, the call says so."""
    assert Call(kernels).run(fail_launch=launch) == CUDA_ERROR


def test_nothing_is_launched_after_a_failure(kernels: Kernels) -> None:
    """When quantization cannot start, no output is written."""
    call = Call(kernels)
    assert call.run(fail_launch=0) == CUDA_ERROR
    assert call.untouched()
