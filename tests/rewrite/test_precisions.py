"""Layers in `w8a8` and `w4a16` beside `w4a8`: every form of the graph computes what the policy says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from fptq_export import numerics
from fptq_export.errors import PrecisionError
from fptq_export.graph_io import load_graph, save_graph
from fptq_export.policy import LayerPolicy, Policy, PolicyArrays, Rule, arrays_path, write_policy
from fptq_export.rewrite import lower_for_plugin
from fptq_export.rewrite.check_invariants import CheckInvariants, interface_from_graph
from fptq_export.rewrite.functions import DOMAIN, FRACTION
from fptq_export.rewrite.insert_qdq import InsertQdq
from fptq_export.rewrite.lint_precision import LintPrecision
from fptq_export.sites import Linear, Sites
from tests.rewrite.conftest import Rewritten
from tests.support.graphs import constant
from tests.support.traced import causal_feed, run

FLOAT, FLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
FORMS = ("qdq", "w4a8", "lowered")
IN, OUT = 48, 6
HALF_STEP = {FLOAT: 2.0**-24, FLOAT16: 2.0**-11}
"""Relative error of one rounding to nearest."""
SITES = Sites(
    linears=(
        Linear(
            path="fc", node="fc/MatMul", weight="W", weight_transposed=False, bias=None, in_features=IN,
            out_features=OUT, input="x", site=None, no_site_reason="test",
        ),
    ),
    fold_sites=(),
)  # fmt: skip


def _float_linear(dtype: ir.DataType) -> ir.Model:
    """One linear of a type, whose product is an output of the graph."""
    x = ir.Value(name="x", shape=ir.Shape(["tokens", IN]), type=ir.TensorType(dtype))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="linear"), ir_version=10)
    node = ir.Node("", "MatMul", [x, constant(model, "W", np.ones((IN, OUT), dtype.numpy()))], name="fc/MatMul")
    y = node.outputs[0]
    y.name, y.dtype, y.shape = "y", dtype, ir.Shape(["tokens", OUT])
    model.graph.append(node)
    model.graph.outputs.append(y)
    return model


def _policy(activation: str | None = "static", **changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "precision": "w8a8",
        "activation": activation,
        "reason": "test",
        "in_features": IN,
        "out_features": OUT,
        "activation_scale": 0.0213 if activation == "static" else None,
        "weight_method": "rtn",
    }
    return Policy(model="m", rule=Rule(), layers={"fc": LayerPolicy(**(fields | changes))})


def _int8_linear(directory: Path, dtype: ir.DataType, activation: str, weight: NDArray[np.float32]) -> ir.Model:
    """The float linear after `InsertQdq`; its arrays lie in `directory`."""
    scale = numerics.weight_scale_int8(weight)
    codes = numerics.quantize_weight_int8(weight, scale).astype(np.int8)
    policy = _policy(activation)
    write_policy(policy, {"fc.weight_codes": codes, "fc.weight_scales": scale}, directory / "policy.json")
    model = _float_linear(dtype)
    InsertQdq(SITES, policy, PolicyArrays(arrays_path(directory / "policy.json")))(model)
    return model


EXACT_SUMS = {FLOAT: {"session.x64quantprecision": "1"}, FLOAT16: {}}
"""Where a processor has no VNNI, ONNX Runtime adds pairs of INT8 products in 16 bits, which saturate, unless told so.
In FP16 it has no INT8 GEMM, and told so it fails (1.31)."""


@pytest.mark.parametrize("activation", ["static", "per_token"])
@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_int8_linear_is_the_reference(tmp_path: Path, dtype: ir.DataType, activation: str, seed: int) -> None:
    """Tokens of very different sizes, one that clips and one of zeros, and weights that float16 scales could not hold.

    Without ONNX Runtime's optimizations it multiplies floats; with them it runs an INT8 GEMM.

    Each product has the roundings of its factors to T (the weight is rounded to float32 before); ONNX Runtime sums `in`
    of them in float32. The sum is rounded to T; per token that is done before and after the scale, which is rounded
    twice itself.
    """
    random = np.random.default_rng(seed)
    sizes = np.array([[1.0], [1e-3], [3.0], [1e-5], [0.0], [20.0]])
    weight = (random.normal(size=(OUT, IN)) * np.array([[1], [0.1], [3e-3], [1], [0], [0.02]])).astype(np.float32)
    x = (random.normal(size=(6, IN)) * sizes).astype(dtype.numpy())
    save_graph(_int8_linear(tmp_path, dtype, activation, weight), tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    results = [
        run(tmp_path / "model.onnx", {"x": x}, optimized=optimized, entries=EXACT_SUMS[dtype])["y"]
        for optimized in (False, True)
    ]
    x_scale = np.asarray(np.float32(0.0213)) if activation == "static" else numerics.per_token_scale(x)
    x_codes, w_scale = numerics.quantize_activation(x, x_scale), numerics.weight_scale_int8(weight)
    w_codes = numerics.quantize_weight_int8(weight, w_scale)
    expected = numerics.w8a8_linear(x_codes, x_scale, w_codes, w_scale)
    magnitude = numerics.w8a8_linear(np.abs(x_codes), x_scale, np.abs(w_codes), w_scale)
    step = HALF_STEP[dtype]
    smallest = 2.0**-25 * (1 + IN * 127 * x_scale) if dtype == FLOAT16 else 0.0
    bound = (2.01 * step + (IN + 4) * 2.0**-24) * magnitude + 2.01 * step * np.abs(expected) + smallest
    for y in results:
        assert (np.abs(y.astype(np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("activation", ["static", "per_token"])
def test_bfloat16_linear_is_the_reference(tmp_path: Path, activation: str) -> None:
    """In ONNX's reference evaluator, for ONNX Runtime has no BF16 on a CPU.

    It multiplies and sums in bfloat16: a rounding of 2^-9 for each factor, product and partial sum, and three after.
    """
    bfloat16 = ir.DataType.BFLOAT16
    random = np.random.default_rng(5)
    weight = random.normal(size=(OUT, IN)).astype(np.float32)
    x = random.normal(size=(4, IN)).astype(bfloat16.numpy())
    save_graph(_int8_linear(tmp_path, bfloat16, activation, weight), tmp_path / "model.onnx")
    results: Any = ReferenceEvaluator(str(tmp_path / "model.onnx")).run(None, {"x": x})
    x_scale = np.asarray(np.float32(0.0213)) if activation == "static" else numerics.per_token_scale(x)
    x_codes, w_scale = numerics.quantize_activation(x, x_scale), numerics.weight_scale_int8(weight)
    w_codes = numerics.quantize_weight_int8(weight, w_scale)
    expected = numerics.w8a8_linear(x_codes, x_scale, w_codes, w_scale)
    magnitude = numerics.w8a8_linear(np.abs(x_codes), x_scale, np.abs(w_codes), w_scale)
    assert (np.abs(results[0].astype(np.float64) - expected) <= (IN + 6) * 2.0**-9 * magnitude).all()


def test_per_token_codes_are_exact(tmp_path: Path) -> None:
    """The codes that reach the GEMM are those of the contract, bit for bit, ties and clipped values included."""
    model = _int8_linear(tmp_path, FLOAT, "per_token", np.ones((OUT, IN), np.float32))
    left = next(node for node in model.graph if node.op_type == "MatMul").inputs[0]
    assert left is not None
    model.graph.outputs.append(left)
    left.shape = ir.Shape(["tokens", IN])
    save_graph(model, tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(64, IN)).astype(np.float32)
    x[0, :4] = 127.0, 0.5, 1.5, -126.5
    assert left.name is not None
    fractions = run(tmp_path / "model.onnx", {"x": x})[left.name]
    codes = numerics.quantize_activation(x, numerics.per_token_scale(x))
    np.testing.assert_array_equal(fractions / FRACTION, codes)


@pytest.mark.parametrize("fixture", ["llama_precisions", "llama_precisions_fp16"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_passes_the_checker_and_runs(
    request: pytest.FixtureRequest, fixture: str, form: str, ids: NDArray[np.int64]
) -> None:
    """Stock ONNX Runtime runs a graph of mixed precisions, with its optimizations."""
    rewritten: Rewritten = request.getfixturevalue(fixture)
    path: Path = getattr(rewritten, form)
    onnx.checker.check_model(str(path))
    logits = run(path, causal_feed(path, ids), optimized=True, outputs=["logits"])["logits"]
    assert logits.shape == (*ids.shape, 512)
    assert np.isfinite(logits.astype(np.float32)).all()


def test_all_forms_give_the_same_bits(llama_precisions: Rewritten, ids: NDArray[np.int64]) -> None:
    """Q/DQ, fused and lowered are one program."""
    first, *others = (run(path, causal_feed(path, ids)) for path in (getattr(llama_precisions, form) for form in FORMS))
    for name, expected in first.items():
        for other in others:
            np.testing.assert_array_equal(other[name], expected, err_msg=name)


def test_int8_arrays_are_the_policys(llama_precisions: Rewritten) -> None:
    """Stored [out, in] in the policy, [in, out] in the graph: the same integers, the same scales."""
    initializers = load_graph(llama_precisions.w4a8).graph.initializers
    paths = [path for path, layer in llama_precisions.policy.layers.items() if layer.precision == "w8a8"]
    assert len(paths) > 3
    for path in paths:
        for name in (f"{path}.weight_codes", f"{path}.weight_scales"):
            tensor = initializers[name].const_value
            assert tensor is not None
            np.testing.assert_array_equal(tensor.numpy(), llama_precisions.arrays.read(name).T, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_float_inputs_of_int4_layers_are_left_alone(llama_precisions: Rewritten, form: str) -> None:
    """A `w4a16` linear reads the tensor it read before, though others quantize it, and no plugin node replaces it."""
    nodes = {node.name: node for node in load_graph(getattr(llama_precisions, form)).graph}
    sites = llama_precisions.traced.sites
    paths = [path for path, layer in llama_precisions.policy.layers.items() if layer.precision == "w4a16"]
    assert paths
    for path in paths:
        left = nodes[f"{path}/MatMul"].inputs[0]
        assert left is not None
        assert left.name == sites.linear(path).input


def test_only_w4a8_linears_are_fused(llama_precisions: Rewritten) -> None:
    """Nodes that the plugin may replace are those of `w4a8` layers, and all of these."""
    layers = llama_precisions.policy.layers.items()
    fused = {(node.name or "").rpartition("/")[0] for node in load_graph(llama_precisions.w4a8).graph if node.domain}
    assert {node.domain for node in load_graph(llama_precisions.w4a8).graph} == {"", DOMAIN}
    assert fused == {path for path, layer in layers if layer.precision == "w4a8"}


def test_plugin_leaves_other_precisions_alone(llama_precisions_fp16: Rewritten, tmp_path: Path) -> None:
    """`w8a8` and `w4a16` stay standard operators beside the plugin's nodes, with their weights."""
    lowered = lower_for_plugin(llama_precisions_fp16.w4a8, tmp_path / "lowered.onnx")
    in_plugin = {path for joint in lowered.plugin for path in lowered.fused.get(joint, (joint,))}
    layers = llama_precisions_fp16.policy.layers.items()
    assert in_plugin == {path for path, layer in layers if layer.precision == "w4a8"}
    graph = load_graph(tmp_path / "lowered.onnx").graph
    names = {node.name for node in graph}
    for path, layer in layers:
        if layer.precision in ("w8a8", "w4a16"):
            assert f"{path}/MatMul" in names
            assert graph.initializers[f"{path}.weight_codes"].dtype == (
                ir.DataType.INT8 if layer.precision == "w8a8" else ir.DataType.INT4
            )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": None, "activation_scale": None}, "'fc' is None with activation scale None"),
        ({"activation_scale": None}, "'fc' is static with activation scale None"),
        ({"precision": "w4a16", "group_size": 16}, "'fc' is static with activation scale"),
        ({"precision": "w4a16", "activation": None, "activation_scale": None}, "'fc' has no group size"),
    ],
)
def test_half_said_layers_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """A `w4a16` layer with a tier, or a `w8a8` layer without one, must not run in another precision in silence."""
    policy = _policy(**changes)
    write_policy(policy, {"unused": np.zeros(1, np.float32)}, tmp_path / "policy.json")
    model = _float_linear(FLOAT)
    with pytest.raises(ir.passes.PreconditionError, match=message):
        InsertQdq(SITES, policy, PolicyArrays(tmp_path / "policy.safetensors"))(model)


def _node(model: ir.Model, op_type: str) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][-1]


def _drop_rescaling(model: ir.Model) -> None:
    last = _node(model, "Mul")
    model.graph.outputs[0].name, last.inputs[0].name = "unscaled", "y"  # type: ignore[union-attr]
    model.graph.outputs[0] = last.inputs[0]  # type: ignore[assignment]
    model.graph.remove(last, safe=True)


def _rescale_by_another_factor(model: ir.Model) -> None:
    _node(model, "Mul").replace_input_with(1, constant(model, "two", np.float32(2)))


def _quantize_finer(model: ir.Model) -> None:
    _node(model, "QuantizeLinear").replace_input_with(1, constant(model, "finer", np.float32(0.5)))


def _widen_codes(model: ir.Model) -> None:
    codes = model.graph.initializers["fc.weight_codes"]
    codes.dtype = ir.DataType.INT16


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (_drop_rescaling, "quantized"),
        (_rescale_by_another_factor, "quantized"),
        (_quantize_finer, "quantized"),
        (_widen_codes, "'fc.weight_codes' is INT16"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, plant: Callable[[ir.Model], None], message: str) -> None:
    """A product that is not scaled back by its token, or codes of another scale, are not what the policy says."""
    model = _int8_linear(tmp_path, FLOAT, "per_token", np.ones((OUT, IN), np.float32))
    check = CheckInvariants(interface_from_graph(model), SITES, _policy("per_token"))
    assert not check(model).modified
    plant(model)
    with pytest.raises(PrecisionError, match=message):
        check(model)


def test_int8_weight_of_a_float_layer_is_found(tmp_path: Path) -> None:
    """A layer that the policy calls float must not be INT8 in the graph."""
    model = _int8_linear(tmp_path, FLOAT, "static", np.ones((OUT, IN), np.float32))
    policy = _policy(precision="float", activation=None, activation_scale=None, weight_method=None)
    with pytest.raises(PrecisionError, match=r"'fc\.weight_codes' is INT8 but belongs to no quantized linear"):
        CheckInvariants(interface_from_graph(model), SITES, policy)(model)


def test_int8_weights_per_channel_pass_the_lint_and_blocks_do_not(tmp_path: Path) -> None:
    """TensorRT applies the scales of channels after the sum, which is right; those of blocks too, which is wrong."""
    model = _int8_linear(tmp_path, FLOAT, "static", np.ones((OUT, IN), np.float32))
    assert not LintPrecision()(model).modified
    dequantize = next(
        node
        for node in model.graph
        if node.op_type == "DequantizeLinear" and node.inputs[0] is model.graph.initializers["fc.weight_codes"]
    )
    dequantize.replace_input_with(1, constant(model, "blocks", np.ones((3, OUT), np.float32)))
    with pytest.raises(PrecisionError, match="fc/MatMul"):
        LintPrecision()(model)
