"""Folding equalization changes no family's output: exactly in float64, within rounding in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.rewrite.fold_equalization import FoldEqualization
from tests.families.conftest import InFloat64, Trace
from tests.families.registry import ENCODERS, FAMILIES, Family
from tests.families.support_table import Record
from tests.support.float64 import fold, lognormal_scales, output_in_float64
from tests.support.traced import FP32_LOGITS, run, token_feed

EXACT = 1e-10
"""Of the largest output. float64 has 2^-53 = 1.1e-16; some 40 operations in a row, each a sum of up to 256 terms, and s
that differ by 1e3, leave four digits of room. An inexact fold is off by parts of the output itself."""
ROUNDED = FP32_LOGITS * (256 / 128) ** 0.5
"""As the bound of two FP32 programs for one model, with sums of up to 256 terms."""


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_folds_are_exact(
    family: Family, trace: Trace, in_float64: InFloat64, ids: NDArray[np.int64], record: Record, tmp_path: Path
) -> None:
    """Every site at once, s from 0.01 to 100: the torch model in float64, and the FP32 graph in ONNX Runtime."""
    with record.cell(family, "folds") as cell:
        traced = trace(family)
        scales = lognormal_scales(traced.sites.fold_sites)
        model = in_float64(family)
        exact = output_in_float64(model, ids)
        for site in traced.sites.fold_sites:
            fold(model, site, scales[site.id])
        largest = float(exact.abs().max())
        assert float((output_in_float64(model, ids) - exact).abs().max()) <= EXACT * largest

        graph = load_graph(traced.model)
        FoldEqualization(traced.sites, scales)(graph)
        folded = tmp_path / "folded.onnx"
        write_weights(graph, data_path(folded))
        save_graph(graph, folded)
        for path in (traced.model, folded):
            output = run(path, token_feed(path, ids), outputs=[family.output])[family.output]
            np.testing.assert_allclose(output, exact.numpy(), rtol=0.0, atol=ROUNDED * largest)
        cell.text = "exact"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_consumer_left_out_is_seen(
    family: Family, trace: Trace, in_float64: InFloat64, ids: NDArray[np.int64]
) -> None:
    """The comparison above can fail for each site: without one of its linears, and without a router, it does."""
    traced = trace(family)
    scales = lognormal_scales(traced.sites.fold_sites)
    exact = output_in_float64(in_float64(family), ids)
    far = 1e-3 * float(exact.abs().max())
    for site in traced.sites.fold_sites:
        routers = [path for path in site.consumers if traced.sites.linear(path).float_reason is not None]
        for left_out in {site.consumers[0], *routers}:
            model = in_float64(family)
            others = tuple(path for path in site.consumers if path != left_out)
            fold(model, site.model_copy(update={"consumers": others}), scales[site.id])
            assert not torch.allclose(output_in_float64(model, ids), exact, rtol=0.0, atol=far)


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.key)
def test_a_value_bias_left_out_is_seen(
    family: Family, trace: Trace, in_float64: InFloat64, ids: NDArray[np.int64]
) -> None:
    """The bias of a value projection is divided with its weight: without it the output is far away."""
    model = in_float64(family)
    exact = output_in_float64(model, ids)
    site = next(site for site in trace(family).sites.fold_sites if site.kind == "attention_value")
    assert [producer.initializer.rpartition(".")[2] for producer in site.producers] == ["weight", "bias"]
    broken = site.model_copy(update={"producers": site.producers[:1]})
    fold(model, broken, lognormal_scales([site])[site.id])
    assert float((output_in_float64(model, ids) - exact).abs().max()) > 1e-3 * float(exact.abs().max())
