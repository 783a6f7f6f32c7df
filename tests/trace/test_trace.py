from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from safetensors import safe_open

from fptq_export.errors import UserError
from fptq_export.graph_io import data_path, load_graph
from fptq_export.progress import NoProgress
from fptq_export.sites import read_sites
from fptq_export.trace import trace
from tests.support.policies import float_weight
from tests.support.traced import Traced, stored_tensors

INLINE_BYTES = 1024
"""Tensors up to this size stay in the .onnx file."""


@pytest.mark.parametrize("model", ["llama_fp32", "llama_fp16", "opt_fp32", "gemma_fp16"])
def test_data_file_holds_each_large_tensor_once(request: pytest.FixtureRequest, model: str) -> None:
    """The data file is as long as its tensors together: nothing twice (a tied embedding), nothing forgotten."""
    traced: Traced = request.getfixturevalue(model)
    initializers = load_graph(traced.model).graph.initializers
    tensors = {name: value.const_value for name, value in initializers.items() if value.const_value is not None}
    external = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ir.ExternalTensor)}
    assert {name for name, tensor in tensors.items() if tensor.nbytes > INLINE_BYTES} == set(external)
    assert data_path(traced.model).stat().st_size == sum(tensor.nbytes for tensor in external.values())


@pytest.mark.parametrize("model", ["opt_fp32", "gemma_fp16"])
def test_tied_head_reads_the_embedding(request: pytest.FixtureRequest, model: str) -> None:
    """A head tied to the embedding reads the embedding's own tensor through a Transpose."""
    traced: Traced = request.getfixturevalue(model)
    head = traced.sites.linear("lm_head")
    weight = load_graph(traced.model).graph.initializers[head.weight]
    assert head.weight_transposed
    assert {use.node.op_type for use in weight.uses()} == {"Transpose", "Gather"}


@pytest.mark.parametrize("model", ["llama_fp32", "opt_fp32"])
def test_weights_equal_the_checkpoint(request: pytest.FixtureRequest, model: str) -> None:
    """Each linear's weight is the checkpoint's tensor of the same path, bit for bit."""
    traced: Traced = request.getfixturevalue(model)
    graph = load_graph(traced.model)
    with safe_open(str(traced.checkpoint / "model.safetensors"), framework="np") as stored:
        for linear in traced.sites.linears:
            name = f"{linear.path}.weight"
            tied = "model.decoder.embed_tokens.weight"
            expected = stored.get_tensor(name if name in stored.keys() else tied)  # noqa: SIM118  no mapping
            assert expected.shape == (linear.out_features, linear.in_features)
            np.testing.assert_array_equal(float_weight(graph, linear), expected, err_msg=linear.path)


def test_half_weights_are_the_checkpoint_rounded_once(llama_fp16: Traced) -> None:
    """FP32 weights become FP16 by one rounding to nearest."""
    graph = load_graph(llama_fp16.model)
    with safe_open(str(llama_fp16.checkpoint / "model.safetensors"), framework="np") as stored:
        expected = stored.get_tensor("model.layers.1.mlp.down_proj.weight").astype(np.float16)
    linear = llama_fp16.sites.linear("model.layers.1.mlp.down_proj")
    np.testing.assert_array_equal(float_weight(graph, linear).astype(np.float16), expected)


def test_sites_file_is_what_trace_returned(llama_fp32: Traced) -> None:
    """`sites.json` names nodes and initializers that are in `model.onnx`."""
    sites = read_sites(llama_fp32.model.with_name("sites.json"))
    graph = onnx.load(llama_fp32.model, load_external_data=False).graph
    assert sites == llama_fp32.sites
    assert {linear.node for linear in sites.linears} <= {node.name for node in graph.node}
    initializers = {tensor.name for tensor in graph.initializer}
    assert {linear.weight for linear in sites.linears} <= initializers
    assert {part.initializer for site in sites.fold_sites for part in site.producers} <= initializers


def test_missing_tensor_is_named_and_nothing_is_written(tiny_llama_dir: Path, tmp_path: Path) -> None:
    """A checkpoint without one tensor is refused by its name before any file stands under its final name."""
    from transformers import AutoConfig

    tensors = stored_tensors(tiny_llama_dir)
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.o_proj\.weight.*no checkpoint file holds it"):
        trace(
            AutoConfig.from_pretrained(tiny_llama_dir),
            tensors,
            "fp16",
            tmp_path / "model.onnx",
            tmp_path / "sites.json",
            NoProgress(),
        )
    assert list(tmp_path.iterdir()) == []
