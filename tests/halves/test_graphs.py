"""The graphs of T5's halves: interface, torch's numbers, the cache, and what may be folded."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from fptq_export.graph_io import load_graph
from tests.families.registry import Family
from tests.families.support_table import Record
from tests.halves.conftest import FAMILY_OF_HALF, HALVES
from tests.support.halves import TeacherForced, check_sites, decoder_feed, seq2seq_model
from tests.support.traced import FP32_LOGITS, Traced, encoder_feed, run

Graphs = dict[str, Traced]


def _ids(batch: int, tokens: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(2, 512, (batch, tokens))


def _hidden(graphs: Graphs, source: NDArray[np.int64], mask: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
    hidden: NDArray[np.float32] = run(graphs["encoder"].model, encoder_feed(source, mask))["last_hidden_state"]
    return hidden


def _assert_equal(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


def test_the_decoder_has_the_promised_inputs_and_outputs(t5_graphs: Graphs) -> None:
    """Tokens, what the encoder gave and its mask, and the cache of self-attention alone."""
    graph = load_graph(t5_graphs["decoder"].model).graph
    cache = ("0.key", "0.value")
    past, present = (["batch", "4", length, "16"] for length in ("past", "past + sequence"))
    inputs = {value.name: (value.dtype, [str(dim) for dim in value.shape or ()]) for value in graph.inputs}
    assert inputs == {
        "input_ids": (ir.DataType.INT64, ["batch", "sequence"]),
        "encoder_hidden_states": (ir.DataType.FLOAT, ["batch", "source", "64"]),
        "encoder_attention_mask": (ir.DataType.INT64, ["batch", "source"]),
        **{f"past_key_values.{name}": (ir.DataType.FLOAT, past) for name in cache},
    }
    outputs = {value.name: [str(dim) for dim in value.shape or ()] for value in graph.outputs}
    assert outputs == {
        "logits": ["batch", "sequence", "512"],
        **{f"present.{name}": present for name in cache},
    }


@pytest.mark.parametrize(("batch", "sequence", "source"), [(1, 1, 9), (3, 6, 1)])
@pytest.mark.parametrize("name", HALVES)
def test_graphs_compute_what_torch_computes(
    t5_graphs: Graphs, name: str, batch: int, sequence: int, source: int
) -> None:
    """Any batch, sequence and source; of T5 1.1 the head is the one of the file, which the config says is tied."""
    sources, ids = _ids(batch, source), _ids(batch, sequence, 1)
    traced = t5_graphs[name]
    model = seq2seq_model(traced.checkpoint)
    with torch.inference_mode():
        hidden = model.encoder(input_ids=torch.from_numpy(sources)).last_hidden_state.numpy()
        expected = TeacherForced(model, name, sources)(torch.from_numpy(ids)).logits.numpy()
    feed = encoder_feed(ids) if name == "encoder" else decoder_feed(traced.model, ids, hidden)
    _assert_equal(run(traced.model, feed)["last_hidden_state" if name == "encoder" else "logits"], expected)


def test_a_call_behind_a_cache_is_the_end_of_the_whole(t5_graphs: Graphs, record: Record) -> None:
    """Relative positions go on counting behind the cache."""
    with record.cell(FAMILY_OF_HALF["decoder"], "kv") as cell:
        graph, ids, hidden = t5_graphs["decoder"].model, _ids(2, 7), _hidden(t5_graphs, _ids(2, 5, 1))
        whole = run(graph, decoder_feed(graph, ids, hidden))["logits"]
        before = run(graph, decoder_feed(graph, ids[:, :4], hidden))
        past = {name.replace("present", "past_key_values"): array for name, array in before.items() if name != "logits"}
        _assert_equal(run(graph, decoder_feed(graph, ids[:, 4:], hidden, past=past))["logits"], whole[:, 4:])
        cell.text = "concat"


def test_the_encoder_has_no_cache(t5_graphs: Graphs, record: Record) -> None:
    """Tokens and their mask in, hidden states out."""
    with record.cell(FAMILY_OF_HALF["encoder"], "kv") as cell:
        graph = load_graph(t5_graphs["encoder"].model).graph
        assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask"]
        assert [value.name for value in graph.outputs] == ["last_hidden_state"]
        cell.text = "none"


def test_padding_of_the_source_changes_nothing(t5_graphs: Graphs) -> None:
    """A padded source gives what it gives alone, in both graphs, whatever stands in the padding."""
    source, ids = _ids(2, 9), _ids(2, 4, 1)
    mask = np.ones_like(source)
    mask[1, 5:] = 0
    hidden = _hidden(t5_graphs, source, mask)
    alone = _hidden(t5_graphs, source[1:, :5])
    _assert_equal(hidden[1:, :5], alone)
    graph = t5_graphs["decoder"].model
    padded = run(graph, decoder_feed(graph, ids, hidden, mask))["logits"]
    _assert_equal(padded[1:], run(graph, decoder_feed(graph, ids[1:], alone))["logits"])


@pytest.mark.parametrize("half", HALVES)
def test_sites_are_found_without_a_table(t5_graphs: Graphs, half: str, record: Record) -> None:
    """Norms, either MLP and the values of either attention; of the decoder only what reads the source has none."""
    family: Family = FAMILY_OF_HALF[half]
    with record.cell(family, "sites") as cell:
        cell.text = check_sites(t5_graphs[half].sites, family)


def test_what_crosses_the_graphs_is_left_alone(t5_graphs: Graphs) -> None:
    """Keys and values of the source come from another graph, whose last norm therefore is no site either."""
    decoder = t5_graphs["decoder"].sites
    for name in "kv":
        linear = decoder.linear(f"decoder.block.0.layer.1.EncDecAttention.{name}")
        assert linear.site is None
        assert "graph input 'encoder_hidden_states'" in (linear.no_site_reason or "")
    consumed = set(decoder.site_by_consumer())
    assert not any(path.endswith(("EncDecAttention.k", "EncDecAttention.v")) for path in consumed)
    for half in ("encoder", "decoder"):
        producers = {part.initializer for site in t5_graphs[half].sites.fold_sites for part in site.producers}
        assert "encoder.final_layer_norm.weight" not in producers
    assert decoder.linear("lm_head").site == "decoder.final_layer_norm"
