"""The reference evaluator with the CPU kernels against `numerics` and against ONNX Runtime's function body."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

from fptq_export import cpu, numerics
from fptq_export.cpu import extension, instruction_set
from fptq_export.cpu.build import build_extension, missing_tools
from fptq_export.errors import UserError, UserErrors
from fptq_export.graph_io import save_graph
from fptq_export.rewrite.fuse_w4a8_linears import FuseW4A8Linears
from fptq_export.verify.reference import ReferenceRunner, body_session_from_path, reference_from_path
from tests.support.graphs import LinearNumbers, linear_numbers, qdq_linear
from tests.support.traced import run

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
NUMBERS = linear_numbers(in_features=192, out_features=24, group_size=64)
CHANNELS, GROUPS = 192, 3
FP32_STEP = 2.0**-24
HALF_STEP = {FLOAT: FP32_STEP, FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8}
"""Relative error of one rounding to nearest."""
SMALLEST = {FLOAT: 2.0**-150, FLOAT16: 2.0**-25, BFLOAT16: 2.0**-134}
"""Half the distance of the subnormal numbers: the error of a result that is not normal."""


@pytest.fixture(scope="module", autouse=True)
def built_extension() -> None:
    if missing := missing_tools():
        pytest.skip(f"cannot build fptq_export.cpu; missing: {', '.join(missing)}")
    build_extension()


def model_file(directory: Path, dtype: ir.DataType, activation: str) -> Path:
    model = qdq_linear(NUMBERS, dtype, activation)
    FuseW4A8Linears()(model)
    save_graph(model, directory / "model.w4a8.onnx")
    return directory / "model.w4a8.onnx"


def evaluated(path: Path, x: NDArray[Any], threads: int = 1) -> NDArray[Any]:
    """The output of a graph of one linear."""
    outputs: Any = reference_from_path(path, threads=threads).run(None, {"x": x})
    result: NDArray[Any] = outputs[0]
    return result


def activations(dtype: ir.DataType) -> NDArray[Any]:
    """Tokens of very different sizes: one clips the static scale, one is all zeros."""
    x = np.random.default_rng(7).normal(size=(6, CHANNELS)) * np.array([[0.01], [1], [1], [30], [0], [0.3]])
    array: NDArray[Any] = x.astype(dtype.numpy())
    return array


def contract(x: NDArray[Any], activation: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`numerics.w4a8_linear`, and the sum of magnitudes of its terms; [tokens, out] both."""
    scale = np.asarray(NUMBERS.x_scale) if activation == "static" else numerics.per_token_scale(x)
    codes = numerics.quantize_activation(x, scale)
    y = numerics.w4a8_linear(codes, scale, NUMBERS.codes, NUMBERS.scales, NUMBERS.group_size)
    weight = numerics.dequantize_weight(NUMBERS.codes, NUMBERS.scales, NUMBERS.group_size)
    return y, np.abs(codes * scale.astype(np.float64)) @ np.abs(weight).T


def kernel_bound(y: NDArray[np.float64], magnitude: NDArray[np.float64], dtype: ir.DataType) -> NDArray[np.float64]:
    """How far the kernels may be from the contract.

    Each group is one fused multiply-add in FP32, its INT32 sum and the activation scale one rounding more: at most
    groups + 2 roundings a term (Higham, Accuracy and Stability, 2002, lemma 3.1). Then one rounding to the output,
    after one to FP32 where that is BF16.
    """
    roundings = (GROUPS + 2) * FP32_STEP
    before = roundings / (1 - roundings) * magnitude
    steps = HALF_STEP[dtype] + (FP32_STEP if dtype != FLOAT16 else 0.0)
    bound: NDArray[np.float64] = before + 1.01 * steps * (np.abs(y) + before) + SMALLEST[dtype]
    return bound


def body_bound(y: NDArray[np.float64], magnitude: NDArray[np.float64], dtype: ir.DataType) -> NDArray[np.float64]:
    """How far the function body may be from the contract: two rounded factors a product, FP32 sums of `in` of them."""
    step = HALF_STEP[dtype]
    bound: NDArray[np.float64] = (2.01 * step + CHANNELS * FP32_STEP) * magnitude + step * np.abs(y) + SMALLEST[dtype]
    return bound


def assert_within(got: NDArray[Any], expected: NDArray[np.float64], bound: NDArray[np.float64]) -> None:
    excess = np.abs(got.astype(np.float64) - expected) - bound
    assert (excess <= 0).all(), f"worst at {np.unravel_index(int(excess.argmax()), excess.shape)}: {excess.max()} over"


@pytest.mark.parametrize("activation", ["static", "per_token"])
@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16, BFLOAT16])
def test_node_equals_the_contract(tmp_path: Path, dtype: ir.DataType, activation: str) -> None:
    """The evaluator runs the kernels, within their bound of `numerics`, in each type a graph may have."""
    x = activations(dtype)
    y = evaluated(model_file(tmp_path, dtype, activation), x)
    assert y.dtype == dtype.numpy()
    expected, magnitude = contract(x, activation)
    assert_within(y, expected, kernel_bound(expected, magnitude, dtype))


@pytest.mark.parametrize("activation", ["static", "per_token"])
@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
def test_polygraphy_compares_it_with_onnx_runtime(tmp_path: Path, dtype: ir.DataType, activation: str) -> None:
    """Two runners of one file: the outputs differ by no more than both bounds."""
    path, x = model_file(tmp_path, dtype, activation), activations(dtype)
    runners = [ReferenceRunner(path, "kernels"), OnnxrtRunner(lambda: body_session_from_path(path), name="body")]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=[{"x": x}])
    kernels, body = (results[name][0]["y"] for name in ("kernels", "body"))
    expected, magnitude = contract(x, activation)
    both = kernel_bound(expected, magnitude, dtype) + body_bound(expected, magnitude, dtype)
    assert_within(kernels, body.astype(np.float64), both)


@pytest.mark.parametrize("dtype", [FLOAT, FLOAT16])
def test_integer_parts_are_exact(tmp_path: Path, dtype: ir.DataType) -> None:
    """INT8 codes equal those of ONNX Runtime's QuantizeLinear, INT32 sums those of `numerics`, bit for bit."""
    x = activations(dtype)
    model = qdq_linear(NUMBERS, dtype, "static")
    quantize = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    output = quantize.outputs[0]
    output.name, output.dtype, output.shape = "codes", ir.DataType.INT8, ir.Shape(["tokens", CHANNELS])
    model.graph.outputs.append(output)
    save_graph(model, tmp_path / "codes.onnx")
    codes, _ = cpu.quantize_activation(x, float(NUMBERS.x_scale))
    np.testing.assert_array_equal(codes, run(tmp_path / "codes.onnx", {"x": x})["codes"])
    weight = weight_of_node(reference_from_path(model_file(tmp_path, dtype, "static")), x)
    groups = codes.astype(np.int64).reshape(len(x), GROUPS, -1)
    expected = np.einsum("tgk,ngk->tng", groups, NUMBERS.codes.astype(np.int64).reshape(-1, *groups.shape[1:]))
    np.testing.assert_array_equal(cpu.group_sums(x, weight, float(NUMBERS.x_scale)), expected)


def weight_of_node(evaluator: Any, x: NDArray[Any]) -> Any:
    """The packed weight that the evaluator's only linear made from the file."""
    evaluator.run(None, {"x": x})
    (node,) = (node for node in evaluator.rt_nodes_ if node.op_domain == "fptq")
    return node._packed


def test_weight_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run packs nothing."""
    evaluator: Any = reference_from_path(model_file(tmp_path, FLOAT16, "static"))
    x = activations(FLOAT16)
    (first,) = evaluator.run(None, {"x": x})

    def never(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(cpu, "packed_weight_from_codes", never)
    np.testing.assert_array_equal(evaluator.run(None, {"x": x})[0], first)


@pytest.mark.parametrize("shape", [(2, 3, CHANNELS), (CHANNELS,), (0, CHANNELS)])
def test_leading_dimensions_are_kept(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Batches, single vectors and empty batches keep their shape, and rows do not see each other."""
    path = model_file(tmp_path, FLOAT16, "per_token")
    x = np.resize(activations(FLOAT16), shape)
    y = evaluated(path, x, threads=2)
    assert y.shape == (*shape[:-1], 24)
    rows = x.reshape(-1, CHANNELS)
    for row, got in zip(rows, y.reshape(-1, 24), strict=True):
        np.testing.assert_array_equal(evaluated(path, row[None])[0], got)


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "fptq.tensorrt"
    model.opset_import.append(onnx.helper.make_opsetid("fptq.tensorrt", 1))


def _unknown_operator_in_a_branch(model: onnx.ModelProto) -> None:
    inner = onnx.helper.make_node("Mystery", [], ["z"], "inner", domain="other")
    branch = onnx.helper.make_graph([inner], "branch", [], [onnx.helper.make_empty_tensor_value_info("z")])
    model.graph.node.append(
        onnx.helper.make_node("If", ["x"], ["unused"], "if", then_branch=branch, else_branch=branch)
    )


def _no_linear(model: onnx.ModelProto) -> None:
    del model.graph.node[:]
    model.graph.node.append(onnx.helper.make_node("Identity", ["x"], ["y"], "copy"))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_unknown_operator, r"fptq\.tensorrt\.FptqW4A8GemmStatic has no function body"),
        (_unknown_operator_in_a_branch, r"other\.Mystery has no function body"),
        (_no_linear, "has no W4A8 linear"),
    ],
)
def test_graph_that_nothing_here_computes_is_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], text: str
) -> None:
    """Unknown operators are named, also inside a branch; a float graph is no W4A8 graph."""
    path = model_file(tmp_path, FLOAT16, "static")
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(path))
    with pytest.raises(UserError, match=text) as caught:
        reference_from_path(path)
    assert isinstance(caught.value, UserErrors) == ("function body" in text)


def test_scales_that_are_not_half_are_refused(tmp_path: Path) -> None:
    """FP32 group scales that no FP16 number equals would be rounded in silence."""
    path = model_file(tmp_path, FLOAT, "static")
    model = onnx.load(str(path))
    (scales,) = (tensor for tensor in model.graph.initializer if tensor.name == "fc.weight_scales")
    changed = onnx.numpy_helper.to_array(scales) * np.float32(1 + 2.0**-20)
    scales.CopyFrom(onnx.numpy_helper.from_array(changed, scales.name))
    onnx.save(model, str(path))
    with pytest.raises(UserError, match="no FP16 numbers"):
        reference_from_path(path).run(None, {"x": activations(FLOAT)})


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes | None) -> None:
    """A missing or broken file is the user's error and names the file."""
    path = tmp_path / "model.w4a8.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.w4a8\.onnx"):
        reference_from_path(path)


def test_missing_extension_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the C++ part the first call says how to build it; no other arithmetic takes its place."""
    path = model_file(tmp_path, FLOAT16, "static")

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    caches: tuple[Any, ...] = (extension.load_extension, instruction_set._native_values)
    for cache in caches:
        cache.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(importlib, "import_module", missing)
        with pytest.raises(UserError, match=r"python -m fptq_export\.cpu build"):
            reference_from_path(path)
    for cache in caches:
        cache.cache_clear()


def test_numbers_of_the_test_use_the_whole_range() -> None:
    """The weight holds both extreme codes, and the static scale clips: otherwise the tests above prove less."""
    numbers: LinearNumbers = NUMBERS
    assert (numbers.codes.min(), numbers.codes.max()) == (-8, 7)
    codes = numerics.quantize_activation(activations(BFLOAT16).astype(ml_dtypes.bfloat16), numbers.x_scale)
    assert {-128, 127} <= set(codes.reshape(-1).tolist())
