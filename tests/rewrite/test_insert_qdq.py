from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import data_path, load_graph, save_graph, write_weights
from fptq_export.packing import int4_from_packed, packed_from_int4
from fptq_export.policy import Activation, LayerPolicy, Policy, PolicyArrays, Rule, arrays_path, write_policy
from fptq_export.rewrite.functions import PER_TOKEN_QDQ
from fptq_export.rewrite.insert_qdq import InsertQdq
from fptq_export.sites import Linear, Sites
from tests.rewrite.conftest import Rewritten
from tests.support.policies import measured_absmax, rtn_policy
from tests.support.traced import Traced, causal_feed, run

REWRITTEN = ("llama_rewritten", "llama_rewritten_fp16", "opt_rewritten")
INLINE_BYTES = 1024


def _nodes(model: ir.Model) -> dict[str, ir.Node]:
    return {node.name or "": node for node in model.graph}


def _before_cast(value: ir.Value | None) -> ir.Node:
    node = value.producer() if value is not None else None
    assert node is not None
    if node.op_type == "Cast":
        return _before_cast(node.inputs[0])
    return node


def _numpy(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array


@pytest.mark.parametrize("fixture", REWRITTEN)
def test_codes_and_scales_are_the_policys_bit_for_bit(request: pytest.FixtureRequest, fixture: str) -> None:
    """Stored [out, in] in the policy, [in, out] in the graph: the same integers, the same scales."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    nodes = _nodes(load_graph(rewritten.qdq))
    for path, layer in rewritten.policy.quantized().items():
        dequantize = _before_cast(nodes[rewritten.traced.sites.linear(path).node].inputs[1])
        assert dequantize.op_type == "DequantizeLinear"
        assert dequantize.attributes.get_int("axis") == 0
        assert dequantize.attributes.get_int("block_size") == layer.group_size
        codes, scales = dequantize.inputs[:2]
        assert codes is not None
        assert codes.dtype == ir.DataType.INT4
        expected = int4_from_packed(rewritten.arrays.read(f"{path}.weight_codes"))
        np.testing.assert_array_equal(_numpy(codes).astype(np.int8), expected.T, err_msg=path)
        expected_scales = rewritten.arrays.read(f"{path}.weight_scales")
        np.testing.assert_array_equal(_numpy(scales).astype(np.float16), expected_scales.T, err_msg=path)


@pytest.mark.parametrize("fixture", REWRITTEN)
def test_activation_tiers_are_the_policys(request: pytest.FixtureRequest, fixture: str) -> None:
    """Static layers quantize with their scale, bit for bit; per-token layers with the function; float layers not."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    nodes = _nodes(load_graph(rewritten.qdq))
    tiers = {layer.activation for layer in rewritten.policy.layers.values()}
    assert tiers >= {"static", "lae_static", "per_token"}
    for path, layer in rewritten.policy.layers.items():
        linear = rewritten.traced.sites.linear(path)
        left = nodes[linear.node].inputs[0]
        assert left is not None
        if layer.precision == "float":
            assert left.name == linear.input
            continue
        dequantize = _before_cast(left)
        if layer.activation == "per_token":
            assert dequantize.op_type == PER_TOKEN_QDQ
            continue
        assert dequantize.op_type == "DequantizeLinear"
        assert layer.activation_scale is not None
        assert _numpy(dequantize.inputs[1]) == np.float32(layer.activation_scale)
        assert _numpy(dequantize.inputs[2]) == np.int8(0)


@pytest.mark.parametrize("fixture", REWRITTEN)
def test_weights_are_four_bits_on_disk(request: pytest.FixtureRequest, fixture: str) -> None:
    """A quantized weight takes half a byte and its scales; the data file holds that, the float tensors, and no more."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    scale_bytes = 4 if rewritten.traced.dtype == "fp32" else 2
    expected = 0
    for layer in rewritten.policy.quantized().values():
        weights = layer.in_features * layer.out_features
        assert layer.group_size is not None
        sizes = (weights // 2, weights // layer.group_size * scale_bytes)
        expected += sum(size for size in sizes if size > INLINE_BYTES)
    quantized = {
        f"{path}.{name}" for path in rewritten.policy.quantized() for name in ("weight_codes", "weight_scales")
    }
    values = load_graph(rewritten.qdq).graph.initializers.values()
    others = [value.const_value for value in values if value.name not in quantized and value.const_value is not None]
    expected += sum(tensor.nbytes for tensor in others if tensor.nbytes > INLINE_BYTES)
    assert data_path(rewritten.w4a8).stat().st_size == expected


def test_readers_of_one_tensor_share_one_quantization(llama_rewritten: Rewritten) -> None:
    """q, k and v multiply the very same INT8 tensor: it is quantized once."""
    nodes = _nodes(load_graph(llama_rewritten.qdq))
    for layer, count in ((0, 1), (1, 1)):
        lefts = {nodes[f"model.layers.{layer}.self_attn.{name}_proj/MatMul"].inputs[0] for name in "qkv"}
        assert len(lefts) == count
    sites = llama_rewritten.traced.sites
    inputs = {(sites.linear(path).input) for path in llama_rewritten.policy.quantized()}
    quantizers = [node for node in nodes.values() if node.op_type in ("QuantizeLinear", PER_TOKEN_QDQ)]
    assert len(quantizers) == len(inputs)


def test_float_layers_keep_their_weight(llama_rewritten: Rewritten) -> None:
    """The excluded head multiplies by the float weight of the traced graph, bit for bit."""
    before, after = load_graph(llama_rewritten.traced.model), load_graph(llama_rewritten.qdq)
    weight = _nodes(after)["lm_head/MatMul"].inputs[1]
    np.testing.assert_array_equal(_numpy(weight), _numpy(before.graph.initializers["lm_head.weight"]))


def test_float_weights_of_quantized_layers_are_gone(llama_rewritten: Rewritten) -> None:
    """No float copy of a quantized weight stays in the file."""
    names = set(load_graph(llama_rewritten.qdq).graph.initializers)
    assert not names & {f"{path}.weight" for path in llama_rewritten.policy.quantized()}


def test_embedding_of_a_quantized_tied_head_stays(opt_rewritten: Rewritten) -> None:
    """OPT's head is quantized; the embedding it was tied to is still read by Gather, in full precision."""
    before, after = load_graph(opt_rewritten.traced.model), load_graph(opt_rewritten.qdq)
    tied = opt_rewritten.traced.sites.linear("lm_head").weight
    embedding = after.graph.initializers[tied]
    assert {use.node.op_type for use in embedding.uses()} == {"Gather"}
    np.testing.assert_array_equal(_numpy(embedding), _numpy(before.graph.initializers[tied]))
    assert "lm_head/Transpose" not in _nodes(after)


def test_biases_stay(opt_rewritten: Rewritten) -> None:
    """Every quantized linear with a bias is followed by the Add of that bias."""
    nodes = _nodes(load_graph(opt_rewritten.qdq))
    sites = opt_rewritten.traced.sites
    biased = [linear for linear in sites.linears if linear.bias is not None]
    assert biased
    for linear in biased:
        (use,) = nodes[linear.node].outputs[0].uses()
        assert use.node.op_type == "Add"
        assert linear.bias in [value.name for value in use.node.inputs if value is not None]


def test_order_of_the_policy_does_not_matter(llama_fp32: Traced, ids: NDArray[np.int64], tmp_path: Path) -> None:
    """A policy sorted in another way gives a valid graph: v first must not put the shared quantization behind q."""
    tiers: dict[str, Activation] = {f"model.layers.0.self_attn.{name}_proj": "static" for name in "qkv"}
    absmax = measured_absmax(llama_fp32, ids)
    policy, arrays = rtn_policy(llama_fp32, tmp_path / "policy.json", tiers, absmax)
    logits = []
    for name, layers in (("straight", policy.layers.items()), ("reversed", reversed(policy.layers.items()))):
        model = load_graph(llama_fp32.model)
        InsertQdq(llama_fp32.sites, policy.model_copy(update={"layers": dict(layers)}), arrays)(model)
        path = tmp_path / f"{name}.onnx"
        write_weights(model, data_path(path))
        save_graph(model, path)
        onnx.checker.check_model(str(path))
        logits.append(run(path, causal_feed(path, ids), outputs=["logits"])["logits"])
    np.testing.assert_array_equal(logits[0], logits[1])


def _one_linear(out_features: int) -> tuple[ir.Model, Sites]:
    numbers = ", ".join("1" for _ in range(16 * out_features))
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 21]> g (float[T, 16] x) => (float[T, {out_features}] y)
        <float[16, {out_features}] W = {{{numbers}}}> {{ y = MatMul(x, W) }}"""
    )
    model.graph[0].name = "fc/MatMul"
    linear = Linear(
        path="fc",
        node="fc/MatMul",
        weight="W",
        weight_transposed=False,
        bias=None,
        in_features=16,
        out_features=out_features,
        input="x",
        site=None,
        no_site_reason="test",
    )
    return model, Sites(linears=(linear,), fold_sites=())


def _one_layer(out_features: int = 3, **changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "precision": "w4a8",
        "activation": "static",
        "reason": "test",
        "in_features": 16,
        "out_features": out_features,
        "activation_scale": 0.5,
        "group_size": 16,
        "weight_method": "rtn",
    }
    return Policy(model="m", rule=Rule(), layers={"fc": LayerPolicy(**{**fields, **changes})})


def _one_array_file(directory: Path, out_features: int, codes: NDArray[np.int8] | None = None) -> PolicyArrays:
    codes = np.zeros((out_features, 16), np.int8) if codes is None else codes
    arrays: dict[str, NDArray[Any]] = {
        "fc.weight_codes": packed_from_int4(codes),
        "fc.weight_scales": np.ones((out_features, 1), np.float16),
    }
    path = directory / "policy.json"
    write_policy(_one_layer(out_features), arrays, path)
    return PolicyArrays(arrays_path(path))


def test_odd_number_of_outputs_is_packed(tmp_path: Path) -> None:
    """A vocabulary of odd size: rows of the [in, out] layout end inside a byte, as ONNX wants it."""
    codes = np.random.default_rng(0).integers(-8, 8, (5, 16)).astype(np.int8)
    arrays = _one_array_file(tmp_path, 5, codes)
    model, sites = _one_linear(5)
    InsertQdq(sites, _one_layer(5), arrays)(model)
    save_graph(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    x = np.full((1, 16), 0.5, np.float32)
    y = run(tmp_path / "model.onnx", {"x": x})["y"]
    np.testing.assert_array_equal(y[0], codes.sum(axis=1) * 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_scale": None}, r"'fc' is static with activation scale None"),
        ({"activation": "lae_static", "activation_scale": None}, r"'fc' is lae_static with activation scale None"),
        ({"activation": "per_token"}, r"'fc' is per_token with activation scale 0\.5"),
        ({"activation": None}, r"'fc' is None with"),
        ({"group_size": None}, r"'fc' has no group size"),
        ({"group_size": 32}, r"'fc' has no group size that divides"),
    ],
)
def test_half_said_layers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A static layer without a scale must not run per token in silence."""
    model, sites = _one_linear(3)
    with pytest.raises(ir.passes.PreconditionError, match=message):
        InsertQdq(sites, _one_layer(**changes), _one_array_file(tmp_path, 3))(model)
    assert [node.op_type for node in model.graph] == ["MatMul"]


def test_policy_of_another_graph_is_refused(tmp_path: Path) -> None:
    """A node that is not there is named before anything changes."""
    model, sites = _one_linear(3)
    model.graph[0].name = "elsewhere"
    with pytest.raises(ir.passes.PreconditionError, match="no node for 'fc'"):
        InsertQdq(sites, _one_layer(), _one_array_file(tmp_path, 3))(model)


def test_arrays_of_another_shape_are_refused(tmp_path: Path) -> None:
    """A group size edited by hand does not fit the stored scales: named with both shapes, nothing written."""
    model, sites = _one_linear(64)
    arrays = _one_array_file(tmp_path, 32)
    InsertQdq(sites, _one_layer(64), arrays)(model)
    with pytest.raises(UserError, match=r"'fc\.weight_codes' is \[32, 8\], but policy\.json asks for \[64, 8\]"):
        save_graph(model, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_policy_without_quantized_layers_changes_nothing(tmp_path: Path) -> None:
    """All layers float: the pass reports no change and makes none."""
    model, sites = _one_linear(3)
    policy = _one_layer(precision="float", activation=None, activation_scale=None, group_size=None, weight_method=None)
    before = ir.to_proto(model)
    assert not InsertQdq(sites, policy, _one_array_file(tmp_path, 3))(model).modified
    assert ir.to_proto(model) == before
