from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError, UserErrors
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.fix_cache_length import FixCacheLength
from fptq_export.rewrite.graph_form import GraphForm, bring_into_form
from fptq_export.verify.decode import CacheBound, prove_cache
from fptq_export.verify.sessions import OnnxCausalSession
from tests.support.traced import Traced

FP16_LOGITS = 2 * (4 * 2) ** 0.5 * 2.0**-10
"""Of two FP16 programs, relative to the largest logit: in each of two layers some four tensors are rounded at another
place (norm, rotation, scores, mix), each by up to 2^-10 of its largest value; they add up like a random walk in either
program. Measured: 2e-3, a third of it."""


@pytest.fixture(scope="module")
def static(llama_fp16: Traced) -> Path:
    """The FP16 graph with a static cache of open length, attention fused."""
    model = load_graph(llama_fp16.model)
    assert bring_into_form(model, GraphForm(kv_cache="static"))["fused"]["Attention"] == 2
    path = llama_fp16.model.with_name("static.onnx")
    save_graph(model, path)
    return path


@pytest.fixture(scope="module")
def text() -> NDArray[np.int64]:
    """Seventy tokens: more than the slots a session takes at a time."""
    return np.random.default_rng(5).integers(0, 512, 70)


def test_a_session_drives_both_forms(llama_fp16: Traced, static: Path, text: NDArray[np.int64]) -> None:
    """Prefill and steps give the logits of the growing cache, over the end of the first slots."""
    growing, fixed = (OnnxCausalSession(path, threads=1) for path in (llama_fp16.model, static))
    expected, old = growing.prefill(text[None, :62])
    found, new = fixed.prefill(text[None, :62])
    for token in text[62:]:
        bound = FP16_LOGITS * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, rtol=0.0, atol=bound)
        expected, old = growing.decode(np.array([[token]]), old)
        found, new = fixed.decode(np.array([[token]]), new)
    assert {tuple(value.shape())[2] for value in new.values.values()} == {128}
    assert new.length == old.length == len(text)


def test_the_cache_proof_holds(static: Path, text: NDArray[np.int64]) -> None:
    """Verification's own proof: decode steps continue the prefill of the same graph."""
    session = OnnxCausalSession(static, threads=1)
    assert prove_cache(session, text[:60], text[60:].tolist(), CacheBound("fp16", session.layers)).within_bound


def test_decoding_leaves_its_cache_alone(static: Path, text: NDArray[np.int64]) -> None:
    """A static cache is written in place by TensorRT, but a session's can be decoded from twice."""
    session = OnnxCausalSession(static, threads=1)
    _, cache = session.prefill(text[None, :10])
    first, _ = session.decode(np.array([[7]]), cache)
    session.decode(np.array([[9]]), cache)
    second, _ = session.decode(np.array([[7]]), cache)
    np.testing.assert_array_equal(first, second)


def test_a_graph_of_fixed_length_says_when_it_is_full(static: Path, text: NDArray[np.int64]) -> None:
    """Sixteen slots take sixteen tokens; the seventeenth, and a longer prompt, are refused by name."""
    model = load_graph(static)
    FixCacheLength(16)(model)
    path = static.with_name("sixteen.onnx")
    save_graph(model, path)
    session = OnnxCausalSession(path, threads=1)
    _, cache = session.prefill(text[None, :15])
    _, cache = session.decode(text[None, 15:16], cache)
    with pytest.raises(UserError, match="16 slots, and 17 tokens"):
        session.decode(text[None, 16:17], cache)
    with pytest.raises(UserError, match="16 slots, and 20 tokens"):
        session.prefill(text[None, :20])


@pytest.mark.parametrize("form", ["concat", "static"])
def test_a_session_drives_an_int8_cache(
    llama_fp16: Traced, text: NDArray[np.int64], form: Literal["concat", "static"]
) -> None:
    """Codes and scales go back in beside each other, over the end of the first slots; the proof of the cache holds."""
    model = load_graph(llama_fp16.model)
    bring_into_form(model, GraphForm(kv_cache=form, kv_dtype="int8"))
    path = llama_fp16.model.with_name(f"int8-{form}.onnx")
    save_graph(model, path)
    session = OnnxCausalSession(path, threads=1)
    assert session.layers == 2
    assert prove_cache(session, text[:60], text[60:].tolist(), CacheBound("fp16", session.layers)).within_bound
    _, cache = session.prefill(text[None, :4])
    kinds = {name.rpartition(".")[2]: (value.data_type(), value.shape()[3]) for name, value in cache.values.items()}
    codes, scales = ("tensor(int8)", 16), ("tensor(float)", 1)
    assert kinds == {"key": codes, "value": codes, "key_scale": scales, "value_scale": scales}


def test_a_cache_of_codes_without_scales_is_refused(llama_fp16: Traced) -> None:
    """INT8 numbers that nothing scales are no keys."""
    model = load_graph(llama_fp16.model)
    bring_into_form(model, GraphForm(kv_dtype="int8"))
    lost = next(value for value in model.graph.inputs if value.name == "past_key_values.1.value_scale")
    lost.name = "another"
    path = llama_fp16.model.with_name("int8-lost.onnx")
    save_graph(model, path)
    problems = r"input is tensor\(int8\).* @ past_key_values\.1\.value\n  input that nothing fills @ another"
    with pytest.raises(UserErrors, match=problems):
        OnnxCausalSession(path, threads=1)
