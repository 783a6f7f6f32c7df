from __future__ import annotations

import pytest

from fptq_export.build.memory_pools import MEMORY_POOLS, mem_pools_from_option
from fptq_export.errors import UserErrors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("workspace:8G,tacticSharedMem:48K", {"workspace": 8 << 30, "tacticSharedMem": 48 << 10}),
        ("tacticSharedMemory:48K", {"tacticSharedMem": 48 << 10}),
        ("workspace:1024MiB", {"workspace": 1 << 30}),
        ("WORKSPACE:512", {"workspace": 512 << 20}),
        ("tacticSharedMem:0.046875", {"tacticSharedMem": 48 << 10}),
        (
            "dlaSRAM:1M, dla_local_dram:2m,dlaGlobalDRAM:65536B",
            {"dlaSRAM": 1 << 20, "dlaLocalDRAM": 2 << 20, "dlaGlobalDRAM": 1 << 16},
        ),
    ],
)
def test_sizes_are_read_as_trtexec_reads_them(text: str, expected: dict[str, int]) -> None:
    """A pasted trtexec option gives the same limits: powers of 1024, and a bare number is MiB."""
    assert mem_pools_from_option(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "workspace",
        "workspace:",
        "workspace:0",
        "workspace:-1G",
        "workspace:8T",
        "workspace:8GG",
        "workspace:lots",
        "cache:8G",
        "workspace:1G,workspace:2G",
        "workspace:1G,,",
        ":8G",
    ],
)
def test_nonsense_is_refused(text: str) -> None:
    """A limit that is not understood must not be dropped: the build would take all memory instead."""
    with pytest.raises(UserErrors):
        mem_pools_from_option(text)


def test_all_mistakes_are_named_at_once() -> None:
    """One edit mends everything."""
    with pytest.raises(UserErrors) as caught:
        mem_pools_from_option("cache:8G,workspace:lots,dlaSRAM:1M")
    assert [problem.path for problem in caught.value.problems] == ["cache:8G", "workspace:lots"]


def test_pools_are_the_librarys() -> None:
    """Every pool we know is a member of the library's enum, so a limit is never lost on the way."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs TensorRT for RTX")
    assert set(MEMORY_POOLS.values()) <= set(trt.MemoryPoolType.__members__)
