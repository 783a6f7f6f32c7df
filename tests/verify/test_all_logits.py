from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.rewrite.last_token_logits import LastTokenLogits
from fptq_export.verify.all_logits import gives_last_only, graph_with_all_logits
from fptq_export.verify.last_token import last_token_figures, last_token_rows
from fptq_export.verify.sessions import OnnxCausalSession


@pytest.fixture(scope="module")
def last(tiny_llama: Any) -> Path:
    """The FP16 graph with logits of the last token only, its weights where they were."""
    model = load_graph(tiny_llama.fp16)
    LastTokenLogits()(model)
    path = Path(tiny_llama.fp16).with_name("last.onnx")
    save_graph(model, path)
    return path


def test_the_form_with_all_logits_is_the_graph_it_was_made_from(tiny_llama: Any, last: Path) -> None:
    """Bypassing the slice gives back every bit of the logits; weights are found beside the file."""
    whole, _ = OnnxCausalSession(tiny_llama.fp16, threads=1).prefill(tiny_llama.ids)
    back, _ = OnnxCausalSession(last, threads=1, all_logits=True).prefill(tiny_llama.ids)
    np.testing.assert_array_equal(back, whole)


def test_the_file_itself_gives_one_token_a_call(tiny_llama: Any, last: Path) -> None:
    """A prompt gives one row of logits, and decoding goes on from it."""
    session = OnnxCausalSession(last, threads=1)
    logits, cache = session.prefill(tiny_llama.ids)
    assert logits.shape == (2, 1, tiny_llama.torch_logits.shape[-1])
    again, _ = session.decode(tiny_llama.ids[:, :1], cache)
    assert again.shape == logits.shape


def test_a_graph_that_gives_all_is_left_alone(tiny_llama: Any) -> None:
    """`all_logits` changes nothing where there is nothing to bypass."""
    assert not gives_last_only(tiny_llama.fp16)
    plain, _ = OnnxCausalSession(tiny_llama.fp16, threads=1).prefill(tiny_llama.ids)
    asked, _ = OnnxCausalSession(tiny_llama.fp16, threads=1, all_logits=True).prefill(tiny_llama.ids)
    np.testing.assert_array_equal(asked, plain)


@pytest.mark.parametrize("start", [-2, 0])
def test_a_slice_of_another_token_is_refused(last: Path, start: int) -> None:
    """Bypassing it would prove a graph that reads another token: there is no form to measure."""
    model = load_graph(last)
    model.graph.initializers["logits.last_token.start"].const_value = _number(start)
    path = last.with_name(f"start{start}.onnx")
    save_graph(model, path)
    assert gives_last_only(path)
    with pytest.raises(UserError, match=r"\(0 found\)"):
        graph_with_all_logits(path)


def test_rows_of_both_forms_agree(tiny_llama: Any, last: Path) -> None:
    """A prompt and ten decode steps of the file lie within the bound of its form with all logits."""
    text = tiny_llama.ids[0]
    rows, every = (
        last_token_rows(OnnxCausalSession(last, threads=1, all_logits=all_logits), text, 14)
        for all_logits in (False, True)
    )
    assert rows.shape == (11, tiny_llama.torch_logits.shape[-1])
    figures = last_token_figures(rows, every, "fp16")
    assert figures.within_bound
    assert figures.bound < figures.logit_absmax / 100


def test_rows_of_another_token_are_outside_the_bound(toy: Any) -> None:
    """A head that reads the token before the last is seen: rows shifted by one call."""
    every = last_token_rows(toy, np.arange(8), 4)
    assert not last_token_figures(np.roll(every, 1, axis=0), every, "fp16").within_bound


def _number(value: int) -> Any:
    return ir.tensor(np.array([value], np.int64), name="logits.last_token.start")
