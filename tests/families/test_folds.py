"""Folding equalization changes no family's logits: exactly in float64, within rounding in the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.rewrite.fold_equalization import FoldEqualization
from tests.families.conftest import Trace
from tests.families.float64 import fold, logits_in_float64, lognormal_scales, model_in_float64
from tests.families.registry import FAMILIES, Family
from tests.families.support_table import Record
from tests.support.traced import FP32_LOGITS, causal_feed, run

EXACT = 1e-10
"""Of the largest logit. float64 has 2^-53 = 1.1e-16; some 40 operations in a row, each a sum of up to 256 terms, and s
that differ by 1e3, leave four digits of room. An inexact fold is off by parts of the logit itself."""
ROUNDED = FP32_LOGITS * (256 / 128) ** 0.5
"""As the bound of two FP32 programs for one model, with sums of up to 256 terms."""


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_folds_are_exact(family: Family, trace: Trace, ids: NDArray[np.int64], record: Record, tmp_path: Path) -> None:
    """Every site at once, s from 0.01 to 100: the torch model in float64, and the FP32 graph in ONNX Runtime."""
    with record.cell(family, "folds") as cell:
        traced = trace(family)
        scales = lognormal_scales(traced.sites.fold_sites)
        model = model_in_float64(traced.checkpoint)
        exact = logits_in_float64(model, ids)
        for site in traced.sites.fold_sites:
            fold(model, site, scales[site.id])
        largest = float(exact.abs().max())
        assert float((logits_in_float64(model, ids) - exact).abs().max()) <= EXACT * largest

        graph = load_graph(traced.model)
        FoldEqualization(traced.sites, scales)(graph)
        folded = tmp_path / "folded.onnx"
        write_weights(graph, data_path(folded))
        save_graph(graph, folded)
        before, after = (run(path, causal_feed(path, ids), outputs=["logits"]) for path in (traced.model, folded))
        np.testing.assert_allclose(before["logits"], exact.numpy(), rtol=0.0, atol=ROUNDED * largest)
        np.testing.assert_allclose(after["logits"], exact.numpy(), rtol=0.0, atol=ROUNDED * largest)
        cell.text = "exact"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_consumer_left_out_is_seen(family: Family, trace: Trace, ids: NDArray[np.int64]) -> None:
    """The comparison above can fail for each site: with one of its linears left out the logits are far away."""
    traced = trace(family)
    scales = lognormal_scales(traced.sites.fold_sites)
    exact = logits_in_float64(model_in_float64(traced.checkpoint), ids)
    for site in traced.sites.fold_sites:
        model = model_in_float64(traced.checkpoint)
        fold(model, site.model_copy(update={"consumers": site.consumers[1:]}), scales[site.id])
        assert not torch.allclose(logits_in_float64(model, ids), exact, rtol=0.0, atol=1e-3 * float(exact.abs().max()))
