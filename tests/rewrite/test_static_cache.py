from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.fix_cache_length import FixCacheLength
from fptq_export.rewrite.fuse_attention import FuseAttention
from fptq_export.rewrite.graph_form import GraphForm, bring_into_form
from fptq_export.rewrite.static_cache import StaticCache
from tests.support.graphs import graph_from_text
from tests.support.traced import FP32_LOGITS, Traced, causal_feed, run

Arrays = Mapping[str, NDArray[Any]]
SLOTS = 16
LENGTHS = (3, 8)
"""Tokens of two prompts in one batch."""
TOY_ROUNDING = 16 * 2.0**-24
"""The toy mixes at most eight rows below 4: hidden slots add exact zeros, in another order of the sum."""

TOY_INPUTS = (
    "int64[batch,sequence] input_ids, int64[batch,total] attention_mask, int64[batch,sequence] position_ids, "
    "float[batch,1,past,4] past"
)
TOY = """
    x = Gather(e, input_ids) new = Unsqueeze(x, one) present = Concat<axis = -2>(past, new)
    s1 = Shape<start = 1, end = 2>(input_ids) s = Squeeze(s1) p1 = Shape<start = 2, end = 3>(past) p = Squeeze(p1)
    t = Add(p, s) steps = Range(zero_, s, one_) q = Add(steps, p) k = Range(zero_, t, one_)
    q3 = Unsqueeze(q, first) q4 = Unsqueeze(q3, three) k3 = Unsqueeze(k, first) k4 = Unsqueeze(k3, two)
    causal = LessOrEqual(k4, q4) far = Sub(q4, window) near = Greater(k4, far) seen = And(causal, near)
    known = Cast<to = 9>(attention_mask) known4 = Unsqueeze(known, middle) visible = And(seen, known4)
    mask = Where(visible, zero, low) kt = Transpose<perm = [0, 1, 3, 2]>(present) m = MatMul(new, kt)
    a = Add(m, mask) w = Softmax<axis = -1>(a) logits = MatMul(w, present)
"""
TOY_CONSTANTS = (
    "int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}, int64[2] first = {0, 1}, int64[2] middle = {1, 2}, "
    "int64 zero_ = {0}, int64 one_ = {1}, float zero = {0.0}, float low = {-3.4028234663852886e+38}, int64 window = {3}"
)


def toy_graph(body: str = TOY, extra: str = "") -> ir.Model:
    """One cached attention over embeddings [5, 4] with a sliding window of three, named as trace names it."""
    table = ", ".join(f"{number:.3f}" for number in np.random.default_rng(0).normal(size=20))
    model = graph_from_text(
        f"toy ({TOY_INPUTS}) => (float[batch,1,sequence,4] logits, float[batch,1,grown,4] present{extra}) "
        f"<{TOY_CONSTANTS}, float[5,4] e = {{{table}}}> {{ {body} }}"
    )
    for index, node in enumerate(model.graph):
        node.name = f"node_{index}"
    names = {"past": "past_key_values.0.key", "present": "present.0.key"}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = names.get(value.name or "", value.name)
    (present,) = (value for value in model.graph.outputs if value.name == "present.0.key")
    present.shape = ir.Shape(["batch", 1, "past + sequence", 4])
    return model


def static_feed(graph: Path, ids: NDArray[np.int64], filled: NDArray[np.int64], past: Arrays | None = None) -> Arrays:
    """Inputs of a static graph: ids [batch, sequence] behind `filled` [batch] slots, everything visible."""
    batch, sequence = ids.shape
    feed: dict[str, NDArray[Any]] = dict(past or {})
    for value in onnx.load(graph, load_external_data=False).graph.input:
        if value.name.startswith("past_key_values.") and past is None:
            _, heads, _, size = (dim.dim_value for dim in value.type.tensor_type.shape.dim)
            feed[value.name] = np.zeros((batch, heads, SLOTS, size), np.float32)
    feed["input_ids"], feed["write_indices"] = ids, filled
    feed["attention_mask"] = np.ones((batch, SLOTS), np.int64)
    feed["position_ids"] = filled[:, None] + np.arange(sequence)
    return feed


def next_past(outputs: Arrays) -> dict[str, NDArray[Any]]:
    """The cache a call returns, by the name it goes back in by."""
    return {name.replace("present", "past_key_values"): array for name, array in outputs.items() if "present" in name}


@pytest.fixture(scope="module")
def static(llama_fp32: Traced) -> Path:
    """LLaMA in the static form with attention fused, in FP32: what only FP16 graphs get by default."""
    model = load_graph(llama_fp32.model)
    bring_into_form(model, GraphForm(kv_cache="static"))
    assert FuseAttention(frozenset({ir.DataType.FLOAT}))(model).modified
    path = llama_fp32.model.with_name("static.onnx")
    save_graph(model, path)
    onnx.checker.check_model(str(path))
    return path


@pytest.fixture(scope="module")
def whole(llama_fp32: Traced, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits [2, 8, 512] of the growing form."""
    logits: NDArray[np.float32] = run(llama_fp32.model, causal_feed(llama_fp32.model, ids))["logits"]
    return logits


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Two FP32 programs for one model."""
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=FP32_LOGITS * np.abs(expected).max())


def test_prefill_chunks_and_steps_equal_the_growing_cache(
    static: Path, ids: NDArray[np.int64], whole: NDArray[np.float32]
) -> None:
    """A prompt, a chunk of two and three steps of one token give the rows of one prefill of the growing form."""
    past, done = None, 0
    for tokens in (3, 2, 1, 1, 1):
        feed = static_feed(static, ids[:, done : done + tokens], np.full(2, done), past)
        outputs = run(static, feed)
        assert_close(outputs["logits"], whole[:, done : done + tokens])
        past, done = next_past(outputs), done + tokens


def test_sequences_of_a_batch_may_have_different_lengths(
    static: Path, ids: NDArray[np.int64], whole: NDArray[np.float32]
) -> None:
    """Prompts of 3 and 7 tokens, padded on the right, then one step each at its own index, over the padding."""
    short, long = 3, 7
    prompt = ids[:, :long].copy()
    prompt[0, short:] = 0
    outputs = run(static, static_feed(static, prompt, np.zeros(2, np.int64)))
    assert_close(outputs["logits"][0, :short], whole[0, :short])
    filled = np.array([short, long])
    step = np.stack([ids[row, index : index + 1] for row, index in enumerate(filled)])
    logits = run(static, static_feed(static, step, filled, next_past(outputs)))["logits"]
    assert_close(logits[:, 0], np.stack([whole[0, short], whole[1, long]]))


def test_padding_on_the_left_is_hidden(static: Path, ids: NDArray[np.int64], whole: NDArray[np.float32]) -> None:
    """Two pads before a prompt, hidden by the mask: the real rows are unchanged, and a pad's row is finite."""
    padded = np.concatenate([np.zeros((2, 2), np.int64), ids], axis=1)
    feed = dict(static_feed(static, padded, np.zeros(2, np.int64)))
    feed["attention_mask"][:, :2] = 0
    feed["position_ids"] = np.maximum(feed["position_ids"] - 2, 0)
    logits = run(static, feed)["logits"]
    assert np.isfinite(logits).all()
    assert_close(logits[:, 2:], whole)


def test_what_an_earlier_text_left_in_the_cache_is_not_seen(static: Path, ids: NDArray[np.int64]) -> None:
    """A cache is reused without clearing it: slots behind the query do not change a bit."""
    clean = static_feed(static, ids, np.zeros(2, np.int64))
    rng = np.random.default_rng(3)
    used = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in clean.items() if "past" in name}
    np.testing.assert_array_equal(run(static, {**clean, **used})["logits"], run(static, clean)["logits"])


def test_a_sliding_window_keeps_its_meaning(tmp_path: Path) -> None:
    """The toy sees three tokens: the same rows from both forms, over a prompt and steps beyond the window."""
    growing, static = tmp_path / "growing.onnx", tmp_path / "static.onnx"
    model = toy_graph()
    save_graph(model, growing)
    StaticCache()(model)
    save_graph(model, static)
    ids = np.random.default_rng(1).integers(0, 5, (2, 8))
    expected = run(growing, causal_feed(growing, ids))["logits"]
    past, done = None, 0
    for tokens in (5, 1, 1, 1):
        outputs = run(static, static_feed(static, ids[:, done : done + tokens], np.full(2, done), past))
        found, wanted = outputs["logits"], expected[:, :, done : done + tokens]
        np.testing.assert_allclose(found, wanted, rtol=0.0, atol=TOY_ROUNDING * 4.0)
        past, done = next_past(outputs), done + tokens


def test_inputs_and_outputs_of_the_static_form(static: Path) -> None:
    """One index a sequence, a mask over the slots, and caches of the same shape before and after."""
    graph = load_graph(static).graph
    shapes = {value.name: str(value.shape) for value in (*graph.inputs, *graph.outputs)}
    assert shapes["write_indices"] == "[batch]"
    assert shapes["attention_mask"] == "[batch,cache]"
    assert shapes["past_key_values.1.value"] == shapes["present.1.value"] == "[batch,2,cache,16]"


def test_the_length_is_fixed_for_tensorrt(static: Path) -> None:
    """A number in every place, nodes unchanged; a growing cache has no length to fix."""
    model = load_graph(static)
    nodes = len(model.graph)
    assert FixCacheLength(48)(model).modified
    dims = {str(dim) for value in (*model.graph.inputs, *model.graph.outputs) for dim in value.shape or ()}
    assert "48" in dims
    assert "cache" not in dims
    assert len(model.graph) == nodes
    assert not FixCacheLength(48)(toy_graph()).modified


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        (
            "logits = MatMul(w, present)",
            "n = ReduceMax(past) l = MatMul(w, present) logits = Mul(l, n)",
            "something else",
        ),
        ("Concat<axis = -2>(past, new)", "Concat<axis = -2>(new, past)", "something else"),
        ("q = Add(steps, p)", "d = Mul(p, one_) q = Add(steps, d)", "in Mul"),
        ("q3 = Unsqueeze(q, first)", "qn = Neg(q) qp = Neg(qn) q3 = Unsqueeze(qp, first)", "new tokens in Neg"),
        ("far = Sub(q4, window)", "far = CumSum(q4, one_)", "new tokens in CumSum"),
        ("p1 = Shape<start = 2, end = 3>(past) p = Squeeze(p1)", "p4 = Shape(past) p = Gather(p4, two_)", "other dim"),
        ("p1 = Shape<start = 2, end = 3>(past) p = Squeeze(p1)", "p = Identity(zero_)", "no KV cache"),
    ],
    ids=["cache read", "before the past", "length scaled", "positions", "mask", "shape", "length not used"],
)
def test_what_the_static_form_cannot_express_is_refused(old: str, new: str, cause: str) -> None:
    """The node and what it does are named; the graph keeps its form."""
    assert old in TOY
    model = toy_graph(TOY.replace(old, new).replace("two_", "two"))
    with pytest.raises(UserError, match=cause):
        StaticCache()(model)
    assert all(value.name != "write_indices" for value in model.graph.inputs)
