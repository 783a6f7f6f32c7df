"""Inputs of linears as the equalized graph holds them: which site, which scales, what calibration saw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.equalized_inputs import EqualizedInputs
from fptq_export.errors import UserError
from fptq_export.policy import LayerPolicy, Policy, PolicyArrays, Rule, SiteEqualization, arrays_path, write_policy
from fptq_export.sites import Sites
from tests.support.traced import Traced

ABSMAX = np.array([8.0, 1.0, 4.0, 0.5], np.float32)
S = np.array([4.0, 1.0, 2.0, 0.25], np.float32)

Make = Callable[..., EqualizedInputs]


def layer(site: str | None, in_features: int = 4) -> LayerPolicy:
    """A quantized linear at a site."""
    return LayerPolicy(
        precision="w8a8", activation="static", reason="made up", in_features=in_features, out_features=1,
        activation_scale=1.0, site=site,
    )  # fmt: skip


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Layers `at` (a site that is equalized), `plain` (another) and `bare` (nothing was measured of it)."""

    def inputs(sites: Sites | None = None, **changed: NDArray[Any]) -> EqualizedInputs:
        policy = Policy(
            model="tiny",
            rule=Rule(),
            layers={"at": layer("norm"), "plain": layer("other"), "bare": layer("norm")},
            equalization={"norm": SiteEqualization(method="lae")},
        )
        arrays = {"at.input_absmax": ABSMAX, "plain.input_absmax": ABSMAX, "norm.equalization": S, **changed}
        path = tmp_path / "policy.json"
        write_policy(policy, arrays, path)
        return EqualizedInputs(policy, PolicyArrays(arrays_path(path)), sites)

    return inputs


def test_an_equalized_input_is_divided(make: Make) -> None:
    """The maxima of a linear behind an equalized site are those of x / s."""
    found = make()
    assert found.site("at") == "norm"
    np.testing.assert_array_equal(found.channel_absmax("at"), ABSMAX / S)
    assert found.absmax("at") == 2.0


def test_an_input_at_another_site_is_left_alone(make: Make) -> None:
    """A site that the policy does not equalize divides nothing."""
    found = make()
    assert found.site("plain") is None
    assert found.scales("plain") is None
    np.testing.assert_array_equal(found.channel_absmax("plain"), ABSMAX)


def test_what_was_not_measured_is_not_known(make: Make) -> None:
    """A policy that a person wrote has no maxima; its scales are there all the same."""
    found = make()
    assert found.absmax("bare") is None
    np.testing.assert_array_equal(found.scales("bare"), S)


def test_sites_json_comes_before_the_policy(make: Make, llama_fp32: Traced) -> None:
    """Where it is at hand, it says what a linear reads, extension sites too: the policy names those of the rule."""
    norm = llama_fp32.sites.fold_sites[0].model_copy(update={"id": "norm", "consumers": ("plain",)})
    found = make(llama_fp32.sites.model_copy(update={"fold_sites": (norm,)}))
    np.testing.assert_array_equal(found.channel_absmax("plain"), ABSMAX / S)


def test_scales_of_another_shape_are_refused(make: Make) -> None:
    """They belong to another model: the array is named."""
    found = make(**{"norm.equalization": S[:2]})
    with pytest.raises(UserError, match=r"norm\.equalization"):
        found.channel_absmax("at")
