"""Linears that read one tensor are multiplied together, or left alone; the outputs keep every bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

from fptq_export.graph_io import load_graph, save_graph, write_weights
from fptq_export.packing import int4_from_packed_tiles
from fptq_export.rewrite import lower_for_plugin
from fptq_export.rewrite.functions import DOMAIN, PLUGIN_ATTRIBUTES, W4A8_PER_TOKEN, W4A8_STATIC, w4a8_function
from fptq_export.rewrite.fuse_projections import FuseProjections
from fptq_export.rewrite.lower_to_plugin import PLUGIN_DOMAIN, LowerToPlugin
from tests.rewrite.conftest import Rewritten
from tests.support.traced import causal_feed, run
from tests.support.w4a8_cases import assert_same_bits

IN, GROUP, TOKENS = 96, 32, 7
SCALE = np.float32(0.03)
PARENT = "model.layers.0.self_attn"
WIDTHS = {"q_proj": 48, "k_proj": 24, "v_proj": 8}
FUSED = f"{PARENT}.q_proj+k_proj+v_proj"
Projection = dict[str, Any]


def projection(name: str, **changes: Any) -> Projection:
    """A linear of the tiny graph, of the width that its name has."""
    plain = {"op_type": W4A8_STATIC, "x": "x", "group": GROUP, "scale": SCALE, "bias": False, "domain": DOMAIN}
    return {"path": f"{PARENT}.{name}", "out": WIDTHS[name], **plain, **changes}


def projections(**changes: Mapping[str, Any]) -> list[Projection]:
    """q, k and v; `changes` by name."""
    return [projection(name, **changes.get(name, {})) for name in WIDTHS]


def alike(**changes: Any) -> list[Projection]:
    """q, k and v, all changed in the same way."""
    return [projection(name, **changes) for name in WIDTHS]


def constant(model: ir.Model, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
    """An initializer, made with the first call for its name."""
    if name not in model.graph.initializers:
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype))
        value.const_value = tensor
        model.graph.register_initializer(value)
    return model.graph.initializers[name]


def model_of(parts: list[Projection], dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    """Inputs x and other, one output a linear, named after it."""
    inputs = {
        name: ir.Value(name=name, shape=ir.Shape(["tokens", IN]), type=ir.TensorType(dtype)) for name in ("x", "other")
    }
    graph = ir.Graph(list(inputs.values()), [], nodes=[], opset_imports={"": 21, DOMAIN: 1}, name="test")
    model = ir.Model(graph, ir_version=10)
    for part in parts:
        if part["op_type"] in (W4A8_STATIC, W4A8_PER_TOKEN):
            function = w4a8_function(part["op_type"], dtype)
            model.functions.setdefault(function.identifier(), function)
        output = linear_of(model, part, inputs[part["x"]], dtype)
        model.graph.outputs.append(output)
    return model


def linear_of(model: ir.Model, part: Projection, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Add a linear, and its bias where it has one."""
    rng = np.random.default_rng(sum(map(ord, part["path"])))
    path, out = part["path"], part["out"]
    groups = (IN // part["group"], out)
    codes = constant(
        model, part.get("codes", f"{path}.weight_codes"), rng.integers(-8, 8, (IN, out)).astype(ml_dtypes.int4)
    )
    scales = constant(model, f"{path}.weight_scales", rng.uniform(0.001, 0.1, groups).astype(np.float16))
    values = [x, codes, scales]
    if part["op_type"] == W4A8_STATIC:
        values.append(constant(model, f"{path}.activation_scale", part["scale"]))
    attributes: list[ir.Attr] = [ir.AttrString(key, text) for key, text in PLUGIN_ATTRIBUTES.items()]
    attributes.append(ir.AttrInt64("group_size", part["group"]))
    node = ir.Node(part["domain"], part["op_type"], values, attributes, name=f"{path}/{part['op_type']}")
    nodes = [node]
    if part["bias"]:
        bias = constant(model, f"{path}.bias", rng.standard_normal((out,)).astype(dtype.numpy()))
        node.outputs[0].name = f"{path}.product"
        nodes.append(ir.Node("", "Add", [node.outputs[0], bias], name=f"{path}/Add"))
    for made in nodes:
        made.outputs[0].dtype, made.outputs[0].shape = dtype, ir.Shape(["tokens", out])
    output = nodes[-1].outputs[0]
    output.name = path
    model.graph.extend(nodes)
    return output


def fused(parts: list[Projection], dtype: ir.DataType = ir.DataType.FLOAT16) -> tuple[ir.Model, FuseProjections]:
    """The graph after the pass; where it changed nothing, it said so and there is no new node."""
    model, step = model_of(parts, dtype), FuseProjections()
    before = [node.name for node in model.graph]
    modified = step(model).modified
    assert modified == bool(step.fused)
    if not modified:
        assert [node.name for node in model.graph] == before
    return model, step


def outputs_of(model: ir.Model, tokens: int = TOKENS) -> dict[str, NDArray[Any]]:
    """What ONNX Runtime makes of the function-body form of a graph; its optimizations would quantize x once more."""
    rng = np.random.default_rng(5)
    feed = {name: (rng.standard_normal((tokens, IN)) * 3).astype(np.float16) for name in ("x", "other")}
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    wanted = {value.name for value in session.get_inputs()}
    return dict(zip(names, session.run(names, {k: v for k, v in feed.items() if k in wanted}), strict=True))


@pytest.mark.parametrize("tokens", [1, TOKENS])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op_type", [W4A8_STATIC, W4A8_PER_TOKEN])
def test_outputs_keep_every_bit(op_type: str, bias: bool, tokens: int) -> None:
    """In ONNX Runtime the fused graph gives the bytes of the three linears, under their names and in their order."""
    parts = alike(op_type=op_type, bias=bias)
    expected = outputs_of(model_of(parts), tokens)
    model, step = fused(parts)
    assert step.fused == {FUSED: tuple(f"{PARENT}.{name}" for name in WIDTHS)}
    got = outputs_of(model, tokens)
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert_same_bits(got[name], array, name)


def test_one_node_remains_with_its_weight() -> None:
    """One linear and one Split; codes and scales stand in the order of the outputs, and the old ones are gone."""
    before = model_of(projections())
    model, _ = fused(projections())
    assert [(node.name, node.op_type) for node in model.graph] == [
        (f"{FUSED}/{W4A8_STATIC}", W4A8_STATIC),
        (f"{FUSED}/Split", "Split"),
    ]
    assert set(model.graph.initializers) == {
        f"{PARENT}.q_proj.activation_scale",
        f"{FUSED}.split_sizes",
        f"{FUSED}.weight_codes",
        f"{FUSED}.weight_scales",
    }
    for kind in ("weight_codes", "weight_scales"):
        parts = [before.graph.initializers[f"{PARENT}.{name}.{kind}"].const_value for name in WIDTHS]
        whole = model.graph.initializers[f"{FUSED}.{kind}"].const_value
        assert whole is not None
        joined = np.concatenate([part.numpy() for part in parts if part is not None], axis=1)
        np.testing.assert_array_equal(whole.numpy().astype(np.float32), joined.astype(np.float32))


def test_bias_of_all_is_taken_into_the_plugin() -> None:
    """Biases of every fused linear become one, in front of the Split, where the lowering takes it into the node."""
    model, _ = fused(alike(bias=True))
    assert [node.op_type for node in model.graph] == [W4A8_STATIC, "Add", "Split"]
    LowerToPlugin()(model)
    assert [(node.domain, node.op_type) for node in model.graph] == [(PLUGIN_DOMAIN, W4A8_STATIC), ("", "Split")]
    assert model.graph[0].attributes.get_int("has_bias") == 1
    assert model.graph[0].attributes.get_int("out_features") == sum(WIDTHS.values())


def test_linears_with_and_without_bias_are_fused_apart() -> None:
    """No zero bias is invented: the two without one are fused, the one with a bias stays."""
    parts = projections(q_proj={"bias": True})
    expected = outputs_of(model_of(parts))
    model, step = fused(parts)
    assert step.fused == {f"{PARENT}.k_proj+v_proj": (f"{PARENT}.k_proj", f"{PARENT}.v_proj")}
    for name, array in outputs_of(model).items():
        assert_same_bits(array, expected[name], name)


def test_two_scales_on_one_tensor_make_two_linears() -> None:
    """Each scale has its own linear: fusing all four would quantize the activation wrongly for half of them."""
    other = {"scale": np.float32(0.05)}
    pairs = [projection("q_proj"), projection("k_proj", **other), projection("v_proj")]
    gate = {**projection("q_proj", **other), "path": f"{PARENT}.gate"}
    _, step = fused([*pairs, gate])
    assert list(step.fused) == [f"{PARENT}.q_proj+v_proj", f"{PARENT}.k_proj+gate"]


def test_paths_without_a_common_parent_are_joined_whole() -> None:
    """The name of a fused linear names everything it computes."""
    _, step = fused([projection("q_proj"), {**projection("k_proj"), "path": "mlp.up"}])
    assert list(step.fused) == [f"{PARENT}.q_proj+mlp.up"]


def test_name_of_many_does_not_grow_with_them() -> None:
    """Experts read one tensor by the hundred: the first and the last are named, and how many lie between."""
    paths = [f"experts.{expert}.up_proj" for expert in range(9)]
    _, step = fused([{**projection("q_proj"), "path": path} for path in paths])
    assert step.fused == {"experts.0.up_proj+7+experts.8.up_proj": tuple(paths)}


@pytest.mark.parametrize(
    "changes",
    [
        {"x": "other"},
        {"op_type": W4A8_PER_TOKEN},
        {"scale": np.float32(0.031)},
        {"group": 16},
        {"bias": True},
        {"out": 20},
        {"domain": "com.other"},
        {"op_type": "FptqOther"},
        {"domain": PLUGIN_DOMAIN},
    ],
    ids=["input", "tier", "scale", "group size", "bias", "width", "domain", "operator", "lowered already"],
)
def test_linear_that_differs_is_left_alone(changes: dict[str, Any]) -> None:
    """Two linears that are not the same multiplication of the same tensor keep their nodes and weights."""
    model, step = fused([projection("q_proj"), projection("k_proj", **changes)])
    assert step.fused == {}
    assert {f"{PARENT}.{name}.weight_codes" for name in ("q_proj", "k_proj")} <= set(model.graph.initializers)


def test_single_linear_is_left_alone() -> None:
    """There is nothing to fuse it with."""
    assert fused([projection("q_proj")])[1].fused == {}


def test_weight_with_two_readers_is_left_alone() -> None:
    """A weight that two linears share is stored once, and stays so."""
    shared = {"codes": "shared", "out": 8}
    model, step = fused([projection("q_proj", **shared), projection("k_proj", **shared)])
    assert step.fused == {}
    assert len(model.graph.initializers["shared"].uses()) == 2


def test_graph_in_float_is_left_alone() -> None:
    """The kernels do not compute in FLOAT: nothing is fused for a plugin that will not run it."""
    assert fused(projections(), ir.DataType.FLOAT)[1].fused == {}


def test_bfloat16_graph_is_fused() -> None:
    """The kernels compute in both 16-bit types."""
    assert list(fused(projections(), ir.DataType.BFLOAT16)[1].fused) == [FUSED]


def test_product_that_is_read_besides_its_bias_keeps_both_values() -> None:
    """A product that is an output of the graph stays one, and its bias stays behind the Split."""
    parts = alike(bias=True)
    model = model_of(parts)
    product = next(node for node in model.graph if node.name == f"{PARENT}.q_proj/{W4A8_STATIC}").outputs[0]
    model.graph.outputs.append(product)
    expected = outputs_of(model)
    step = FuseProjections()
    step(model)
    assert list(step.fused) == [f"{PARENT}.k_proj+v_proj"]
    got = outputs_of(model)
    for name, array in expected.items():
        assert_same_bits(got[name], array, name)


def test_real_graph_keeps_every_bit_of_its_logits_and_cache(
    llama_rewritten_fp16: Rewritten, ids: NDArray[np.int64], tmp_path: Path
) -> None:
    """A whole model with all three tiers: q, k, v and gate, up of both layers are fused; no output changes a bit."""
    model, step = load_graph(llama_rewritten_fp16.w4a8), FuseProjections()
    step(model)
    assert sorted(len(paths) for paths in step.fused.values()) == [2, 2, 3, 3]
    path = tmp_path / "fused.onnx"
    write_weights(model, tmp_path / "fused.onnx.data")
    save_graph(model, path)
    onnx.checker.check_model(str(path))
    expected = run(llama_rewritten_fp16.w4a8, causal_feed(llama_rewritten_fp16.w4a8, ids))
    got = run(path, causal_feed(path, ids))
    assert list(got) == list(expected)
    for name, array in expected.items():
        assert_same_bits(got[name], array, name)


def test_packed_weight_of_a_fused_linear_holds_all_codes(llama_rewritten_fp16: Rewritten, tmp_path: Path) -> None:
    """Fused by default for the plugin: tiles unpack to the codes of the policy, side by side."""
    result = lower_for_plugin(llama_rewritten_fp16.w4a8, tmp_path / "lowered.onnx")
    layers = llama_rewritten_fp16.policy.quantized()
    alone = set(layers) - {path for paths in result.fused.values() for path in paths}
    assert set(result.plugin) == alone | set(result.fused)
    model, portable = load_graph(tmp_path / "lowered.onnx"), load_graph(llama_rewritten_fp16.w4a8)
    for fused_path, paths in result.fused.items():
        tiles = model.graph.initializers[f"{fused_path}.weight_tiles"].const_value
        parts = [portable.graph.initializers[f"{path}.weight_codes"].const_value for path in paths]
        assert tiles is not None
        joined = np.concatenate([part.numpy().astype(np.int8) for part in parts if part is not None], axis=1)
        packed = np.frombuffer(tiles.tobytes(), np.uint8)
        np.testing.assert_array_equal(int4_from_packed_tiles(packed, joined.shape[1], joined.shape[0]).T, joined)


def test_without_the_option_nothing_is_fused(llama_rewritten_fp16: Rewritten, tmp_path: Path) -> None:
    """Each linear keeps its node and its path."""
    result = lower_for_plugin(llama_rewritten_fp16.w4a8, tmp_path / "lowered.onnx", fuse_projections=False)
    assert result.fused == {}
    assert set(result.plugin) == set(llama_rewritten_fp16.policy.quantized())
