from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export import numerics
from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.graph_form import GraphForm, bring_into_form
from fptq_export.rewrite.quantize_cache import QuantizeCache
from fptq_export.rewrite.static_cache import StaticCache
from tests.rewrite.test_static_cache import SLOTS, TOY, TOY_ROUNDING, next_past, static_feed, toy_graph
from tests.support.graphs import by_type
from tests.support.traced import Traced, causal_feed, run

WINDOW = 3
CACHE_TYPES = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT8: np.int8}
"""ONNX element type -> that of NumPy: a cache, its codes and its scales."""


def saved(model: ir.Model, path: Path) -> Path:
    """Write a graph that the checker accepts."""
    save_graph(model, path)
    onnx.checker.check_model(str(path))
    return path


def toy_feed(graph: Path, ids: NDArray[np.int64], past: dict[str, NDArray[Any]] | None = None) -> dict[str, Any]:
    """Inputs of a growing toy: ids [batch, sequence] behind a past, or behind none."""
    batch, sequence = ids.shape
    feed: dict[str, NDArray[Any]] = dict(past or {})
    for value in onnx.load(graph).graph.input:
        if value.name.startswith("past_key_values.") and past is None:
            sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            feed[value.name] = np.zeros((batch, 1, 0, sizes[3]), CACHE_TYPES[value.type.tensor_type.elem_type])
    length = feed["past_key_values.0.key"].shape[2]
    feed["input_ids"] = ids
    feed["attention_mask"] = np.ones((batch, length + sequence), np.int64)
    feed["position_ids"] = np.broadcast_to(np.arange(length, length + sequence), ids.shape).copy()
    return feed


def expected_logits(ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """The toy's attention in float64 over its INT8 keys: [batch, 1, sequence, 4]."""
    table = toy_graph().graph.initializers["e"].const_value
    assert table is not None
    new = table.numpy()[ids]
    scale = numerics.per_token_scale(new)
    keys = numerics.quantize_activation(new, scale) * scale.astype(np.float64)
    distance = np.arange(ids.shape[1])[:, None] - np.arange(ids.shape[1])
    scores = np.where((distance >= 0) & (distance < WINDOW), new @ keys.transpose(0, 2, 1), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray((weights / weights.sum(axis=-1, keepdims=True) @ keys)[:, None])


IDS = np.random.default_rng(1).integers(0, 5, (2, 7))


def assert_toy(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """The toy's rows below 4, computed twice."""
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=4 * TOY_ROUNDING)


def test_attention_reads_codes_times_scale(tmp_path: Path) -> None:
    """Every row of a prompt equals attention over dequantized keys, its own included."""
    model = toy_graph()
    QuantizeCache()(model)
    graph = saved(model, tmp_path / "toy.onnx")
    assert_toy(run(graph, toy_feed(graph, IDS))["logits"], expected_logits(IDS))


@pytest.mark.parametrize("form", ["concat", "static"])
def test_steps_continue_a_prompt(tmp_path: Path, form: str) -> None:
    """A prompt, a chunk of two and single tokens give the codes and rows of one call, in both forms of the cache."""
    model = toy_graph()
    if form == "static":
        StaticCache()(model)
    QuantizeCache()(model)
    graph = saved(model, tmp_path / "toy.onnx")
    past, done, rows = None, 0, []
    for tokens in (3, 2, 1, 1):
        ids = IDS[:, done : done + tokens]
        if form == "static":
            past = past or _empty_slots()
            outputs = run(graph, static_feed(graph, ids, np.full(2, done), past))
        else:
            outputs = run(graph, toy_feed(graph, ids, past))
        past, done = next_past(outputs), done + tokens
        rows.append(outputs["logits"])
    assert_toy(np.concatenate(rows, axis=2), expected_logits(IDS))


def _empty_slots() -> dict[str, NDArray[Any]]:
    codes, scales = np.zeros((2, 1, SLOTS, 4), np.int8), np.zeros((2, 1, SLOTS, 1), np.float32)
    return {"past_key_values.0.key": codes, "past_key_values.0.key_scale": scales}


def test_codes_and_scales_are_those_of_the_contract(llama_fp32: Traced, ids: NDArray[np.int64]) -> None:
    """Keys and values of the first layer, which no cache has changed: bit for bit, each head of a token alone.

    In FP32: of an FP16 graph ONNX Runtime leaves out roundings, one more beside another reader.
    """
    model = load_graph(llama_fp32.model)
    bring_into_form(model, GraphForm(kv_dtype="int8"))
    graph = saved(model, llama_fp32.model.with_name("int8-cache.onnx"))
    feed = causal_feed(llama_fp32.model, ids)
    quantized = {name: array for name, array in feed.items() if "past" not in name}
    for name, array in feed.items():
        if "past" in name:
            quantized[name] = array.astype(np.int8)
            quantized[f"{name}_scale"] = array[..., :1].astype(np.float32)
    before, after = run(llama_fp32.model, feed), run(graph, quantized)
    for kind in ("key", "value"):
        present = before[f"present.0.{kind}"]
        scale = numerics.per_token_scale(present)
        np.testing.assert_array_equal(after[f"present.0.{kind}_scale"], scale)
        np.testing.assert_array_equal(after[f"present.0.{kind}"], numerics.quantize_activation(present, scale))
        assert after[f"present.0.{kind}"].dtype == np.int8


def test_every_cache_becomes_int8_with_its_scale_beside_it(llama_fp16: Traced) -> None:
    """Interface: each cache is followed by its FLOAT scale; other inputs and outputs keep name, type and place."""
    model = load_graph(llama_fp16.model)
    others = [value.name for value in (*model.graph.inputs, *model.graph.outputs) if ".key" not in f"{value.name}"]
    bring_into_form(model, GraphForm(kv_dtype="int8"))
    for values, prefix in ((model.graph.inputs, "past_key_values"), (model.graph.outputs, "present")):
        names = [value.name for value in values]
        types = {value.name: value.dtype for value in values}
        for layer in range(2):
            for kind in ("key", "value"):
                cache = f"{prefix}.{layer}.{kind}"
                assert names[names.index(cache) + 1] == f"{cache}_scale"
                assert (types[cache], types[f"{cache}_scale"]) == (ir.DataType.INT8, ir.DataType.FLOAT)
    kept = [value.name for value in (*model.graph.inputs, *model.graph.outputs) if "_scale" not in f"{value.name}"]
    assert [name for name in kept if ".key" not in f"{name}"] == others


def test_length_is_still_read_from_the_cache() -> None:
    """`Shape(past)` reads the codes: the positions of a mask do not depend on the type."""
    model = toy_graph()
    QuantizeCache()(model)
    (shape,) = (node for node in model.graph if node.op_type == "Shape" and "past" in f"{node.inputs[0]}")
    assert shape.inputs[0] is not None
    assert (shape.inputs[0].name, shape.inputs[0].dtype) == ("past_key_values.0.key", ir.DataType.INT8)


def test_an_input_that_is_no_cache_is_left_alone(tmp_path: Path) -> None:
    """A state that is extended as a cache is, under another name."""
    model = toy_graph(TOY + " state_out = Concat<axis = -2>(present, new)", ", float[batch,1,more,4] state_out")
    QuantizeCache()(model)
    graph = saved(model, tmp_path / "toy.onnx")
    types = {value.name: value.type.tensor_type.elem_type for value in onnx.load(graph).graph.output}
    assert types["state_out"] == types["logits"] == onnx.TensorProto.FLOAT
    rows = run(graph, toy_feed(graph, IDS))
    codes, scale = rows["present.0.key"], rows["present.0.key_scale"]
    np.testing.assert_array_equal(rows["state_out"][:, :, : IDS.shape[1]], codes * scale)


def _second_reader() -> ir.Model:
    return toy_graph(TOY + " other = Neg(past)", ", float[batch,1,past,4] other")


def _other_axis() -> ir.Model:
    model = toy_graph()
    by_type(model, "Concat").attributes["axis"] = ir.AttrInt64("axis", -1)
    return model


def _in_front() -> ir.Model:
    return toy_graph(TOY.replace("Concat<axis = -2>(past, new)", "Concat<axis = -2>(new, past)"))


def _three_parts() -> ir.Model:
    return toy_graph(TOY.replace("Concat<axis = -2>(past, new)", "Concat<axis = -2>(past, new, new)"))


def _of_integers() -> ir.Model:
    model = toy_graph()
    QuantizeCache()(model)
    return model


def _without_cache() -> ir.Model:
    model = toy_graph()
    next(value for value in model.graph.inputs if value.name == "past_key_values.0.key").name = "memory"
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_second_reader, r"past_key_values\.0\.key: is read by something else than the one node that extends it"),
        (_other_axis, r"is not extended along its tokens into an output by 'node_2'"),
        (_in_front, r"is read by something else than the one node that extends it"),
        (_three_parts, r"is joined with 2 tensors in 'node_2'"),
        (_of_integers, r"is INT8 .*, not a float"),
        (_without_cache, r"model: has no KV cache"),
    ],
)
def test_a_cache_of_another_kind_is_refused(make: Callable[[], ir.Model], reason: str) -> None:
    """With its name, and with nothing changed."""
    model = make()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(UserError, match=rf"--kv-dtype int8: .*{reason}"):
        QuantizeCache()(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
