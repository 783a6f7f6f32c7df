"""The time model: what bounds a linear, and the committed table."""

from __future__ import annotations

import pytest

from fptq_export.roofline import DEVICES, Device, Scheme, Shape, bound_s, time_s
from fptq_export.roofline.devices import LAUNCH_S
from fptq_export.roofline.instructions import tiles
from fptq_export.roofline.model import weight_bytes_of
from fptq_export.roofline.table import MODELS, ROWS, SCHEMES, TABLE_FILE, markdown

A100 = DEVICES[0]
GROUP_128 = Scheme("group", 128)
SHAPES = [shape for shapes in MODELS.values() for shape in shapes.values()]
ROUNDING = 1e-9
"""Relative: a few float64 operations in another order."""


def test_committed_table_is_the_model_as_it_is_now() -> None:
    """Nobody edits the table by hand, and nobody changes the model without it."""
    assert TABLE_FILE.read_text(encoding="utf-8") == markdown(), "next: python -m fptq_export.roofline"


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.key)
def test_no_time_is_below_its_roofline(device: Device, scheme: Scheme) -> None:
    """The modelled time never beats what memory and tensor cores allow at data-sheet rates."""
    for shape in SHAPES:
        weight_bytes = weight_bytes_of(scheme, shape.k)
        for m in ROWS:
            ideal = bound_s(shape, m, device, weight_bytes=weight_bytes, activation_bytes=1)
            assert time_s(shape, scheme, m, device).total >= ideal * (1 - ROUNDING)


def test_one_token_is_bound_by_memory() -> None:
    """Decoding one token is the GEMV, and takes the time to read the 4-bit weights once."""
    shape = Shape(4096, 4096)
    time = time_s(shape, GROUP_128, 1, A100)
    scales_and_codes = 4096 * 4096 * (0.5 + 2 / 128)
    activations = 2 * (4096 + 4096)
    assert (time.kernel, time.bound) == ("gemv 1", "memory")
    assert time.total == pytest.approx((scales_and_codes + activations) / 2.039e12 + LAUNCH_S, rel=ROUNDING)


@pytest.mark.parametrize("scheme", [Scheme("per_channel"), GROUP_128], ids=lambda scheme: scheme.key)
def test_long_prompt_is_bound_by_tensor_cores(scheme: Scheme) -> None:
    """A long prompt spends its time in tensor-core instructions on A100: the issue budget holds."""
    time = time_s(Shape(22016, 4096), scheme, 4096, A100)
    assert time.bound == "mma"
    assert time.mma == pytest.approx(2 * 4096 * 22016 * 4096 / 624e12, rel=0.01)  # 43 full rounds of 43.03


def test_small_groups_are_bound_by_issue() -> None:
    """Folding groups of 32 costs more instruction slots than the tensor cores of A100 leave."""
    assert time_s(Shape(22016, 4096), Scheme("group", 32), 4096, A100).bound == "issue"


def test_more_rows_never_take_less_time() -> None:
    """A cost model for choosing among policies must not reward a larger batch."""
    for shape in SHAPES:
        times = [time_s(shape, GROUP_128, m, A100).total for m in ROWS]
        assert times == sorted(times)


def test_tensor_core_clocks_follow_from_the_data_sheets() -> None:
    """A tensor-core instruction takes 8 clocks on A100 and 16 on Ada: data sheet and white paper agree."""
    clocks = {device.name: device.imma_clocks for device in DEVICES}
    assert clocks["A100"] == pytest.approx(8, rel=0.01)
    assert clocks["L40S"] == pytest.approx(16, rel=0.01)
    assert clocks["RTX 4090"] == pytest.approx(16, rel=0.01)


@pytest.mark.parametrize(("m", "scheme"), [(0, GROUP_128), (1, Scheme("group", 96))])
def test_impossible_problem_is_refused(m: int, scheme: Scheme) -> None:
    """No rows, and a group size that does not divide K, have no time."""
    with pytest.raises(ValueError, match="do not fit"):
        time_s(Shape(4096, 4096), scheme, m, A100)


def test_unknown_scheme_is_refused() -> None:
    """A scheme that no kernel is compiled for is an error, not a guess."""
    with pytest.raises(KeyError):
        time_s(Shape(4096, 4096), Scheme("group", 256), 1, A100)


def test_folding_schemes_have_no_tile_without_room_for_their_sums() -> None:
    """The 64 x 64 warp tile has no registers left for FP32 sums: the model may not offer it."""
    assert max(tile.warp_m * tile.warp_n for tile in tiles("80", GROUP_128)) == 64 * 32
