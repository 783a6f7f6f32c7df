"""Portable W4A8 nodes become plugin nodes, or are left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from fptq_export.graph_io import load_graph
from fptq_export.packing import groups_from_packed_scales, int4_from_packed_tiles
from fptq_export.rewrite import lower_for_plugin, lower_for_tensorrt
from fptq_export.rewrite.functions import DOMAIN, PLUGIN_ATTRIBUTES, W4A8_PER_TOKEN, W4A8_STATIC, w4a8_function
from fptq_export.rewrite.lower_to_plugin import PLUGIN_DOMAIN, PLUGIN_VERSION, LowerToPlugin
from tests.rewrite.conftest import Rewritten

OUT, IN, GROUP = 24, 96, 32
PATH = "layer.q_proj"
CODES: NDArray[np.int8] = np.random.default_rng(0).integers(-8, 8, (IN, OUT)).astype(np.int8)
SCALES: NDArray[np.float16] = np.random.default_rng(1).random((IN // GROUP, OUT)).astype(np.float16)
BIAS: NDArray[np.float16] = np.arange(OUT, dtype=np.float16)
FLOAT16 = ir.DataType.FLOAT16

Change = Callable[[dict[str, Any]], object]


def constant(name: str, array: NDArray[Any] | np.generic, dtype: ir.DataType | None = None) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), dtype=dtype, name=name)
    return ir.Value(name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor)


def parts(**changes: Any) -> dict[str, Any]:
    """What a model of one linear is made of."""
    int4 = CODES.astype(ml_dtypes.int4)
    made = {
        "op_type": W4A8_STATIC,
        "domain": DOMAIN,
        "dtype": FLOAT16,
        "group_size": GROUP,
        "codes": constant(f"{PATH}.weight_codes", int4),
        "scales": constant(f"{PATH}.weight_scales", SCALES),
        "x_scale": constant(f"{PATH}.activation_scale", np.float32(0.05)),
        "bias": None,
        "extra": lambda y: [],
    }
    return {**made, **changes}


def model_of(part: dict[str, Any]) -> ir.Model:
    """`y = linear(x)`, or `y = linear(x) + bias`; `extra` makes more nodes that read the linear's output."""
    x = ir.Value(name="x", shape=ir.Shape(["tokens", IN]), type=ir.TensorType(part["dtype"]))
    inputs = [x, part["codes"], part["scales"], *([part["x_scale"]] if part["x_scale"] is not None else [])]
    attributes: list[ir.Attr] = [ir.AttrString(name, value) for name, value in PLUGIN_ATTRIBUTES.items()]
    attributes.append(ir.AttrInt64("group_size", part["group_size"]))
    node = ir.Node(part["domain"], part["op_type"], inputs, attributes, name=f"{PATH}/{part['op_type']}")
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "product", part["dtype"], ir.Shape(["tokens", OUT])
    nodes, output = [node], y
    if part["bias"] is not None:
        addition = ir.Node("", "Add", [part["bias"], y], name=f"{PATH}/Add")
        output = addition.outputs[0]
        output.name, output.dtype, output.shape = "y", part["dtype"], y.shape
        nodes.append(addition)
    extra: list[ir.Node] = part["extra"](y)
    initializers = [
        value for value in (*inputs[1:], part["bias"]) if value is not None and value.const_value is not None
    ]
    graph_inputs = [x, *(value for value in inputs[1:] if value.const_value is None)]
    outputs = [output, *(node.outputs[0] for node in extra)]
    graph = ir.Graph(
        graph_inputs,
        outputs,
        nodes=[*nodes, *extra],
        initializers=initializers,
        opset_imports={"": 21, DOMAIN: 1},
        name="test",
    )
    function = (
        w4a8_function(part["op_type"], part["dtype"]) if part["op_type"] in (W4A8_STATIC, W4A8_PER_TOKEN) else None
    )
    return ir.Model(graph, ir_version=10, functions=[function] if function is not None else [])


def lowered(part: dict[str, Any]) -> tuple[ir.Model, LowerToPlugin, bool]:
    model, step = model_of(part), LowerToPlugin()
    modified = step(model).modified
    return model, step, modified


def array_of(model: ir.Model, name: str) -> NDArray[Any]:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_static_linear_becomes_a_plugin_node() -> None:
    """Operator, domain, version, attributes and inputs are what the plugin's creator reads; the function is gone."""
    model, step, modified = lowered(parts())
    (node,) = model.graph
    assert modified
    assert step.lowered == {PATH: W4A8_STATIC}
    assert step.left_alone == {}
    assert (node.domain, node.op_type, node.name) == (PLUGIN_DOMAIN, W4A8_STATIC, f"{PATH}/{W4A8_STATIC}")
    assert {name: node.attributes.get_int(name) for name in ("layout_version", "scheme", "group_size", "has_bias")} == {
        "layout_version": 1,
        "scheme": 1,
        "group_size": GROUP,
        "has_bias": 0,
    }
    assert (node.attributes.get_int("in_features"), node.attributes.get_int("out_features")) == (IN, OUT)
    assert node.attributes.get_string("plugin_namespace") == "fptq"
    assert node.attributes.get_string("plugin_version") == PLUGIN_VERSION != PLUGIN_ATTRIBUTES["plugin_version"]
    names = [value.name for value in node.inputs if value is not None]
    assert names == ["x", f"{PATH}.weight_tiles", f"{PATH}.weight_tile_scales", f"{PATH}.activation_scale"]
    assert not model.functions
    assert DOMAIN not in model.graph.opset_imports
    assert [value.name for value in model.graph.outputs] == ["product"]


def test_per_token_linear_has_no_scale_input() -> None:
    """The other mode is the other operator, with one input less."""
    model, step, _ = lowered(parts(op_type=W4A8_PER_TOKEN, x_scale=None))
    assert step.lowered == {PATH: W4A8_PER_TOKEN}
    assert len(model.graph[0].inputs) == 3


def test_weights_are_those_of_the_portable_graph() -> None:
    """Tiles and scales unpack to the codes and scales that went in; the old initializers are gone."""
    model, _, _ = lowered(parts())
    assert set(model.graph.initializers) == {
        f"{PATH}.weight_tiles",
        f"{PATH}.weight_tile_scales",
        f"{PATH}.activation_scale",
    }
    tiles = model.graph.initializers[f"{PATH}.weight_tiles"].const_value
    assert tiles is not None
    assert (tiles.dtype, list(tiles.shape)) == (ir.DataType.INT4, [32, 128])
    packed = np.frombuffer(tiles.tobytes(), np.uint8)
    np.testing.assert_array_equal(int4_from_packed_tiles(packed, OUT, IN), CODES.T)
    scales = array_of(model, f"{PATH}.weight_tile_scales")
    assert scales.shape == (IN // GROUP, 32)
    np.testing.assert_array_equal(groups_from_packed_scales(scales, OUT), SCALES.T)


def test_bias_is_taken_into_the_node() -> None:
    """The sum of product and bias is one output, rounded once; the Add is gone."""
    model, _, _ = lowered(parts(bias=constant("bias", BIAS)))
    (node,) = model.graph
    assert node.attributes.get_int("has_bias") == 1
    assert node.inputs[-1] is model.graph.initializers["bias"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_bfloat16_graph_is_lowered() -> None:
    """The kernels compute in both 16-bit types."""
    model, step, _ = lowered(parts(dtype=ir.DataType.BFLOAT16))
    assert step.lowered == {PATH: W4A8_STATIC}
    assert model.graph[0].outputs[0].dtype == ir.DataType.BFLOAT16


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": ir.DataType.FLOAT}, "FLOAT16 or BFLOAT16"),
        ({"group_size": 48}, "no group size 48"),
        ({"codes": constant("c", np.zeros((IN, 20), ml_dtypes.int4))}, "20 output channels are not a multiple of 8"),
        ({"codes": constant("c", CODES)}, "not an INT4 constant"),
        (
            {"codes": ir.Value(name="c", shape=ir.Shape([IN, OUT]), type=ir.TensorType(ir.DataType.INT4))},
            "INT4 constant",
        ),
        ({"scales": constant("s", SCALES.astype(np.float32))}, "not FLOAT16 constants"),
        ({"scales": constant("s", SCALES[:1])}, "its scales are"),
        ({"group_size": 64}, "its scales are"),
        ({"x_scale": constant("a", np.ones(2, np.float32))}, "not one FLOAT constant"),
        ({"x_scale": constant("a", np.float16(1))}, "not one FLOAT constant"),
        ({"x_scale": ir.Value(name="a", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))}, "not one FLOAT"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_linear_that_the_kernels_cannot_run_is_left_alone(changes: dict[str, Any], reason: str) -> None:
    """Each reason is reported with the path, and neither the node nor its function is touched."""
    model, step, modified = lowered(parts(**changes))
    assert not modified
    assert list(step.left_alone) == [PATH]
    assert reason in step.left_alone[PATH]
    assert [node.domain for node in model.graph] == [DOMAIN]
    assert len(model.functions) == 1


@pytest.mark.parametrize("changes", [{"op_type": "FptqOther"}, {"domain": "com.other"}, {"domain": PLUGIN_DOMAIN}])
def test_other_nodes_are_left_alone(changes: dict[str, Any]) -> None:
    """Other domains, other operators and nodes that are lowered already are none of this pass's business."""
    model, step, modified = lowered(parts(**changes))
    assert not modified
    assert (step.lowered, step.left_alone) == ({}, {})
    assert f"{PATH}.weight_codes" in model.graph.initializers


@pytest.mark.parametrize(
    "bias",
    [
        constant("bias", BIAS[None]),
        constant("bias", BIAS.astype(np.float32)),
        constant("bias", np.float16(1)),
    ],
    ids=["two dimensions", "another type", "scalar"],
)
def test_sum_that_is_no_bias_is_left_alone(bias: ir.Value) -> None:
    """What is added must be one value for each output channel, in the graph's type."""
    model, _, _ = lowered(parts(bias=bias))
    assert [node.op_type for node in model.graph] == [W4A8_STATIC, "Add"]
    assert model.graph[0].attributes.get_int("has_bias") == 0


def test_bias_after_a_product_with_other_readers_is_left_alone() -> None:
    """A product that something else reads as well stays a value of its own."""
    more = {"extra": lambda y: [ir.Node("", "Abs", [y], name="abs")]}
    model, _, _ = lowered(parts(bias=constant("bias", BIAS), **more))
    assert sorted(node.op_type for node in model.graph) == ["Abs", "Add", W4A8_STATIC]


def test_product_that_is_a_graph_output_is_left_alone() -> None:
    """A product that callers see keeps its value, and its name."""
    part = parts(bias=constant("bias", BIAS))
    model = model_of(part)
    model.graph.outputs.append(model.graph[0].outputs[0])
    LowerToPlugin()(model)
    assert [node.op_type for node in model.graph] == [W4A8_STATIC, "Add"]
    assert [value.name for value in model.graph.outputs] == ["y", "product"]


def test_product_added_to_itself_is_left_alone() -> None:
    """Two uses by one node are no bias."""
    model, _, _ = lowered(parts(extra=lambda y: [ir.Node("", "Add", [y, y], name="twice")]))
    assert sorted(node.op_type for node in model.graph) == ["Add", W4A8_STATIC]


def test_scales_that_something_else_reads_stay() -> None:
    """An initializer with another reader is not removed."""
    part = parts()
    part["extra"] = lambda y: [ir.Node("", "Abs", [part["scales"]], name="abs")]
    model, _, _ = lowered(part)
    assert f"{PATH}.weight_scales" in model.graph.initializers
    assert f"{PATH}.weight_codes" not in model.graph.initializers


def test_whole_model_is_lowered_with_its_policy(llama_rewritten_fp16: Rewritten, tmp_path: Path) -> None:
    """Every quantized linear of a model runs in the plugin in its mode, and its tiles hold the codes of the policy."""
    portable_path, lowered_path = llama_rewritten_fp16.w4a8, tmp_path / "lowered.onnx"
    result = lower_for_plugin(portable_path, lowered_path, fuse_projections=False)
    wanted = {
        path: W4A8_PER_TOKEN if layer.activation == "per_token" else W4A8_STATIC
        for path, layer in llama_rewritten_fp16.policy.quantized().items()
    }
    assert result.plugin == wanted
    assert result.left_alone == {}
    model = load_graph(tmp_path / "lowered.onnx")
    portable = load_graph(llama_rewritten_fp16.w4a8)
    for path, layer in llama_rewritten_fp16.policy.quantized().items():
        tiles = model.graph.initializers[f"{path}.weight_tiles"].const_value
        assert tiles is not None
        packed = np.frombuffer(tiles.tobytes(), np.uint8)
        codes = int4_from_packed_tiles(packed, layer.out_features, layer.in_features)
        np.testing.assert_array_equal(codes.T, array_of(portable, f"{path}.weight_codes").astype(np.int8))
    assert {node.domain for node in model.graph} == {"", PLUGIN_DOMAIN}
    assert [value.name for value in model.graph.inputs] == [value.name for value in portable.graph.inputs]
    assert [value.name for value in model.graph.outputs] == [value.name for value in portable.graph.outputs]


def test_model_in_float_is_lowered_natively(llama_rewritten: Rewritten, tmp_path: Path) -> None:
    """Where the plugin runs nothing, the graph is that of the native lowering, and every linear has a reason."""
    result = lower_for_plugin(llama_rewritten.w4a8, tmp_path / "plugin.onnx")
    lower_for_tensorrt(llama_rewritten.w4a8, tmp_path / "native.onnx")
    assert result.plugin == {}
    assert set(result.left_alone) == set(llama_rewritten.policy.quantized())
    names = [[node.name for node in load_graph(tmp_path / file).graph] for file in ("plugin.onnx", "native.onnx")]
    assert names[0] == names[1]
