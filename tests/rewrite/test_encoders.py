"""Folds of encoders: exact in float64 torch, equal in the FP32 graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.load import checkpoint_from_directory, model_from_checkpoint
from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.rewrite.fold_equalization import FoldEqualization
from fptq_export.sites import FoldSite, Sites
from tests.support.traced import FP32_LOGITS, Traced, encoder_feed, run

FLOAT64_FOLD = 1e-10
"""Relative to the largest hidden state. Rounding explains 32 operations x sqrt(128) x 2^-53 x a spread of scales of
10^3 = 4e-11; an error of the fold itself is of the order of 1."""
ENCODERS = ("bert_fp32", "esm_fp32")


def _scales(sites: Sites) -> dict[str, NDArray[np.float32]]:
    """Lognormal s: channels differ by factors of a thousand."""
    random = np.random.default_rng(0)
    return {site.id: random.lognormal(sigma=1.5, size=site.channels).astype(np.float32) for site in sites.fold_sites}


def _ids() -> NDArray[np.int64]:
    return np.random.default_rng(1).integers(40, 512, (2, 9))


def _hidden(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        hidden: torch.Tensor = model(input_ids=torch.from_numpy(_ids())).last_hidden_state
    return hidden.clone()


def _fold(model: torch.nn.Module, site: FoldSite, s: torch.Tensor) -> None:
    """Divide what makes the tensor, multiply what reads it, by the words of `sites.json` alone."""
    for part in site.producers:
        rows = s if part.initializer.endswith("bias") or site.producer_linear is None else s[:, None]
        model.get_parameter(part.initializer).div_(rows)
    for path in site.consumers:
        model.get_parameter(f"{path}.weight").mul_(s)


@pytest.mark.parametrize("name", ENCODERS)
def test_folds_are_exact_in_float64(request: pytest.FixtureRequest, name: str) -> None:
    """Every site at once: what a site names as producers and consumers is all there is to change."""
    traced: Traced = request.getfixturevalue(name)
    checkpoint = checkpoint_from_directory(traced.checkpoint, "encoder")
    model = model_from_checkpoint(checkpoint, torch.float64)
    before = _hidden(model)
    scales = _scales(traced.sites)
    with torch.no_grad():
        for site in traced.sites.fold_sites:
            _fold(model, site, torch.from_numpy(scales[site.id]).double())
    error = (_hidden(model) - before).abs().max() / before.abs().max()
    assert 0.0 < error <= FLOAT64_FOLD


@pytest.mark.parametrize("name", ENCODERS)
def test_folds_leave_the_hidden_states_of_the_graph(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> None:
    """The FP32 graph before quantization: lognormal scales in all sites, biases included."""
    traced: Traced = request.getfixturevalue(name)
    model = load_graph(traced.model)
    FoldEqualization(traced.sites, _scales(traced.sites))(model)
    folded = tmp_path / "folded.onnx"
    write_weights(model, data_path(folded))
    save_graph(model, folded)
    feed = encoder_feed(_ids())
    if name == "bert_fp32":
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    before, after = (run(graph, feed)["last_hidden_state"] for graph in (traced.model, folded))
    np.testing.assert_allclose(after, before, rtol=0.0, atol=FP32_LOGITS * np.abs(before).max())
    assert (after != before).any(), "nothing was folded"


def test_a_forgotten_value_bias_is_seen(bert_fp32: Traced) -> None:
    """The comparison in float64 can fail: the bias of a value projection is part of the producer."""
    model = model_from_checkpoint(checkpoint_from_directory(bert_fp32.checkpoint, "bert"), torch.float64)
    before = _hidden(model)
    site = bert_fp32.sites.fold_sites[0]
    broken = site.model_copy(update={"producers": site.producers[:1]})
    with torch.no_grad():
        _fold(model, broken, torch.from_numpy(_scales(bert_fp32.sites)[site.id]).double())
    assert (_hidden(model) - before).abs().max() / before.abs().max() > 1e6 * FLOAT64_FOLD
