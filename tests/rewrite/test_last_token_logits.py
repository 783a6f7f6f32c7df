from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.progress import NoProgress
from fptq_export.rewrite import GraphForm, RewritePaths, rewrite
from fptq_export.rewrite.last_token_logits import LastTokenLogits
from tests.rewrite.conftest import Rewritten
from tests.support.traced import FP32_LOGITS, Traced, causal_feed, run

BATCH, SEQUENCE, SIZE, VOCABULARY = 2, 5, 4, 8
SUM_ORDER = SIZE * 2.0**-23
"""A sum of four products in another order, relative to the sum of their magnitudes."""


def head_graph(body: str, inputs: str = "float[batch,sequence,4] x", outputs: str = "") -> ir.Model:
    """A graph with constants `w` [4, 8], `b` [8] and `c` [], and the output `logits` [batch, sequence, 8]."""
    numbers = np.random.default_rng(0).normal(size=(SIZE + 1) * VOCABULARY)
    w, b = (", ".join(f"{number:.3f}" for number in part) for part in np.split(numbers, [SIZE * VOCABULARY]))
    constants = f"float[4,8] w = {{{w}}}, float[8] b = {{{b}}}, float c = {{0.5}}"
    return ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]> head ({inputs}) => '
        f"(float[batch,sequence,8] logits{outputs}) <{constants}> {{ {body} }}"
    )


def outputs_of(model: ir.Model, path: Path) -> dict[str, NDArray[np.float32]]:
    """What a graph makes of one random x."""
    save_graph(model, path)
    x = np.random.default_rng(1).normal(size=(BATCH, SEQUENCE, SIZE)).astype(np.float32)
    return run(path, {"x": x})


def test_llama_gives_the_logits_of_the_last_token(llama_fp32: Traced, ids: NDArray[np.int64], tmp_path: Path) -> None:
    """Those of the whole graph's last row, and the cache is untouched."""
    model = load_graph(llama_fp32.model)
    assert LastTokenLogits()(model).modified
    path = llama_fp32.model.with_name("last.onnx")
    save_graph(model, path)
    feed = causal_feed(llama_fp32.model, ids)
    whole, last = run(llama_fp32.model, feed), run(path, feed)
    assert last["logits"].shape == (ids.shape[0], 1, 512)
    bound = FP32_LOGITS * np.abs(whole["logits"]).max()
    np.testing.assert_allclose(last["logits"][:, 0], whole["logits"][:, -1], rtol=0.0, atol=bound)
    np.testing.assert_array_equal(last["present.1.key"], whole["present.1.key"])


@pytest.mark.parametrize(
    "body",
    [
        "logits = MatMul(x, w)",
        "y = MatMul(x, w) logits = Add(y, b)",
        "y = MatMul(x, w) s = Div(y, c) t = Tanh(s) logits = Mul(t, c)",
    ],
    ids=["plain", "bias", "soft cap"],
)
def test_the_head_is_found_behind_what_treats_tokens_alone(body: str, tmp_path: Path) -> None:
    """A bias and a soft cap lie behind the head: the slice stands before the MatMul all the same."""
    whole = outputs_of(head_graph(body), tmp_path / "whole.onnx")["logits"]
    model = head_graph(body)
    LastTokenLogits()(model)
    (matmul,) = (node for node in model.graph if node.op_type == "MatMul")
    assert matmul.inputs[0] is not None
    assert matmul.inputs[0].producer() is not None
    last = outputs_of(model, tmp_path / "last.onnx")["logits"]
    assert last.shape == (BATCH, 1, VOCABULARY)
    bound = SUM_ORDER * np.abs(whole).max() * SIZE
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=0.0, atol=bound)


def test_other_readers_of_the_heads_input_keep_every_token(tmp_path: Path) -> None:
    """Only the head sees one token: what else reads the tensor gets all of it."""
    body = "logits = MatMul(x, w) hidden = Relu(x)"
    model = head_graph(body, outputs=", float[batch,sequence,4] hidden")
    LastTokenLogits()(model)
    found = outputs_of(model, tmp_path / "last.onnx")
    assert found["hidden"].shape == (BATCH, SEQUENCE, SIZE)
    assert found["logits"].shape == (BATCH, 1, VOCABULARY)


@pytest.mark.parametrize(
    ("body", "cause"),
    [
        ("y = MatMul(x, w) logits = Softmax(y)", "comes from Softmax"),
        ("y = MatMul(x, w) z = Neg(y) logits = Add(y, z)", "comes from Add"),
        (
            "t = Transpose<perm = [0, 2, 1]>(x) u = MatMul(x, t) v = MatMul(u, x) logits = Concat<axis = 2>(v, v)",
            "Concat",
        ),
        ("r = Reshape<allowzero = 0>(x, s) logits = MatMul(r, w)", "reads a tensor of shape"),
    ],
    ids=["softmax", "two paths", "no constant weight", "input of two dimensions"],
)
def test_a_head_that_is_not_understood_is_refused(body: str, cause: str) -> None:
    """What mixes tokens or paths behind the head, or has no such head, is left as it is, with the cause."""
    inputs = "float[batch,sequence,4] x" + (", int64[2] s" if "Reshape" in body else "")
    model = head_graph(body, inputs)
    before = [node.op_type for node in model.graph]
    with pytest.raises(UserError, match=cause):
        LastTokenLogits()(model)
    assert [node.op_type for node in model.graph] == before


def test_a_model_without_logits_is_refused() -> None:
    """An encoder gives hidden states: it has no head to take the last token for."""
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> encoder (float[batch,sequence,4] x) => '
        "(float[batch,sequence,4] last_hidden_state) { last_hidden_state = Relu(x) }"
    )
    with pytest.raises(UserError, match="gives no logits"):
        LastTokenLogits()(model)


def test_a_quantized_head_gives_the_same_last_token(
    llama_precisions: Rewritten, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """W8A8 per-token head and all tiers below it: the sliced input is quantized alone, and codes are the same."""
    done = llama_precisions
    paths = RewritePaths(done.traced.model, tmp_path / "model.qdq.onnx", tmp_path / "model.w4a8.onnx")
    rewrite(paths, done.traced.sites, done.policy, done.arrays, NoProgress(), GraphForm(logits="last"))
    feed = causal_feed(done.traced.model, ids)
    whole, last = run(done.w4a8, feed)["logits"], run(paths.w4a8, feed)["logits"]
    bound = FP32_LOGITS * np.abs(whole).max()
    np.testing.assert_allclose(last[:, 0], whole[:, -1], rtol=0.0, atol=bound)
