"""The function bodies against `fptq_export.numerics`, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fptq_export import numerics
from fptq_export.graph_io import save_graph
from fptq_export.rewrite.functions import (
    DOMAIN,
    PER_TOKEN_QDQ,
    W4A8_PER_TOKEN,
    W4A8_STATIC,
    per_token_qdq_function,
    register_function,
    w4a8_function,
)
from fptq_export.rewrite.fuse_w4a8_linears import FuseW4A8Linears
from tests.support.graphs import LinearNumbers, linear_numbers, qdq_linear
from tests.support.traced import run

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
NUMBERS = linear_numbers()
CHANNELS = NUMBERS.codes.shape[1]
HALF_STEP = {FLOAT: 2.0**-24, FLOAT16: 2.0**-11}
"""Relative error of one rounding to nearest."""


def _activations(dtype: ir.DataType, seed: int = 0) -> NDArray[Any]:
    """Tokens of very different sizes: one clips the static scale, one is all zeros."""
    x = np.random.default_rng(seed).normal(size=(6, CHANNELS)) * np.array([[0.01], [1], [1], [30], [0], [0.3]])
    array: NDArray[Any] = x.astype(dtype.numpy())
    return array


def _x_scale(activation: str, x: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(NUMBERS.x_scale) if activation == "static" else numerics.per_token_scale(x)


def _bound(
    numbers: LinearNumbers, codes: NDArray[np.int64], scale: NDArray[np.float32], y: NDArray[np.float64], step: float
) -> NDArray[np.float64]:
    """How far the graph may be from the contract: it multiplies rounded factors where the contract sums integers.

    Each product has the two roundings of its factors to T (`step`); ONNX Runtime sums `in` of them in float32; the
    result is rounded to T.
    """
    weight = numerics.dequantize_weight(numbers.codes, numbers.scales, numbers.group_size)
    magnitude = np.abs(codes * scale.astype(np.float64)) @ np.abs(weight).T
    bound: NDArray[np.float64] = (2.01 * step + CHANNELS * 2.0**-24) * magnitude + step * np.abs(y)
    return bound


@pytest.mark.parametrize("fused", [False, True], ids=["Q/DQ form", "fused"])
@pytest.mark.parametrize("activation", ["static", "per_token"])
@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
def test_linear_equals_the_contract(tmp_path: Path, dtype: ir.DataType, activation: str, fused: bool) -> None:
    """One W4A8 linear, either tier, either type, either form: the result of exact integer sums, up to rounding."""
    model = qdq_linear(NUMBERS, dtype, activation)
    if fused:
        FuseW4A8Linears()(model)
    save_graph(model, tmp_path / "model.onnx")
    x = _activations(dtype)
    scale = _x_scale(activation, x)
    codes = numerics.quantize_activation(x, scale)
    expected = numerics.w4a8_linear(codes, scale, NUMBERS.codes, NUMBERS.scales, NUMBERS.group_size)
    y = run(tmp_path / "model.onnx", {"x": x})["y"].astype(np.float64)
    excess = np.abs(y - expected) - _bound(NUMBERS, codes, scale, expected, HALF_STEP[dtype])
    assert excess.max() <= 0, np.unravel_index(excess.argmax(), excess.shape)


def _expose_codes(model: ir.Model) -> None:
    """Give the INT8 codes of a static activation out as `codes`."""
    quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    codes = quantize.outputs[0]
    codes.name, codes.dtype, codes.shape = "codes", ir.DataType.INT8, ir.Shape(["tokens", CHANNELS])
    model.graph.outputs.append(codes)


@pytest.fixture(scope="module", params=[FLOAT, FLOAT16], ids=["FP32", "FP16"])
def static_codes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A graph that gives its INT8 codes, and the type of its x."""
    model = qdq_linear(NUMBERS, request.param, "static")
    _expose_codes(model)
    path = tmp_path_factory.mktemp("codes") / "model.onnx"
    save_graph(model, path)
    return path, request.param


@pytest.fixture(scope="module", params=[FLOAT, FLOAT16], ids=["FP32", "FP16"])
def per_token_qdq(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The per-token function alone, and the type of its x."""
    x = ir.Value(name="x", shape=ir.Shape(["tokens", CHANNELS]), type=ir.TensorType(request.param))
    node = ir.Node(DOMAIN, PER_TOKEN_QDQ, [x], name="qdq")
    node.outputs[0].name, node.outputs[0].dtype = "y", request.param
    node.outputs[0].shape = x.shape
    model = ir.Model(ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21}, name="g"), ir_version=10)
    register_function(model, per_token_qdq_function(request.param))
    path = tmp_path_factory.mktemp("per-token") / "model.onnx"
    save_graph(model, path)
    return path, request.param


def test_static_codes_are_the_contracts_bit_for_bit(static_codes: tuple[Path, Any]) -> None:
    """Ties go to even, large values clip at -128 and 127, and the division is in FP32 whatever the graph's type."""
    path, dtype = static_codes
    rng = np.random.default_rng(3)
    ties = (np.arange(-140, 140) + 0.5) * float(NUMBERS.x_scale)
    values = np.concatenate([ties, np.nextafter(ties, np.inf), rng.normal(size=464) * 3, [60000, -60000, 0, -0.0]])
    x = np.resize(values, (-(-values.size // CHANNELS), CHANNELS)).astype(dtype.numpy())
    codes = run(path, {"x": x})["codes"]
    np.testing.assert_array_equal(codes, numerics.quantize_activation(x, NUMBERS.x_scale))
    assert {-128, 127} <= set(codes.reshape(-1).tolist())


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_static_codes_of_any_input(static_codes: tuple[Path, Any], data: st.DataObject) -> None:
    """Whatever finite numbers arrive, the codes are the contract's."""
    path, dtype = static_codes
    x = data.draw(_finite_tokens(dtype))
    np.testing.assert_array_equal(run(path, {"x": x})["codes"], numerics.quantize_activation(x, NUMBERS.x_scale))


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_per_token_rounds_to_the_contracts_codes(per_token_qdq: tuple[Path, Any], data: st.DataObject) -> None:
    """Quantized and dequantized values are code x scale of the contract, bit for bit: so are codes and scales."""
    path, dtype = per_token_qdq
    x = data.draw(_finite_tokens(dtype))
    scale = numerics.per_token_scale(x)
    expected = (numerics.quantize_activation(x, scale).astype(np.float32) * scale).astype(dtype.numpy())
    np.testing.assert_array_equal(run(path, {"x": x})["y"], expected)


def _finite_tokens(dtype: ir.DataType) -> st.SearchStrategy[NDArray[Any]]:
    # Subnormal inputs are left out: ONNX Runtime may flush them to zero.
    largest = 2.0**100 if dtype == FLOAT else 65504.0
    floats = st.floats(-largest, largest, width=32 if dtype == FLOAT else 16, allow_subnormal=False)
    return arrays(dtype.numpy(), (2, CHANNELS), elements=floats)


def test_token_of_zeros_gives_zeros(per_token_qdq: tuple[Path, Any]) -> None:
    """A padded token divides by the guard, not by zero."""
    path, dtype = per_token_qdq
    np.testing.assert_array_equal(run(path, {"x": np.zeros((2, CHANNELS), dtype.numpy())})["y"], 0)


def test_tokens_do_not_share_a_scale(per_token_qdq: tuple[Path, Any]) -> None:
    """A loud token leaves a quiet one its resolution."""
    path, dtype = per_token_qdq
    x = np.stack([np.linspace(-1, 1, CHANNELS), np.linspace(-500, 500, CHANNELS)]).astype(dtype.numpy())
    alone = run(path, {"x": x[:1]})["y"]
    np.testing.assert_array_equal(run(path, {"x": x})["y"][:1], alone)


@pytest.mark.parametrize("op_type", [W4A8_STATIC, W4A8_PER_TOKEN])
@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16, BFLOAT16])
def test_function_body_is_what_tensorrt_needs(op_type: str, dtype: ir.DataType) -> None:
    """The INT4 codes feed one DequantizeLinear alone, Max stands before the MatMul, group_size is passed on."""
    function = w4a8_function(op_type, dtype)
    codes = function.inputs[1]
    (use,) = codes.uses()
    assert use.node.op_type == "DequantizeLinear"
    block_size = use.node.attributes["block_size"]
    assert block_size.is_ref()
    assert block_size.ref_attr_name == "group_size"
    matmul = function.outputs[0].producer()
    assert matmul is not None
    assert matmul.op_type == "MatMul"
    assert matmul.inputs[0] is not None
    barrier = matmul.inputs[0].producer()
    assert barrier is not None
    assert barrier.op_type == "Max"
    assert barrier.inputs[1] is not None
    lowest = ir.convenience.get_const_tensor(barrier.inputs[1])
    assert lowest is not None
    assert lowest.dtype == dtype
    assert float(lowest.numpy()) == float(ml_dtypes.finfo(dtype.numpy()).min), "no value is changed"


def test_registering_twice_keeps_the_first() -> None:
    """Two linears of one type share a function."""
    model = qdq_linear(NUMBERS, FLOAT, "per_token")
    before = dict(model.functions)
    register_function(model, per_token_qdq_function(FLOAT))
    assert dict(model.functions) == before
    assert model.graph.opset_imports[DOMAIN] == 1
