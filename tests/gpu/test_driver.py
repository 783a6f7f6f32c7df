"""The GPU suite's own code, on the emulated kernels: what runs on a GPU machine has run before."""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.gpu import checks
from tests.gpu.boundary import ROOT, SIGNATURES, Boundary, emulated_boundary
from tests.gpu.driver import Driver, HostMemory
from tests.plugins.emulation import cases
from tests.plugins.emulation.conftest import kernels as kernels
from tests.plugins.emulation.harness import A100, BAD_CONFIG, TILES, Desc, Kernels, gemm, gemv
from tests.plugins.emulation.weights import GROUP, PER_CHANNEL, TWO_LEVEL, random_weight

HEADERS = ("kernels.h", "status.h")


@pytest.fixture
def driver(kernels: Kernels) -> Driver:
    return Driver(emulated_boundary(kernels.c), HostMemory(kernels))


def test_signatures_are_those_of_the_headers() -> None:
    """Every function of the boundary, with its number of arguments, its pointers and its integers of either width."""
    text = "".join((ROOT / "plugins/include/fptq" / name).read_text(encoding="utf-8") for name in HEADERS)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    found = {
        name: (result.strip(), [parameter.strip() for parameter in parameters.split(",")])
        for result, name, parameters in re.findall(r"^([\w* ]+?)(fptq\w+)\(([^)]*)\);", text, re.MULTILINE)
    }
    assert found.keys() == SIGNATURES.keys()
    for name, (result, parameters) in found.items():
        restype, argtypes = SIGNATURES[name]
        assert kind_of_type(restype) == kind_of_text(result), name
        assert [kind_of_type(argument) for argument in argtypes] == [kind_of_text(text) for text in parameters], name


def kind_of_text(text: str) -> str:
    if "*" in text or "FptqStream" in text:
        return "pointer"
    return "size_t" if "size_t" in text else "int32"


def kind_of_type(argument: Any) -> str:
    if "LP_" in argument.__name__ or argument.__name__ in {"c_void_p", "c_char_p"}:
        return "pointer"
    return {"c_ulong": "size_t", "c_int": "int32"}[argument.__name__]


def test_both_boundaries_offer_every_function() -> None:
    """The exported table of the real library names each function of the signatures."""
    text = (ROOT / "tests/gpu/exports.cpp").read_text(encoding="utf-8")
    assert set(re.findall(r"FPTQ_FUNCTION\((fptq\w+)\)", text)) == SIGNATURES.keys()


def test_everything_the_sanitizers_watch(driver: Driver) -> None:
    """The calls of the sanitizer runs come out right."""
    checks.check_some_of_everything(driver)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("static_scale", [None, 0.03])
def test_modes(driver: Driver, dtype: Any, static_scale: float | None) -> None:
    """Both output types and activation modes, both kernels."""
    checks.check_modes(driver, gemm(TILES[1]), 35, dtype, static_scale)
    checks.check_modes(driver, gemv(3), 3, dtype, static_scale)


@pytest.mark.parametrize(("scheme", "group_size"), [(PER_CHANNEL, 0), (GROUP, 128), (TWO_LEVEL, 64)])
def test_rows_and_runs(driver: Driver, scheme: int, group_size: int) -> None:
    """Row independence and determinism, as on the GPU but with fewer runs."""
    checks.check_rows_do_not_see_each_other(driver, gemm(TILES[2], 2), gemm(TILES[0], 2), 21, scheme, group_size)
    checks.check_rows_do_not_see_each_other(driver, gemv(4), gemv(1), 4, scheme, group_size)
    checks.check_same_bits_each_run(driver, gemm(TILES[0], 4), 7, scheme, group_size, runs=3)


def test_wrong_integers_are_found(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bit-exact check can fail: one code of the packed weight that differs is seen."""
    made = checks.integer_weight

    def broken(*arguments: Any) -> Any:
        weight = made(*arguments)
        weight.codes[0] ^= 1
        return weight

    monkeypatch.setattr(checks, "integer_weight", broken)
    with pytest.raises(AssertionError, match="not equal"):
        checks.check_integers(driver, gemv(2), 2, 40, 1024, GROUP, 128)


def test_write_past_the_output_is_found(driver: Driver) -> None:
    """The guard behind y is compared."""
    rng = cases.generator(40)
    prepared = driver.prepare(cases.random_x(rng, 2, 64), random_weight(rng, 24, 64, GROUP, 64), gemv(2))
    buffers: list[Any] = [cell.cell_contents for cell in prepared.output.__closure__ or ()]
    (y,) = (buffer for buffer in buffers if hasattr(buffer, "array"))
    y.array[-1] ^= 1
    with pytest.raises(AssertionError, match="wrote past y"):
        prepared.output()


def test_failed_call_raises_its_sentence(driver: Driver) -> None:
    """A status that is not OK never looks like a result."""
    rng = cases.generator(41)
    x, weight = cases.random_x(rng, 2, 64), random_weight(rng, 24, 64, GROUP, 64)
    with pytest.raises(RuntimeError, match="BAD_CONFIG: the configuration was not made"):
        driver.linear(x, weight, gemv(3))
    assert driver.prepare(x, weight, gemv(3)).launch() == BAD_CONFIG


def test_candidates_and_choice(driver: Driver) -> None:
    """The best configuration is the first candidate."""
    desc = Desc(64, 4096, 4096, 128, GROUP, 1, 0, 0)
    boundary: Boundary = driver.boundary
    best, candidates = boundary.choose(desc, A100), boundary.candidates(desc, A100)
    assert len(candidates) > 1
    assert bytes(best) == bytes(candidates[0])
    assert boundary.workspace_bytes(desc, best) > 64 * 4096
