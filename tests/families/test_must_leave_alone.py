"""A decoder of an architecture that no library knows: what is exact is folded, everything else is left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from calib.fake_quant import apply_policy
from fptq_export.graph_io import load_graph
from fptq_export.policy import Activation, arrays_path
from fptq_export.rewrite.fold_equalization import FoldEqualization
from tests.families.test_parity import PARITY
from tests.support.float64 import lognormal_scales
from tests.support.models import model_once
from tests.support.rewritten import rewritten_with
from tests.support.traced import Traced, causal_feed, run, traced_once

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    ModelDirFactory = Callable[[PretrainedConfig], Path]

RESIDUAL, EXTRA, SHARED = 1, 2, 3
"""Which block has which quirk; block 0 has none, and its MLP's weight is that of block 3 too."""


@pytest.fixture(scope="module")
def unknown(make_model_dir: ModelDirFactory) -> Traced:
    """Four blocks, each with a quirk of its own."""
    from tests.support.unknown_architecture import UnknownConfig

    quirks = ("", "residual after norm", "extra reader of norm", "shared weight")
    return traced_once(model_once(make_model_dir, UnknownConfig(quirks)), "fp32")


@pytest.mark.parametrize(("block", "reader"), [(RESIDUAL, "Add"), (EXTRA, "MatMul")], ids=["residual", "extra reader"])
def test_norm_that_something_else_reads_is_no_site(unknown: Traced, block: int, reader: str) -> None:
    """The linear behind it is quantized without equalization, and the reason names the other reader."""
    linear = unknown.sites.linear(f"model.layers.{block}.mlp_in")
    assert linear.site is None
    assert f"also read by {reader}" in (linear.no_site_reason or "")
    sites = {site.id for site in unknown.sites.fold_sites}
    assert f"model.layers.{block}.mlp_norm" not in sites
    assert f"model.layers.{block}.norm" in sites


def test_linears_without_a_known_producer_are_listed(unknown: Traced) -> None:
    """Nothing of an unknown model is missed: each linear has a site, or a sentence that names what is before it."""
    assert unknown.sites.unmatched == ()
    assert len(unknown.sites.linears) == 4 * 6 + 1
    reasons = {linear.path: linear.no_site_reason for linear in unknown.sites.linears if linear.site is None}
    assert all("Tanh node" in (reasons[f"model.layers.{block}.mlp_out"] or "") for block in range(4))


def test_weight_that_two_modules_share_is_cloned(unknown: Traced) -> None:
    """Folding the norm of one block multiplies a copy: the other block reads the weight as it was."""
    graph = load_graph(unknown.model)
    weight = unknown.sites.linear("model.layers.0.mlp_in").weight
    assert unknown.sites.linear(f"model.layers.{SHARED}.mlp_in").weight == weight
    before = graph.graph.initializers[weight].const_value
    assert before is not None
    expected = before.numpy().copy()
    sites = [unknown.sites.site("model.layers.0.mlp_norm")]
    FoldEqualization(unknown.sites, lognormal_scales(sites))(graph)
    after = graph.graph.initializers[weight].const_value
    assert after is not None
    np.testing.assert_array_equal(after.numpy(), expected)
    nodes = {node.name: node for node in graph.graph}
    read = [nodes[f"model.layers.{block}.mlp_in/MatMul"].inputs[1] for block in (0, SHARED)]
    assert read[0] is not read[1]


@pytest.mark.parametrize("quantized", [0, SHARED])
def test_float_module_that_shares_a_quantized_weight_keeps_it(
    unknown: Traced, quantized: int, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """One of two modules with one parameter is quantized: the graph computes what torch computes."""
    from transformers import AutoModelForCausalLM

    tiers: dict[str, Activation] = {f"model.layers.{quantized}.mlp_in": "lae_static"}
    rewritten = rewritten_with(unknown, tiers, ids, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(unknown.checkpoint, dtype=torch.float32)
    apply_policy(model, rewritten.policy, load_file(arrays_path(tmp_path / "policy.json")), unknown.sites)
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    actual = run(rewritten.w4a8, causal_feed(rewritten.w4a8, ids), outputs=["logits"])["logits"]
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=PARITY * np.abs(expected).max())
