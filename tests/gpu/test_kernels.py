"""The kernels on the GPU against `numerics`: the cases of the emulation, and what only a GPU can show."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from fptq_export.plugin.status import Status
from tests.gpu import checks
from tests.gpu.driver import Driver, cuda_device
from tests.plugins.emulation import cases
from tests.plugins.emulation.expected import check
from tests.plugins.emulation.harness import PER_TOKEN, TILES, Desc, Result, Shape, gemm, gemv
from tests.plugins.emulation.weights import GROUP, random_weight

pytestmark = pytest.mark.gpu

RUNS = 100
LLAMA_SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
"""(N, K) of LLaMA-7B."""


@pytest.mark.parametrize("split_k", checks.SPLITS)
@pytest.mark.parametrize(("tile", "scheme", "group_size"), checks.FITTING)
def test_gemm_is_exact(device: Driver, tile: Shape, scheme: int, group_size: int, split_k: int) -> None:
    """Every tile and scheme, with ragged edges and split K: integers and group sums bit for bit."""
    checks.check_gemm(device, tile, scheme, group_size, split_k)


@pytest.mark.parametrize("m", [1, 2, 3, 4])
@pytest.mark.parametrize(("scheme", "group_size"), cases.SCHEMES)
def test_gemv_is_exact(device: Driver, m: int, scheme: int, group_size: int) -> None:
    """One to four rows: integers bit for bit, floats within the bound."""
    checks.check_gemv(device, m, scheme, group_size)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("static_scale", [None, 0.0123])
@pytest.mark.parametrize("k", [1, 37, 64, 576, 1000, 4096, 9001, 40000])
def test_quantized_activation_is_exact(device: Driver, dtype: Any, static_scale: float | None, k: int) -> None:
    """Codes, scales and row sums equal `numerics` bit for bit."""
    checks.check_quantize(device, k, dtype, static_scale)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("static_scale", [None, 0.03])
def test_modes(device: Driver, dtype: Any, static_scale: float | None) -> None:
    """Both output types and activation modes, both kernels, any even address of x."""
    checks.check_modes(device, gemm(TILES[1]), 35, dtype, static_scale)
    checks.check_modes(device, gemv(3), 3, dtype, static_scale)


@pytest.mark.parametrize(("scheme", "group_size"), cases.SCHEMES)
def test_same_bits_every_run(device: Driver, scheme: int, group_size: int) -> None:
    """A hundred runs of the GEMV, the GEMM and the GEMM with split K give the same bytes."""
    for config, m in ((gemv(2), 2), (gemm(TILES[2]), 70), (gemm(TILES[0], 4), 7)):
        checks.check_same_bits_each_run(device, config, m, scheme, group_size, RUNS)


@pytest.mark.parametrize(("scheme", "group_size"), cases.SCHEMES)
def test_row_does_not_depend_on_the_batch(device: Driver, scheme: int, group_size: int) -> None:
    """A row gives the same bytes alone and in a batch, in any tile, whatever the other rows are."""
    for tile in TILES[:4]:
        checks.check_rows_do_not_see_each_other(device, gemm(tile, 2), gemm(TILES[0], 2), 21, scheme, group_size)
    checks.check_rows_do_not_see_each_other(device, gemv(4), gemv(1), 4, scheme, group_size)


@pytest.mark.parametrize("m", [1, 16, 100, 1024])
@pytest.mark.parametrize(("n", "k"), LLAMA_SHAPES)
def test_every_candidate_of_a_real_shape_is_right(device: Driver, m: int, n: int, k: int) -> None:
    """Whatever TensorRT times and picks on this GPU computes the linear."""
    rng = cases.generator(50, m, n, k)
    x, weight = cases.random_x(rng, m, k), random_weight(rng, n, k, GROUP, 128)
    candidates = device.boundary.candidates(Desc(m, n, k, 128, GROUP, PER_TOKEN, 0, 0), cuda_device())
    assert candidates
    for config in candidates:
        checks.check_outputs(device, x, weight, config)


def test_launch_goes_to_the_given_stream(device: Driver) -> None:
    """A call on another stream waits for what was put there before it, and for nothing else."""
    rng = cases.generator(51)
    x, weight = cases.random_x(rng, 16, 4096), random_weight(rng, 136, 4096, GROUP, 128)
    prepared = device.prepare(x, weight, gemm(TILES[0]))
    before = prepared.output()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        started = torch.cuda.Event()
        device.boundary.check(prepared.launch())
        started.record(stream)
    assert not started.query(), "the call did not wait for its stream, or waited on the host"
    assert prepared.output().tobytes() == before.tobytes(), "the output was written before the stream reached the call"
    stream.synchronize()
    check(Result(0, prepared.output(), "", {}, np.zeros(0, np.int64), np.zeros(0, np.uint8)), x, weight)


def test_call_is_captured_in_a_graph(device: Driver) -> None:
    """A CUDA graph of a call can be replayed, and gives the bytes of the call."""
    rng = cases.generator(52)
    x, weight = cases.random_x(rng, 16, 1024), random_weight(rng, 136, 1024, GROUP, 128)
    for config in (gemm(TILES[0], 3), gemm(TILES[2])):
        expected = device.linear(x, weight, config)
        prepared = device.prepare(x, weight, config)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            status = prepared.launch()
        assert status == Status.OK
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        assert prepared.output().tobytes() == expected.tobytes()
