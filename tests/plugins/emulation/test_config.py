"""Choosing a kernel: a pure function of problem and device, with a reason for everything it leaves out."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.plugins.emulation import cases
from tests.plugins.emulation.expected import check
from tests.plugins.emulation.harness import (
    A100,
    BAD_CONFIG,
    BAD_GROUP_SIZE,
    BAD_SHAPE,
    GEMM,
    GEMV,
    NULL_POINTER,
    OK,
    PER_TOKEN,
    TILES,
    UNSUPPORTED,
    Config,
    Desc,
    Device,
    Kernels,
    gemm,
    gemv,
)
from tests.plugins.emulation.weights import GROUP, PER_CHANNEL, TWO_LEVEL, random_weight

DEVICES = {
    "A100": A100,
    "Orin": Device(87, 16, 166912),
    "RTX 3090": Device(86, 82, 101376),
    "RTX 4090": Device(89, 128, 101376),
    "H100": Device(90, 132, 232448),
    "B200": Device(100, 148, 232448),
    "RTX 5090": Device(120, 170, 101376),
}
SHAPES = {  # n, k
    "7B qkv": (12288, 4096),
    "7B o": (4096, 4096),
    "7B gate+up": (22016, 4096),
    "7B down": (4096, 11008),
    "13B down": (5120, 13824),
    "70B qkv": (10240, 8192),
    "70B gate+up": (57344, 8192),
    "70B down": (8192, 28672),
    "135M kv": (192, 576),
    "135M down": (576, 1536),
}
TOKENS = (1, 2, 4, 5, 16, 64, 100, 512, 4096)


def desc_of(m: int, n: int, k: int, scheme: int = GROUP, group_size: int | None = None) -> Desc:
    group = (0 if scheme == PER_CHANNEL else 128 if k % 128 == 0 else 64) if group_size is None else group_size
    return Desc(m, n, k, group, scheme, PER_TOKEN, 0, 0)


def fields(config: Config) -> tuple[int, ...]:
    return tuple(getattr(config, field[0]) for field in Config._fields_)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_llm_shape_has_a_sensible_kernel(kernels: Kernels, device: str, shape: str) -> None:
    """One token: GEMV. Many tokens: tiles of many rows. Never more padding rows than rows."""
    for scheme in (PER_CHANNEL, GROUP, TWO_LEVEL):
        for m in TOKENS:
            desc = desc_of(m, *SHAPES[shape], scheme)
            config = kernels.choose(desc, DEVICES[device])
            assert m <= 4 or config.kernel == GEMM
            assert m > 1 or config.kernel == GEMV
            if config.kernel == GEMM:
                assert fields(config)[1:3] + fields(config)[4:7] in TILES
                assert config.block_m == 16 or config.block_m < 2 * -(-m // 16) * 16
            if m == 4096 and desc.n >= 4096:
                assert config.block_m >= 64
                assert config.split_k == 1


@pytest.mark.parametrize("m", [8, 64])
def test_few_blocks_split_k(kernels: Kernels, m: int) -> None:
    """192 channels on 108 multiprocessors: K = 8192 is shared out."""
    assert kernels.choose(desc_of(m, 192, 8192)).split_k >= 2


def test_the_choice_is_pure(kernels: Kernels) -> None:
    """The same question gets the same answer, whatever was asked in between."""
    first = fields(kernels.choose(desc_of(16, 4096, 4096)))
    kernels.choose(desc_of(4096, 57344, 8192), DEVICES["H100"])
    assert fields(kernels.choose(desc_of(16, 4096, 4096))) == first


def test_candidates_are_distinct_and_start_with_the_choice(kernels: Kernels) -> None:
    """The builder times what fptqChooseConfig prefers first, and nothing twice."""
    for m in TOKENS:
        desc = desc_of(m, 4096, 4096)
        found = [fields(config) for config in kernels.candidates(desc)]
        assert found[0] == fields(kernels.choose(desc))
        assert len(set(found)) == len(found) >= 3
        assert [fields(config) for config in kernels.candidates(desc, capacity=2)] == found[:2]


def test_every_candidate_runs_and_is_right(kernels: Kernels) -> None:
    """What is offered as a tactic computes the linear, for small and larger m."""
    rng = cases.generator(30)
    for m in (3, 40):
        x, weight = cases.random_x(rng, m, 1024), random_weight(rng, 264, 1024, GROUP, 128)
        for config in kernels.candidates(desc_of(m, 264, 1024)):
            check(kernels.linear(x, weight, config), x, weight)


def test_each_rejected_candidate_has_a_reason(kernels: Kernels) -> None:
    """Usable lines carry a modelled time, the others a reason; every tile and the GEMV are named."""
    lines = kernels.explain(desc_of(8, 4096, 4096)).strip().split("\n")
    assert all(("us modelled" in line) != ("rejected: " in line) for line in lines)
    rejected = [line.partition("rejected: ")[2] for line in lines if "rejected" in line]
    assert rejected
    assert all(len(reason.split()) >= 4 for reason in rejected)
    for tile in TILES:
        assert any(f"tile {tile[0]}x{tile[1]}x64, warp {tile[2]}x{tile[3]}" in line for line in lines)
    assert any(line.startswith("gemv") for line in lines)


@pytest.mark.parametrize(
    ("desc", "device", "line", "reason"),
    [
        (desc_of(5, 4096, 4096), A100, "gemv", "at most 4 rows"),
        (desc_of(8, 4096, 4096), A100, "tile 64x128", "padding"),
        (desc_of(512, 4096, 4096), A100, "warp 64x64", "registers"),
        (desc_of(512, 4096, 4096, GROUP, 16), A100, "warp 64x32", "registers"),
        (desc_of(512, 4096, 4096, TWO_LEVEL, 16), A100, "tile 64x128x64, warp 64x32", "hold up the tensor cores"),
        (desc_of(512, 4096, 4096, TWO_LEVEL, 16), A100, "tile 128x128x64, warp 64x32", "hold up the tensor cores"),
        (desc_of(512, 4096, 4096), A100, "split-K 16", "full without splitting"),
        (desc_of(64, 192, 576), A100, "split-K 4", "too short to fill"),
        (desc_of(4, 4096, 28672), DEVICES["RTX 4090"], "gemv", "shared memory"),
        (desc_of(512, 4096, 4096, TWO_LEVEL), Device(80, 108, 49152), "tile 128x128", "does not fit the shared memory"),
        (desc_of(64, 192, 128), A100, "split-K 2", "without a whole group"),
    ],
)
def test_reasons(kernels: Kernels, desc: Desc, device: Device, line: str, reason: str) -> None:
    """A candidate is left out for the reason that holds."""
    matching = [text for text in kernels.explain(desc, device).split("\n") if line in text]
    assert matching
    assert any(reason in text for text in matching), matching


def test_per_channel_prompts_use_the_large_warp_tile(kernels: Kernels) -> None:
    """Without FP32 sums the 64 x 64 warp tile fits the registers, and is offered."""
    configs = kernels.candidates(desc_of(4096, 4096, 4096, PER_CHANNEL))
    assert any((config.warp_m, config.warp_n) == (64, 64) for config in configs)


@pytest.mark.parametrize("group_size", [16, 32])
def test_long_two_level_prompts_keep_a_large_tile(kernels: Kernels, group_size: int) -> None:
    """Small groups leave a kernel with 64 rows a warp; groups of 16 the 64 x 64 one only."""
    found = {(c.warp_m, c.warp_n) for c in kernels.candidates(desc_of(4096, 4096, 4096, TWO_LEVEL, group_size))}
    assert {tile for tile in found if tile[0] == 64} == ({(64, 64)} if group_size == 16 else {(64, 32), (64, 64)})


def test_a_tile_that_is_not_offered_does_not_run(kernels: Kernels) -> None:
    """A configuration made by hand is refused by the boundary, before any launch."""
    rng = cases.generator(31)
    x, weight = cases.random_x(rng, 5, 128), random_weight(rng, 24, 128, TWO_LEVEL, 16)
    for tile in TILES:
        status = kernels.linear(x, weight, gemm(tile)).status
        assert status == (OK if cases.is_offered(tile, TWO_LEVEL, 16) else BAD_CONFIG)


@pytest.mark.parametrize(
    ("desc", "status"),
    [
        (desc_of(0, 64, 128), BAD_SHAPE),
        (desc_of(1, 0, 128), BAD_SHAPE),
        (desc_of(1, 12, 128), BAD_SHAPE),
        (desc_of(1, 64, 100, GROUP, 64), BAD_SHAPE),
        (desc_of(1, 64, 65536 + 128), BAD_SHAPE),
        (desc_of(1, 64, 128, GROUP, 0), BAD_GROUP_SIZE),
        (desc_of(1, 64, 768, GROUP, 48), BAD_GROUP_SIZE),
        (desc_of(1, 64, 256, GROUP, 256), BAD_GROUP_SIZE),
        (desc_of(1, 64, 128, PER_CHANNEL, 64), BAD_GROUP_SIZE),
        (desc_of(1, 64, 128, 7, 64), BAD_GROUP_SIZE),
    ],
)
def test_a_bad_problem_has_no_configuration(kernels: Kernels, desc: Desc, status: int) -> None:
    """Wrong shapes and group sizes are named, not rounded."""
    config = Config()
    assert kernels.c.fptqChooseConfig(ctypes.byref(desc), ctypes.byref(A100), ctypes.byref(config)) == status
    assert kernels.c.fptqExplainConfigs(ctypes.byref(desc), ctypes.byref(A100), None, 0) == -status
    assert kernels.c.fptqWorkspaceBytes(ctypes.byref(desc), ctypes.byref(config)) == 0


def test_an_old_device_is_refused(kernels: Kernels) -> None:
    """Compute capability 7.5 has no cp.async."""
    desc, config, count = desc_of(1, 64, 128), Config(), ctypes.c_int32(9)
    turing = Device(75, 40, 65536)
    assert kernels.c.fptqChooseConfig(ctypes.byref(desc), ctypes.byref(turing), ctypes.byref(config)) == UNSUPPORTED
    assert (
        kernels.c.fptqCandidates(ctypes.byref(desc), ctypes.byref(turing), None, 0, ctypes.byref(count)) == UNSUPPORTED
    )
    assert count.value == 0


def test_null_pointers_are_refused(kernels: Kernels) -> None:
    """No argument of the boundary is followed when it is null."""
    desc, config = desc_of(1, 64, 128), Config()
    assert kernels.c.fptqChooseConfig(None, ctypes.byref(A100), ctypes.byref(config)) == NULL_POINTER
    assert kernels.c.fptqChooseConfig(ctypes.byref(desc), None, ctypes.byref(config)) == NULL_POINTER
    assert kernels.c.fptqChooseConfig(ctypes.byref(desc), ctypes.byref(A100), None) == NULL_POINTER
    assert kernels.c.fptqCandidates(ctypes.byref(desc), ctypes.byref(A100), None, 0, None) == NULL_POINTER
    assert kernels.c.fptqExplainConfigs(None, ctypes.byref(A100), None, 0) == -NULL_POINTER


def test_the_workspace_holds_codes_scales_and_partial_sums(kernels: Kernels) -> None:
    """GEMV: none; GEMM: the quantized activation; split-K: 4 bytes an output and part more; in 256-byte steps."""
    desc = desc_of(33, 200, 1024)
    one, three = Config(GEMM, *TILES[0][:2], 64, *TILES[0][2:], 1), Config(GEMM, *TILES[0][:2], 64, *TILES[0][2:], 3)
    size = [kernels.c.fptqWorkspaceBytes(ctypes.byref(desc), ctypes.byref(c)) for c in (one, three)]
    assert size == [33 * 1024 + 256, 33 * 1024 + 256 + (3 * 33 * 208 * 4 + 255) // 256 * 256]
    assert kernels.c.fptqWorkspaceBytes(ctypes.byref(desc_of(2, 200, 1024)), ctypes.byref(gemv(2))) == 0


def test_messages_are_sentences(kernels: Kernels) -> None:
    """Each status has its own text, an unknown one too."""
    texts = {kernels.c.fptqStatusMessage(status) for status in range(OK, 10)}
    assert len(texts) == 10
    assert np.all([len(text) > 5 for text in texts])
