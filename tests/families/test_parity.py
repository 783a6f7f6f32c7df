"""The W4A8 graph of every family computes what the fake-quantized torch model computes, with and without a cache."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from calib.fake_quant import apply_policy
from calib.load import checkpoint_from_directory, model_from_checkpoint
from fptq_export.policy import arrays_path
from fptq_export.progress import NoProgress
from fptq_export.rewrite import GraphForm, RewritePaths, rewrite
from fptq_export.verify.decode import CacheBound
from fptq_export.verify.sessions import OnnxCausalSession
from tests.families.conftest import Quantize
from tests.families.registry import DECODERS, ENCODERS, FAMILIES, Family
from tests.families.support_table import Record
from tests.support.rewritten import Rewritten
from tests.support.traced import run, token_feed

_FLIPS = 8
"""INT8 codes that may fall on either side of a rounding boundary in two correct programs. Their inputs differ by some
2^-20 of a value of up to 127 steps, so one code in 4000 is so near a boundary, at worst, and a code is on average three
steps from 0, not 127: of the 24 tokens x 1000 codes of a layer fewer than one is expected, and more than 8 are not."""
PARITY = sqrt(_FLIPS) / 127.0 * 4.0 / 8.0
"""Of the largest output: 1.1 %. A code that flips moves one of at least 64 channels by 1/127 of the largest magnitude,
which is about 4 times the root mean square, so the tensor by 4 / 127 / sqrt(64) of its length, and the output in
proportion; independent flips add up like a random walk."""
TIERS = {"static": "static", "lae_static": "equalized", "per_token": "per token"}


def test_bound_is_below_that_of_a_wrong_cache() -> None:
    """The bound is tighter than what verification of a run allows a decode step."""
    assert CacheBound("int8", layers=1).relative > 3 * PARITY


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_every_tier_is_in_the_policy(family: Family, quantize: Quantize, record: Record) -> None:
    """Static, equalized and per-token inputs each stand in the rewritten graph's policy; only routers stay float."""
    with record.cell(family, "policies") as cell:
        rewritten = quantize(family)
        policy = rewritten.policy
        tiers = {layer.activation for layer in policy.quantized().values()}
        assert tiers == set(TIERS)
        linears = rewritten.traced.sites.linears
        assert policy.quantized().keys() == {linear.path for linear in linears if linear.float_reason is None}
        cell.text = ", ".join(TIERS.values())


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_graph_equals_the_torch_model(
    family: Family, quantize: Quantize, ids: NDArray[np.int64], record: Record
) -> None:
    """Prefill: the output is that of torch with the same codes, and nearer to it than to the float model's."""
    with record.cell(family, "parity") as cell:
        rewritten = quantize(family)
        expected = _fake_quant_output(rewritten, family, ids)
        actual, floating = (
            run(path, token_feed(path, ids), outputs=[family.output])[family.output]
            for path in (rewritten.w4a8, rewritten.traced.model)
        )
        allowed = PARITY * np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0.0, atol=allowed)
        assert np.abs(floating - expected).max() > 3 * allowed, "quantization would not be seen"
        cell.text = "equal"


@pytest.mark.parametrize("family", DECODERS, ids=lambda family: family.key)
def test_decoding_behind_a_cache_equals_the_torch_model(
    family: Family, quantize: Quantize, ids: NDArray[np.int64], record: Record, tmp_path: Path
) -> None:
    """The last token behind either cache of the others, also where a window hides the first of them."""
    with record.cell(family, "kv") as cell:
        rewritten = quantize(family)
        expected = _fake_quant_output(rewritten, family, ids)[:, -1]
        for graph in (rewritten.w4a8, _with_static_cache(rewritten, tmp_path)):
            session = OnnxCausalSession(graph, threads=1, optimization="none")
            _, cache = session.prefill(ids[:, :-1])
            logits, _ = session.decode(ids[:, -1:], cache)
            np.testing.assert_allclose(logits[:, 0], expected, rtol=0.0, atol=PARITY * np.abs(expected).max())
        cell.text = "concat, static"


@pytest.mark.parametrize("family", ENCODERS, ids=lambda family: family.key)
def test_encoder_has_no_cache(family: Family, quantize: Quantize, record: Record) -> None:
    """The graph takes tokens and gives hidden states alone."""
    with record.cell(family, "kv") as cell:
        graph = onnx.load(quantize(family).w4a8, load_external_data=False).graph
        assert {value.name for value in graph.input} <= {"input_ids", "attention_mask", "token_type_ids"}
        assert [value.name for value in graph.output] == [family.output]
        cell.text = "none"


def _with_static_cache(rewritten: Rewritten, directory: Path) -> Path:
    """The W4A8 graph of the same policy with a cache that is written in place."""
    paths = RewritePaths(rewritten.traced.model, directory / "model.qdq.onnx", directory / "model.w4a8.onnx")
    form = GraphForm(kv_cache="static")
    rewrite(paths, rewritten.traced.sites, rewritten.policy, rewritten.arrays, NoProgress(), form)
    return paths.w4a8


def _fake_quant_output(rewritten: Rewritten, family: Family, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits, or hidden states, of the torch model under the policy of a graph, [batch, sequence, vocab or hidden]."""
    directory = rewritten.traced.checkpoint
    model = model_from_checkpoint(checkpoint_from_directory(directory, family.name), torch.float32)
    arrays = load_file(arrays_path(_policy_path(rewritten)))
    apply_policy(model, rewritten.policy, arrays, rewritten.traced.sites)
    with torch.inference_mode():
        output: NDArray[np.float32] = model(input_ids=torch.from_numpy(ids))[family.output].numpy()
    return output


def _policy_path(rewritten: Rewritten) -> Path:
    return rewritten.w4a8.with_name("policy.json")
