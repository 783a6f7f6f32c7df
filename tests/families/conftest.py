"""Every family's tiny model, traced and quantized once a session, and the record of what its tests showed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import nn

from fptq_export.policy import Activation
from fptq_export.sites import Sites
from tests.families.registry import Family, config_of
from tests.support.float64 import model_in_float64
from tests.support.models import model_once
from tests.support.rewritten import Rewritten, rewritten_with
from tests.support.traced import Traced, traced_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

__all__ = ["InFloat64", "Quantize", "Trace"]

InFloat64 = Callable[[Family], nn.Module]
Trace = Callable[[Family], Traced]
Quantize = Callable[[Family], Rewritten]


@pytest.fixture(scope="session")
def ids() -> NDArray[np.int64]:
    """Tokens to calibrate with and to compare on, [2, 12]: more than the sliding window."""
    return np.random.default_rng(7).integers(0, 512, (2, 12))


@pytest.fixture(scope="session")
def trace(make_model_dir: ModelDirFactory, request: pytest.FixtureRequest) -> Trace:
    """Give the FP32 graph of a family: that of its run, or traced with the first call."""

    def once(family: Family) -> Traced:
        if family.run is None:
            return traced_once(model_once(make_model_dir, config_of(family)), "fp32")
        graph: Traced = request.getfixturevalue(family.run.replace("_run", "_fp32"))
        return graph

    return once


@pytest.fixture(scope="session")
def in_float64(trace: Trace) -> InFloat64:
    """Give a copy of a family's model in float64, loaded with the first call."""
    done: dict[str, nn.Module] = {}

    def once(family: Family) -> nn.Module:
        if family.key not in done:
            done[family.key] = model_in_float64(trace(family).checkpoint)
        return copy.deepcopy(done[family.key])

    return once


@pytest.fixture(scope="session")
def quantize(trace: Trace, ids: NDArray[np.int64], tmp_path_factory: pytest.TempPathFactory) -> Quantize:
    """Give every form of a family's graph under a policy with all three tiers, made with the first call."""
    done: dict[str, Rewritten] = {}

    def once(family: Family) -> Rewritten:
        if family.key not in done:
            traced = trace(family)
            done[family.key] = rewritten_with(
                traced, tiers_of_all(traced.sites), ids, tmp_path_factory.mktemp(family.key)
            )
        return done[family.key]

    return once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Compare the support table when all its cells have run."""
    items.sort(key=lambda item: item.name == "test_table_in_the_readme_is_what_was_shown")


def tiers_of_all(sites: Sites) -> dict[str, Activation]:
    """A tier for every linear but routers, the head too.

    With a site every second input is equalized, at extension sites where the FPTQ rule has none; others take turns.
    """
    with_site: tuple[Activation, ...] = ("lae_static", "per_token")
    without: tuple[Activation, ...] = ("static", "per_token")
    of_rule = {linear.path for linear in sites.linears if linear.site is not None}
    equalizable = of_rule or sites.site_by_consumer().keys()
    quantized = [linear for linear in sites.linears if linear.float_reason is None]
    by_input = {linear.input: linear.path in equalizable for linear in quantized}
    tiers: dict[str, Activation] = {}
    for choices, has_site in ((with_site, True), (without, False)):
        inputs = [name for name, found in by_input.items() if found is has_site]
        tiers |= {name: choices[index % len(choices)] for index, name in enumerate(inputs)}
    return {linear.path: tiers[linear.input] for linear in quantized}
