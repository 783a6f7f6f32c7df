"""Folds of T5's halves: exact in float64 torch, equal in the FP32 graphs, seen where one is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.families.support_table import Record
from tests.families.test_folds import EXACT, ROUNDED
from tests.halves.conftest import FAMILY_OF_HALF, HALVES
from tests.support.float64 import fold, lognormal_scales, output_in_float64
from tests.support.halves import TeacherForced, decoder_feed, folded_graph, seq2seq_model
from tests.support.traced import Traced, encoder_feed, run

Graphs = dict[str, Traced]
SOURCE, IDS = (np.random.default_rng(seed).integers(2, 512, (2, 9)) for seed in (4, 5))


def _exact(model: torch.nn.Module, half: str) -> torch.Tensor:
    return output_in_float64(TeacherForced(model, half, SOURCE), IDS)


def _of_graph(graph: Path, half: str, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
    if half == "encoder":
        feed, output = encoder_feed(IDS), "last_hidden_state"
    else:
        feed, output = decoder_feed(graph, IDS, hidden), "logits"
    result: NDArray[np.float32] = run(graph, feed, outputs=[output])[output]
    return result


@pytest.mark.parametrize("half", HALVES)
def test_folds_are_exact(t5_graphs: Graphs, half: str, record: Record, tmp_path: Path) -> None:
    """Every site at once, s from 0.01 to 100: torch in float64, and the FP32 graph in ONNX Runtime."""
    with record.cell(FAMILY_OF_HALF[half], "folds") as cell:
        traced = t5_graphs[half]
        scales = lognormal_scales(traced.sites.fold_sites)
        model = seq2seq_model(traced.checkpoint, torch.float64)
        exact, largest = _exact(model, half), float(_exact(model, half).abs().max())
        with torch.inference_mode():
            hidden = (
                seq2seq_model(traced.checkpoint).encoder(input_ids=torch.from_numpy(SOURCE)).last_hidden_state.numpy()
            )
        for site in traced.sites.fold_sites:
            fold(model, site, scales[site.id])
        assert 0.0 < float((_exact(model, half) - exact).abs().max()) <= EXACT * largest

        folded = folded_graph(traced, scales, tmp_path / "folded.onnx")
        for path in (traced.model, folded):
            np.testing.assert_allclose(_of_graph(path, half, hidden), exact.numpy(), rtol=0.0, atol=ROUNDED * largest)
        cell.text = "exact"


@pytest.mark.parametrize("half", HALVES)
def test_a_consumer_left_out_is_seen(t5_graphs: Graphs, half: str) -> None:
    """The comparison can fail for each site: without one of its linears the outputs are far away."""
    traced = t5_graphs[half]
    scales = lognormal_scales(traced.sites.fold_sites)
    exact = _exact(seq2seq_model(traced.checkpoint, torch.float64), half)
    for site in traced.sites.fold_sites:
        model = seq2seq_model(traced.checkpoint, torch.float64)
        fold(model, site.model_copy(update={"consumers": site.consumers[1:]}), scales[site.id])
        difference = float((_exact(model, half) - exact).abs().max())
        assert difference > 1e-3 * float(exact.abs().max()), site.id


def test_the_last_norm_of_the_encoder_cannot_be_folded(t5_graphs: Graphs) -> None:
    """Divided, with keys and values of every layer multiplied, the logits stay; the encoder's own output does not."""
    model = seq2seq_model(t5_graphs["decoder"].checkpoint, torch.float64)
    before = {half: _exact(model, half) for half in HALVES}
    s = torch.from_numpy(np.random.default_rng(0).lognormal(sigma=1.5, size=64))
    with torch.no_grad():
        model.encoder.final_layer_norm.weight.div_(s)
        for block in model.decoder.block:
            for name in "kv":
                getattr(block.layer[1].EncDecAttention, name).weight.mul_(s)
    change = {half: float((_exact(model, half) - it).abs().max() / it.abs().max()) for half, it in before.items()}
    assert change["decoder"] <= EXACT
    assert change["encoder"] > 1e-3
