"""The graphs of Whisper's halves: interface, torch's numbers, the cache, sites and folds, and what is left alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fptq_export.graph_io import load_graph
from fptq_export.policy import read_policy
from tests.families.support_table import Record
from tests.families.test_folds import EXACT, ROUNDED
from tests.halves.conftest import HALVES, SPEECH_FAMILY_OF_HALF
from tests.support.float64 import fold, lognormal_scales, output_in_float64
from tests.support.halves import SpeechForced, check_sites, folded_graph, seq2seq_model, speech_feed
from tests.support.traced import FP32_LOGITS, Traced, run

Graphs = dict[str, Traced]
OUTPUTS = {"encoder": "last_hidden_state", "decoder": "logits"}
IDS = np.random.default_rng(4).integers(3, 512, (2, 9))
CONVOLUTIONS = ("model.encoder.conv1", "model.encoder.conv2")


def _features(batch: int = 2, seed: int = 5) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, 16, 24), np.float32)


def _exact(model: torch.nn.Module, half: str) -> torch.Tensor:
    return output_in_float64(SpeechForced(model, half, _features()), IDS)


def _of_graph(
    graph: Path, half: str, ids: NDArray[np.int64], features: NDArray[np.float32], model: torch.nn.Module
) -> NDArray[np.float32]:
    """Output of a half's graph; the decoder's behind the hidden states that torch gives."""
    feed: dict[str, NDArray[Any]] = {"input_features": features}
    if half == "decoder":
        with torch.inference_mode():
            hidden = SpeechForced(model, "encoder", features)(torch.empty(0)).logits.numpy()
        feed = speech_feed(graph, ids, hidden)
    output: NDArray[np.float32] = run(graph, feed, outputs=[OUTPUTS[half]])[OUTPUTS[half]]
    return output


def _dims(values: list[ir.Value]) -> dict[str, list[str]]:
    return {value.name or "": [str(dim) for dim in value.shape or ()] for value in values}


def test_the_encoder_reads_features_of_one_length(whisper_graphs: Graphs, record: Record) -> None:
    """Mel features in, a hidden state a position out; only the batch is dynamic, and there is no mask and no cache."""
    with record.cell(SPEECH_FAMILY_OF_HALF["encoder"], "kv") as cell:
        graph = load_graph(whisper_graphs["encoder"].model).graph
        assert _dims(list(graph.inputs)) == {"input_features": ["batch", "16", "24"]}
        assert _dims(list(graph.outputs)) == {"last_hidden_state": ["batch", "12", "64"]}
        cell.text = "none"


def test_the_decoder_reads_all_positions_of_the_encoder(whisper_graphs: Graphs) -> None:
    """Tokens, hidden states that need no mask, and the cache of self-attention alone; positions end with the table."""
    traced = whisper_graphs["decoder"]
    graph = load_graph(traced.model).graph
    past, present = (["batch", "4", length, "16"] for length in ("past", "past + sequence"))
    assert _dims(list(graph.inputs)) == {
        "input_ids": ["batch", "sequence"],
        "encoder_hidden_states": ["batch", "12", "64"],
        "past_key_values.0.key": past,
        "past_key_values.0.value": past,
    }
    outputs = {"logits": ["batch", "sequence", "512"], "present.0.key": present, "present.0.value": present}
    assert _dims(list(graph.outputs)) == outputs
    assert traced.sites.max_sequence == 96


@pytest.mark.parametrize(("batch", "sequence"), [(1, 1), (3, 6)])
@pytest.mark.parametrize("half", HALVES)
def test_graphs_compute_what_torch_computes(whisper_graphs: Graphs, half: str, batch: int, sequence: int) -> None:
    """Any batch, and any number of tokens."""
    traced, features = whisper_graphs[half], _features(batch)
    ids = np.random.default_rng(1).integers(3, 512, (batch, sequence))
    model = seq2seq_model(traced.checkpoint)
    with torch.inference_mode():
        expected = SpeechForced(model, half, features)(torch.from_numpy(ids)).logits.numpy()
    actual = _of_graph(traced.model, half, ids, features, model)
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


def test_a_call_behind_a_cache_is_the_end_of_the_whole(whisper_graphs: Graphs, record: Record) -> None:
    """Positions go on counting behind the cache."""
    with record.cell(SPEECH_FAMILY_OF_HALF["decoder"], "kv") as cell:
        graph, hidden = (
            whisper_graphs["decoder"].model,
            np.random.default_rng(2).standard_normal((2, 12, 64), np.float32),
        )
        whole = run(graph, speech_feed(graph, IDS, hidden))["logits"]
        before = run(graph, speech_feed(graph, IDS[:, :4], hidden))
        past = {name.replace("present", "past_key_values"): array for name, array in before.items() if name != "logits"}
        rest = run(graph, speech_feed(graph, IDS[:, 4:], hidden, past))["logits"]
        np.testing.assert_allclose(rest, whole[:, 4:], rtol=0.0, atol=FP32_LOGITS * np.abs(whole).max())
        cell.text = "concat"


@pytest.mark.parametrize("half", HALVES)
def test_sites_are_those_of_the_architecture(whisper_graphs: Graphs, half: str, record: Record) -> None:
    """Norms, the head and the values of every attention; what is behind a GELU or reads another graph says why not."""
    family = SPEECH_FAMILY_OF_HALF[half]
    with record.cell(family, "sites") as cell:
        cell.text = check_sites(whisper_graphs[half].sites, family)


@pytest.mark.parametrize("half", HALVES)
def test_folds_are_exact(whisper_graphs: Graphs, half: str, record: Record, tmp_path: Path) -> None:
    """Every site at once, s from 0.01 to 100, biases too: torch in float64, and the FP32 graph in ONNX Runtime."""
    with record.cell(SPEECH_FAMILY_OF_HALF[half], "folds") as cell:
        traced = whisper_graphs[half]
        scales = lognormal_scales(traced.sites.fold_sites)
        model = seq2seq_model(traced.checkpoint, torch.float64)
        exact = _exact(model, half)
        largest = float(exact.abs().max())
        for site in traced.sites.fold_sites:
            assert [part.initializer.rpartition(".")[2] for part in site.producers] == ["weight", "bias"]
            fold(model, site, scales[site.id])
        assert 0.0 < float((_exact(model, half) - exact).abs().max()) <= EXACT * largest

        folded = folded_graph(traced, scales, tmp_path / "folded.onnx")
        for path in (traced.model, folded):
            output = _of_graph(path, half, IDS, _features(), seq2seq_model(traced.checkpoint))
            np.testing.assert_allclose(output, exact.numpy(), rtol=0.0, atol=ROUNDED * largest)
        cell.text = "exact"


@pytest.mark.parametrize("half", HALVES)
def test_a_consumer_or_a_bias_left_out_is_seen(whisper_graphs: Graphs, half: str) -> None:
    """The comparison can fail for each site: without one of its linears, or without its bias, outputs are far away."""
    traced = whisper_graphs[half]
    scales = lognormal_scales(traced.sites.fold_sites)
    exact = _exact(seq2seq_model(traced.checkpoint, torch.float64), half)
    for site in traced.sites.fold_sites:
        for broken in ({"consumers": site.consumers[1:]}, {"producers": site.producers[:1]}):
            model = seq2seq_model(traced.checkpoint, torch.float64)
            fold(model, site.model_copy(update=broken), scales[site.id])
            difference = float((_exact(model, half) - exact).abs().max())
            assert difference > 1e-3 * float(exact.abs().max()), (site.id, broken)


def test_the_convolutions_stay_as_they_are(whisper_run: Path, whisper_graphs: Graphs) -> None:
    """Their weights and biases in the quantized graph are the checkpoint's; no policy and no site speaks of them."""
    tensors = load_file(whisper_graphs["encoder"].checkpoint / "model.safetensors")
    graph = load_graph(whisper_run / "encoder" / "model.w4a8.onnx").graph
    nodes = [node for node in graph if node.op_type == "Conv"]
    assert len(nodes) == len(CONVOLUTIONS)
    for path, node in zip(CONVOLUTIONS, nodes, strict=True):
        for name, value in zip(("weight", "bias"), node.inputs[1:], strict=True):
            assert value is not None
            assert value.const_value is not None
            np.testing.assert_array_equal(value.const_value.numpy(), tensors[f"{path}.{name}"])
    sites = whisper_graphs["encoder"].sites
    touched = {part.initializer for site in sites.fold_sites for part in site.producers}
    assert not any(name.startswith(CONVOLUTIONS) for name in (*touched, *sites.paths()))
    assert not any(
        path.startswith(CONVOLUTIONS) for path in read_policy(whisper_run / "encoder" / "policy.json").layers
    )


def test_what_reads_the_encoder_is_not_folded_into_the_decoder(whisper_graphs: Graphs) -> None:
    """Cross-attention's norm scales its queries alone; keys and values, and the encoder's last norm, have no site."""
    decoder = whisper_graphs["decoder"].sites
    attention = "model.decoder.layers.0.encoder_attn"
    assert decoder.site(f"{attention}_layer_norm").consumers == (f"{attention}.q_proj",)
    consumed = decoder.site_by_consumer()
    for name in ("k_proj", "v_proj"):
        assert f"{attention}.{name}" not in consumed
        assert "graph input 'encoder_hidden_states'" in (decoder.linear(f"{attention}.{name}").no_site_reason or "")
    for half in HALVES:
        producers = {part.initializer for site in whisper_graphs[half].sites.fold_sites for part in site.producers}
        assert not producers & {"model.encoder.layer_norm.weight", "model.encoder.layer_norm.bias"}
