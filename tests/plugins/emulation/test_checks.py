"""Tests of the emulator: each rule that it enforces is broken by one kernel of checks.cpp, and reported."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.plugins.emulation.harness import COMPILE, CUDA_ERROR, HERE, OK, QUIET, ROOT, Kernels, aligned_copy, run

REPORTS = {
    "race_of_write_and_read": "shared memory race: no barrier since another thread",  # wrote, or read: who came first
    "race_of_writes": "shared memory race: no barrier since another thread wrote",
    "read_before_write": "shared memory is read before it was written",
    "shared_out_of_bounds": "shared memory out of bounds",
    "global_out_of_bounds": "global memory out of bounds",
    "write_of_the_input": "input",
    "misaligned": "misaligned access to global memory",
    "global_race": "global memory race: another thread wrote it",
    "different_barriers": "divergence: threads wait at different barriers",
    "barrier_of_half_the_threads": "deadlock",
    "different_shuffles": "divergence: lanes of a warp meet at different operations",
    "early_read": "shared memory is used while a cp.async still writes it",
    "forgotten_commit": "a thread ends with a cp.async that was never committed",
    "forgotten_wait": "a thread ends while its cp.async is under way",
    "overflow": "INT32 overflow of an accumulator",
}


@pytest.fixture(scope="module")
def checks(kernels: Kernels, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels of checks.cpp on the emulator; `kernels` only says that this machine can build them."""
    library = tmp_path_factory.mktemp("checks") / "libchecks.so"
    include = [f"-I{folder}" for folder in (ROOT / "plugins/include", ROOT / "plugins/src", HERE)]
    sources = [str(HERE / name) for name in ("checks.cpp", "cuda_emulation.cpp")]
    run([*COMPILE, *QUIET, "-DFPTQ_EMULATION", *include, "-shared", *sources, "-o", str(library)])
    loaded = ctypes.CDLL(str(library))
    loaded.check_name.restype = ctypes.c_char_p
    loaded.emulation_error.restype = ctypes.c_char_p
    return loaded


def names(checks: ctypes.CDLL) -> list[str]:
    return [name.decode() for name in iter(map(checks.check_name, range(100)).__next__, None)]


def outcome(checks: ctypes.CDLL, name: str, *, reverse: bool) -> tuple[int, str, NDArray[np.uint32]]:
    """Status, report and output of one kernel."""
    source, target = (aligned_copy(np.arange(256, dtype=np.uint32)) for _ in range(2))
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (source, target)]
    checks.emulation_reset()
    checks.emulation_set_options(0, int(reverse), ctypes.c_int64(-1))
    for pointer, label in zip(pointers, ("input", "output"), strict=True):
        checks.emulation_add_range(pointer, ctypes.c_int64(1024), int(label == "output"), label.encode())
    status = checks.check_run(names(checks).index(name), *pointers)
    return status, checks.emulation_error().decode(), target


@pytest.mark.parametrize("reverse", [False, True], ids=("forwards", "backwards"))
@pytest.mark.parametrize("name", REPORTS)
def test_a_broken_rule_is_reported(checks: ctypes.CDLL, name: str, reverse: bool) -> None:
    """The launch fails and the report names the rule, whatever thread runs first."""
    status, report, _ = outcome(checks, name, reverse=reverse)
    assert status == CUDA_ERROR
    assert REPORTS[name] in report


@pytest.mark.parametrize("reverse", [False, True], ids=("forwards", "backwards"))
def test_a_correct_kernel_passes(checks: ctypes.CDLL, reverse: bool) -> None:
    """Copies, a barrier, shared loads and a shuffle in order: no report, and the words where they belong."""
    status, report, output = outcome(checks, "correct", reverse=reverse)
    assert (status, report) == (OK, "")
    np.testing.assert_array_equal(output[:64], np.arange(64) ^ 33)


def test_every_kernel_has_its_report(checks: ctypes.CDLL) -> None:
    """No kernel of checks.cpp is left out."""
    assert set(names(checks)) == {"correct", *REPORTS}
