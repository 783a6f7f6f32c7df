"""Equalization changes where a value stands, not what the model computes."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from calib.equalize import (
    LinearScales,
    closed_form_scale,
    equalized_weight,
    scales_from_sites,
)
from calib.equalizers import SiteStatistics, scale_from_formula
from fptq_export import numerics
from fptq_export.policy import SiteEqualization
from fptq_export.sites import Sites

FLOAT32_ULP = 2.0**-23
"""Spacing of float32 relative to 1; one rounding is off by at most half of it."""

LAE = SiteEqualization(method="lae")
maxima = hnp.arrays(np.float32, st.integers(1, 32), elements=st.floats(0.0, 2.0**100, width=32))


@given(maxima)
def test_scales_are_the_reference_rounded_once(absmax: NDArray[np.float32]) -> None:
    """Bit for bit the float64 formula rounded to float32, positive and finite for any maxima."""
    s = scale_from_formula(LAE, SiteStatistics(absmax))
    assert s.dtype == np.float32
    assert np.array_equal(s, numerics.equalization_from_absmax(absmax).astype(np.float32))
    assert np.isfinite(s).all()
    assert (s > 0).all()


@given(maxima)
def test_equalized_input_stays_within_its_closed_form_range(absmax: NDArray[np.float32]) -> None:
    """After x / s no channel exceeds log2(2 + v): two roundings (s, and x / s) above it, at most."""
    largest = (absmax / scale_from_formula(LAE, SiteStatistics(absmax))).max()
    assert largest <= numerics.equalized_absmax(float(absmax.max())) * (1 + 2 * FLOAT32_ULP)


def test_known_values() -> None:
    """Values by hand: m = 2 has s = 1; m = 6 has 6 / 3; a dead channel has 1; a tiny one is kept from 0."""
    s = scale_from_formula(LAE, SiteStatistics(np.array([2.0, 6.0, 0.0, 1e-30], np.float32)))
    assert s.tolist() == [1.0, 2.0, 1.0, np.float32(numerics.MIN_EQUALIZATION)]


def test_closed_form_scales() -> None:
    """V / 127 as it is, log2(2 + v) / 127 after equalization, 1 / 127 for an input that is always 0."""
    assert closed_form_scale(127.0, equalized=False) == 1.0
    assert closed_form_scale(2.0**127 - 2.0, equalized=True) == 1.0
    assert closed_form_scale(0.0, equalized=False) == float(np.float32(1 / 127))


def test_scales_reach_every_linear_of_a_site(sites: Sites) -> None:
    """A norm site scales its consumers' inputs; a gated site its consumer's input and its producer's output."""
    norm, gated = "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.up_proj"
    s = {norm: np.full(64, 2.0, np.float32), gated: np.full(128, 4.0, np.float32)}
    for order in ((norm, gated), (gated, norm)):
        scales = scales_from_sites(sites, order, s)
        assert set(scales) == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
        gate, up, down = (scales[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert (gate.input is s[norm], gate.output) == (True, None)
        assert (up.input is s[norm], up.output is s[gated]) == (True, True)
        assert (down.input is s[gated], down.output) == (True, None)


def test_parts_of_one_matrix_are_divided_apart(sites: Sites) -> None:
    """Two sites whose producers are rows of one linear: each divides its own rows, and the others keep theirs."""
    gated = sites.site("model.layers.0.mlp.up_proj")
    parts = [
        gated.model_copy(
            update={
                "id": f"part {span}", "channels": 32, "consumers": (),
                "producers": tuple(part.model_copy(update={"span": span}) for part in gated.producers),
            }
        )
        for span in ((0, 32), (64, 96))
    ]  # fmt: skip
    fused = sites.model_copy(update={"fold_sites": tuple(parts)})
    s = {part.id: np.full(32, 2.0 + index, np.float32) for index, part in enumerate(parts)}
    scales = scales_from_sites(fused, s, s)["model.layers.0.mlp.up_proj"]
    assert scales.input is None
    assert scales.output is not None
    assert scales.output.tolist() == [2.0] * 32 + [1.0] * 32 + [3.0] * 32 + [1.0] * 32


def test_sites_that_are_not_equalized_scale_nothing(sites: Sites) -> None:
    """Without an equalized site no linear is touched."""
    assert scales_from_sites(sites, (), {}) == {}


def test_weight_is_scaled_along_the_right_axes() -> None:
    """Columns are multiplied, rows divided; without scales the weight is the same object."""
    weight = torch.arange(6.0).reshape(2, 3)
    columns, rows = np.array([1.0, 2.0, 4.0], np.float32), np.array([1.0, 2.0], np.float32)
    expected = torch.tensor([[0.0, 2.0, 8.0], [1.5, 4.0, 10.0]])
    assert torch.equal(equalized_weight(weight, LinearScales(columns, rows)), expected)
    assert equalized_weight(weight, LinearScales()) is weight
    assert torch.equal(weight, torch.arange(6.0).reshape(2, 3))
