"""Encoders as graphs: the interface, the hidden states of torch, the sites."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph
from fptq_export.trace.encoder_from_hf import traced_encoder_from_config
from tests.support.models import BERT_POSITIONS, ESM_MASK
from tests.support.traced import FP32_LOGITS, Traced, encoder_feed, run, torch_hidden

ENCODERS = ("bert_fp32", "esm_fp32")


def _ids(batch: int, sequence: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(ESM_MASK + 1, 512, (batch, sequence))


def _hidden(traced: Traced, feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
    segments = {"token_type_ids": np.zeros_like(feed["input_ids"])}
    names = {value.name for value in onnx.load(traced.model, load_external_data=False).graph.input}
    result: NDArray[np.float32] = run(
        traced.model, {name: array for name, array in {**segments, **feed}.items() if name in names}
    )["last_hidden_state"]
    return result


def _assert_equal(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


@pytest.mark.parametrize(("model", "segments"), [("bert_fp32", True), ("esm_fp32", False)])
def test_inputs_and_output_are_named_and_typed_as_promised(
    request: pytest.FixtureRequest, model: str, segments: bool
) -> None:
    """Tokens in, hidden states out, no cache; segments only where the model has more than one."""
    graph = load_graph(request.getfixturevalue(model).model).graph
    tokens = (ir.DataType.INT64, ["batch", "sequence"])
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if segments else [])]
    found = {value.name: (value.dtype, [str(dim) for dim in value.shape or ()]) for value in graph.inputs}
    assert found == dict.fromkeys(names, tokens)
    (output,) = graph.outputs
    assert (output.name, output.dtype) == ("last_hidden_state", ir.DataType.FLOAT)
    assert [str(dim) for dim in output.shape or ()] == ["batch", "sequence", "64"]


@pytest.mark.parametrize("model", ENCODERS)
@pytest.mark.parametrize(("batch", "sequence"), [(1, 7), (3, 1)])
def test_hidden_states_equal_torch(request: pytest.FixtureRequest, model: str, batch: int, sequence: int) -> None:
    """Any batch and sequence: no dimension was frozen at its sample size, the file's prefix and names were resolved."""
    traced: Traced = request.getfixturevalue(model)
    feed = encoder_feed(_ids(batch, sequence))
    _assert_equal(_hidden(traced, feed), torch_hidden(traced.checkpoint, feed))


@pytest.mark.parametrize("model", ENCODERS)
def test_padding_changes_nothing(request: pytest.FixtureRequest, model: str) -> None:
    """A padded text has the hidden states it has alone, whatever stands in the padding."""
    traced: Traced = request.getfixturevalue(model)
    ids = _ids(2, 9)
    mask = np.ones_like(ids)
    mask[1, 5:] = 0
    padded = _hidden(traced, encoder_feed(np.where(mask == 1, ids, 1), mask))[1, :5]
    _assert_equal(padded, _hidden(traced, encoder_feed(ids[1:, :5]))[0])


def test_segments_are_told_apart(bert_fp32: Traced) -> None:
    """The second segment's embedding is used, as in torch."""
    feed = encoder_feed(_ids(1, 6), token_type_ids=np.array([[0, 0, 0, 1, 1, 1]]))
    actual = _hidden(bert_fp32, feed)
    _assert_equal(actual, torch_hidden(bert_fp32.checkpoint, feed))
    assert np.abs(actual - _hidden(bert_fp32, encoder_feed(_ids(1, 6)))).max() > FP32_LOGITS * np.abs(actual).max()


def test_masked_residues_scale_the_others(esm_fp32: Traced) -> None:
    """ESM-2 zeroes masked tokens and scales a text by its share of them, padding not counted."""
    ids = _ids(2, 8)
    ids[0, 2] = ids[1, 1] = ESM_MASK
    mask = np.ones_like(ids)
    mask[1, 4:] = 0
    feed = encoder_feed(np.where(mask == 1, ids, 1), mask)
    _assert_equal(_hidden(esm_fp32, feed)[mask == 1], torch_hidden(esm_fp32.checkpoint, feed)[mask == 1])


def test_a_table_of_positions_is_a_limit(bert_fp32: Traced, esm_fp32: Traced) -> None:
    """Longer texts than BERT's table are known to fail; rotary positions have no end."""
    assert bert_fp32.sites.max_sequence == BERT_POSITIONS
    assert esm_fp32.sites.max_sequence is None


def test_post_norm_has_value_sites_only(bert_fp32: Traced) -> None:
    """BERT's norms also feed the residual: they must not be scaled, and the reason names the addition."""
    sites = bert_fp32.sites
    assert {site.kind for site in sites.fold_sites} == {"attention_value"}
    assert [site.consumers for site in sites.fold_sites] == [
        (f"encoder.layer.{layer}.attention.output.dense",) for layer in range(2)
    ]
    value = sites.fold_sites[0]
    name = "encoder.layer.0.attention.self.value"
    assert [part.initializer for part in value.producers] == [f"{name}.weight", f"{name}.bias"]
    for path in (name, "encoder.layer.0.intermediate.dense"):
        assert "also read by Add" in (sites.linear(path).no_site_reason or "")
    assert "Gelu" in (sites.linear("encoder.layer.0.output.dense").no_site_reason or "")


def test_pre_norm_has_norm_sites(esm_fp32: Traced) -> None:
    """ESM-2 is scaled at both norms, weight and bias, and at the values; the contact head is not in the graph."""
    sites = esm_fp32.sites
    attention = "encoder.layer.0.attention"
    expected = {
        f"{attention}.LayerNorm": tuple(f"{attention}.self.{name}" for name in ("query", "key", "value")),
        "encoder.layer.0.LayerNorm": ("encoder.layer.0.intermediate.dense",),
        f"{attention}.self.value": (f"{attention}.output.dense",),
    }
    assert {site.id: site.consumers for site in sites.fold_sites} == expected
    assert [site.kind for site in sites.fold_sites] == ["norm", "norm", "attention_value"]
    assert all(len(site.producers) == 2 for site in sites.fold_sites)
    assert [linear.path for linear in sites.unmatched] == ["contact_head.regression"]


def test_a_model_of_images_is_refused() -> None:
    """What takes no tokens says so before torch traces it."""
    from transformers import ViTConfig

    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(UserError, match="takes no input_ids"):
        traced_encoder_from_config(config, "fp32")
