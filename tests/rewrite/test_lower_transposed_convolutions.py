"""Transposed convolutions as convolutions: the same integers in the same sums, and everything else left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

from fptq_export.graph_io import load_graph
from fptq_export.rewrite import lower_for_tensorrt
from fptq_export.rewrite.lower_transposed_convolutions import LowerTransposedConvolutions, codes_of_convolution
from tests.support.convolutions import Case, initializer, model_of, quantized, random_x, single
from tests.support.onnx_graphs import GraphBuilder
from tests.support.traced import run

SUM_ORDER = 64 * 2.0**-23
"""Fewer than 64 products in float32 and their scale, in another order, relative to the sum of their magnitudes."""
CASES = {
    "kernel is stride": Case("ConvTranspose", (4, 6, 2, 2), (2, 4, 5, 5), strides=(2, 2)),
    "kernel is twice the stride": Case("ConvTranspose", (4, 6, 4, 4), (2, 4, 5, 6), strides=(2, 2), pads=(1, 1, 1, 1)),
    "stride does not divide": Case(
        "ConvTranspose", (4, 6, 3, 3), (1, 4, 5, 5), strides=(2, 2), pads=(1, 1, 1, 1), output_padding=(1, 1)
    ),
    "stride above kernel": Case("ConvTranspose", (4, 6, 2, 2), (1, 4, 4, 4), strides=(3, 3)),
    "no stride": Case("ConvTranspose", (4, 6, 3, 3), (1, 4, 5, 5), pads=(1, 0, 0, 1)),
    "two strides": Case("ConvTranspose", (4, 6, 2, 3), (1, 4, 5, 5), strides=(2, 3)),
    "1-D": Case("ConvTranspose", (4, 6, 4), (2, 4, 7), strides=(2,), pads=(1, 1)),
    "3-D": Case("ConvTranspose", (4, 6, 2, 2, 2), (1, 4, 3, 4, 5), strides=(2, 2, 2)),
}
TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
CONVOLUTION: dict[int, Callable[..., torch.Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize(
    ("size", "stride"), [((2, 2), (2, 2)), ((4, 4), (2, 2)), ((3, 2), (2, 3)), ((4,), (3,)), ((2, 3, 2), (2, 2, 1))]
)
def test_sums_of_integers_are_equal(size: tuple[int, ...], stride: tuple[int, ...]) -> None:
    """Each phase of the convolution is the transposed one's output there, without rounding."""
    random, rank = np.random.default_rng(0), len(size)
    codes = random.integers(-127, 128, (3, 5, *size)).astype(np.int8)
    x = torch.from_numpy(random.integers(-128, 128, (1, 3, *(4,) * rank)).astype(np.float64))
    kernel = [-(-k // s) for k, s in zip(size, stride, strict=True)]
    rearranged = codes_of_convolution(codes, stride, kernel)
    expected = TRANSPOSED[rank](x, torch.from_numpy(codes).double(), stride=stride).numpy()
    padding = [m - 1 for m in kernel]
    phases = CONVOLUTION[rank](x, torch.from_numpy(rearranged).double(), padding=padding).numpy()
    for index in np.ndindex(*stride):
        phase = int(np.ravel_multi_index(index, stride))
        steps = (slice(r, None, s) for r, s in zip(index, stride, strict=True))
        there = expected[(slice(None), slice(None), *steps)]
        found = phases[0, phase :: int(np.prod(stride))]
        assert np.array_equal(found[tuple(slice(n) for n in there.shape[1:])], there[0])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lowered_graph_computes_the_same(case: Case, tmp_path: Path) -> None:
    """With strides, padding and output padding of every kind, in the same shape; the convolution is named."""
    found = quantized(model_of(single(case), case), tmp_path)
    lowered = lower_for_tensorrt(found.w4a8, tmp_path / "lowered.onnx")
    feed = {"x": random_x(*case.x)}
    before, after = run(found.w4a8, feed)["y"], run(tmp_path / "lowered.onnx", feed)["y"]
    assert before.shape == after.shape
    magnitude = np.abs(feed["x"]).max() * np.abs(initializer(load_graph(found.model).graph, "conv.weight")).sum()
    assert np.abs(before - after).max() <= SUM_ORDER * magnitude
    graph = onnx.load(tmp_path / "lowered.onnx", load_external_data=False).graph
    operators = [node.op_type for node in graph.node]
    assert "ConvTranspose" not in operators
    (conv,) = (node for node in graph.node if node.op_type == "Conv")
    assert conv.name == "conv/Conv"
    weight = next(item for item in graph.initializer if item.name == "conv.weight_codes_by_phase")
    assert tuple(weight.dims) == lowered.convolutions["conv"]
    assert not any(item.name in ("conv.weight_codes", "conv.bias") for item in graph.initializer)


def test_dynamic_sizes_are_lowered_where_that_is_exact(tmp_path: Path) -> None:
    """Batch, height and width may change from call to call."""
    case = CASES["kernel is twice the stride"]
    model = single(case).model({"x": ["batch", 4, "h", "w"]}, {"y": ["batch", 6, "h2", "w2"]})
    found = quantized(model, tmp_path)
    assert lower_for_tensorrt(found.w4a8, tmp_path / "lowered.onnx").convolutions.keys() == {"conv"}
    for shape in ((1, 4, 3, 7), (3, 4, 6, 2)):
        feed = {"x": random_x(*shape)}
        before, after = (run(path, feed)["y"] for path in (found.w4a8, tmp_path / "lowered.onnx"))
        assert before.shape == after.shape


def with_attributes(case: Case, **attributes: Any) -> onnx.ModelProto:
    """A ConvTranspose with other attributes."""
    model = model_of(single(case), case)
    for name, value in attributes.items():
        model.graph.node[0].attribute.append(onnx.helper.make_attribute(name, value))
    return model


def dynamic_3d() -> onnx.ModelProto:
    """Three dimensions whose sizes are not known."""
    case = CASES["3-D"]
    return single(case).model({"x": [1, 4, "d", "h", "w"]}, {"y": [1, 6, "a", "b", "c"]})


def computed_bias() -> onnx.ModelProto:
    """A bias that is not a constant."""
    graph = GraphBuilder()
    bias = graph.op("ReduceMean", ["x"], "mean", axes=[0, 2, 3], keepdims=0)
    graph.op("ConvTranspose", ["x", graph.weight("conv.weight", 4, 4, 2, 2), bias], "conv", "y")
    return graph.model({"x": [2, 4, 5, 5]}, {"y": [2, 4, 6, 6]})


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_attributes(CASES["kernel is stride"], dilations=[2, 2]),
        lambda: with_attributes(CASES["kernel is stride"], auto_pad="SAME_UPPER"),
        lambda: with_attributes(CASES["kernel is stride"], output_shape=[10, 10]),
        lambda: with_attributes(CASES["kernel is stride"], output_padding=[1, 1]),
        dynamic_3d,
        computed_bias,
    ],
    ids=["dilated", "auto_pad", "output_shape", "beyond the last phase", "dynamic 3-D", "computed bias"],
)
def test_other_quantized_ones_are_left_alone(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    """They stay a ConvTranspose, which the proof then looks at."""
    found = quantized(make(), tmp_path)
    model = load_graph(found.w4a8)
    nodes = [node.name for node in model.graph]
    assert not LowerTransposedConvolutions()(model).modified
    assert [node.name for node in model.graph] == nodes
    assert "conv/ConvTranspose" in nodes


@pytest.mark.parametrize(
    "case", [Case("Conv", (6, 4, 3, 3), (2, 4, 9, 9)), CASES["kernel is stride"]], ids=["Conv", "float"]
)
def test_other_operators_are_left_alone(case: Case, tmp_path: Path) -> None:
    """A Conv is one already, and a float ConvTranspose has no codes."""
    precision = () if case.op_type == "Conv" else ("conv=float",)
    model = load_graph(quantized(model_of(single(case), case), tmp_path, *precision).w4a8)
    assert not LowerTransposedConvolutions()(model).modified
