from __future__ import annotations

import onnx_ir as ir
import pytest

from fptq_export.errors import UserError
from fptq_export.sites import FoldSite, Producer
from fptq_export.trace.find_sites import sites_from_graph
from tests.support.traced import Traced

LLAMA_SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 128),
    "mlp.up_proj": (64, 128),
    "mlp.down_proj": (128, 64),
}


def _site_of(traced: Traced, path: str) -> FoldSite:
    site = traced.sites.linear(path).site
    assert site is not None, traced.sites.linear(path).no_site_reason
    return traced.sites.site(site)


def test_every_linear_of_llama_is_found(llama_fp32: Traced) -> None:
    """All fifteen linears are found under their torch paths with the shapes of the config."""
    shapes = {linear.path: (linear.in_features, linear.out_features) for linear in llama_fp32.sites.linears}
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LLAMA_SHAPES.items()}
    assert shapes == {**expected, "lm_head": (64, 512)}
    assert llama_fp32.sites.unmatched == ()


def test_nodes_are_named_after_their_linear(llama_fp32: Traced) -> None:
    """Engine layer lists are matched by name, so a MatMul carries the torch path."""
    assert {linear.node for linear in llama_fp32.sites.linears} == {
        f"{linear.path}/MatMul" for linear in llama_fp32.sites.linears
    }


@pytest.mark.parametrize("layer", [0, 1])
def test_llama_projections_share_inputs_and_sites(llama_fp32: Traced, layer: int) -> None:
    """q, k and v read the input norm; gate and up read the second one."""
    for norm, names in (
        ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ):
        paths = tuple(f"model.layers.{layer}.{name}" for name in names)
        assert len({llama_fp32.sites.linear(path).input for path in paths}) == 1
        site = _site_of(llama_fp32, paths[0])
        weight = f"model.layers.{layer}.{norm}.weight"
        assert (site.kind, site.channels, site.consumers) == ("norm", 64, paths)
        assert site.producers == (Producer(initializer=weight, axis=0),)


def test_down_proj_folds_into_the_up_branch(llama_fp32: Traced) -> None:
    """The gated MLP's product is scaled by the output columns of up_proj, not by the gate, which SiLU bends."""
    site = _site_of(llama_fp32, "model.layers.0.mlp.down_proj")
    up = "model.layers.0.mlp.up_proj"
    assert (site.kind, site.channels, site.producer_linear) == ("gated_mlp", 128, up)
    assert site.producers == (Producer(initializer=f"{up}.weight", axis=1),)
    assert site.consumers == ("model.layers.0.mlp.down_proj",)


def test_attention_output_has_no_site_and_says_why(llama_fp32: Traced) -> None:
    """o_proj reads attention's output: one reason, no site, and every linear has exactly one of the two."""
    linear = llama_fp32.sites.linear("model.layers.0.self_attn.o_proj")
    assert linear.site is None
    assert linear.no_site_reason is not None
    assert "Reshape" in linear.no_site_reason
    assert all((entry.site is None) != (entry.no_site_reason is None) for entry in llama_fp32.sites.linears)


def test_half_graph_has_the_sites_of_the_float_graph(llama_fp16: Traced, llama_fp32: Traced) -> None:
    """The casts around an FP32 norm hide no site."""
    assert {site.id: site.producers for site in llama_fp16.sites.fold_sites} == {
        site.id: site.producers for site in llama_fp32.sites.fold_sites
    }


def test_layer_norm_site_has_weight_and_bias(opt_fp32: Traced) -> None:
    """Dividing the weight alone would leave the bias at its old scale."""
    norm = "model.decoder.layers.0.self_attn_layer_norm"
    site = _site_of(opt_fp32, "model.decoder.layers.0.self_attn.q_proj")
    assert (site.id, site.kind) == (norm, "norm")
    assert site.producers == (
        Producer(initializer=f"{norm}.weight", axis=0),
        Producer(initializer=f"{norm}.bias", axis=0),
    )


def test_opt_mlp_is_found_on_its_flattened_tensor(opt_fp32: Traced) -> None:
    """OPT's MLP runs on [tokens, channels], which torch exports as Gemm: still two linears with biases."""
    first, second = (opt_fp32.sites.linear(f"model.decoder.layers.0.{name}") for name in ("fc1", "fc2"))
    assert opt_fp32.sites.unmatched == ()
    assert (first.in_features, first.out_features, first.bias) == (64, 128, "model.decoder.layers.0.fc1.bias")
    assert first.site == "model.decoder.layers.0.final_layer_norm"
    assert not first.weight_transposed
    assert (second.in_features, second.out_features) == (128, 64)


def test_relu_mlp_has_no_site(opt_fp32: Traced) -> None:
    """fc2 reads ReLU's output; the reason names the operator."""
    linear = opt_fp32.sites.linear("model.decoder.layers.1.fc2")
    assert linear.site is None
    assert linear.no_site_reason is not None
    assert "Relu" in linear.no_site_reason


def test_biases_are_those_of_their_linear(opt_fp32: Traced) -> None:
    """Each linear knows its own bias, the head none."""
    biases = {linear.path: linear.bias for linear in opt_fp32.sites.linears}
    assert biases.pop("lm_head") is None
    assert biases == {path: f"{path}.bias" for path in biases}


def test_gemma_norm_has_an_offset(gemma_fp16: Traced) -> None:
    """Gemma multiplies by 1 + w: the fold must know the 1, or it divides the wrong number."""
    site = _site_of(gemma_fp16, "model.layers.0.self_attn.q_proj")
    weight = "model.layers.0.input_layernorm.weight"
    assert site.kind == "offset_norm"
    assert site.producers == (Producer(initializer=weight, axis=0, offset=1.0),)
    assert _site_of(gemma_fp16, "lm_head").kind == "offset_norm"


def test_graph_without_linears_is_refused() -> None:
    """A graph in which nothing could be quantized is a user error."""
    text = '<ir_version: 10, opset_import: ["": 21]> g (float[B] x) => (float[B] y) { y = Relu(x) }'
    with pytest.raises(UserError, match="no linear layer"):
        sites_from_graph(ir.from_onnx_text(text), {})
