"""Convolutions in INT8: the integers of the numeric contract, on the right axis, and nothing else touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch.nn import functional as F

from fptq_export.errors import PrecisionError
from fptq_export.graph_io import load_graph
from fptq_export.numerics import quantize_activation, quantize_weight_int8, static_scale, weight_scale_int8
from fptq_export.rewrite.check_invariants import CheckInvariants, interface_from_graph
from fptq_export.rewrite.quantize_convolutions import QuantizeConvolutions
from tests.support.convolutions import (
    ABSMAX,
    Case,
    decided,
    initializer,
    model_of,
    quantized,
    random_x,
    single,
)
from tests.support.onnx_graphs import GraphBuilder

SUM_ORDER = 128 * 2.0**-23
"""Fewer than 128 products in float32, in any order, and two scales, relative to the sum of their magnitudes."""


CASES = {
    "1-D": Case("Conv", (6, 4, 3), (2, 4, 9)),
    "2-D": Case("Conv", (6, 4, 3, 3), (2, 4, 9, 9)),
    "3-D": Case("Conv", (6, 4, 3, 3, 3), (1, 4, 5, 5, 5)),
    "grouped": Case("Conv", (6, 2, 3, 3), (2, 4, 9, 9), group=2),
    "depthwise": Case("Conv", (4, 1, 3, 3), (2, 4, 9, 9), group=4),
    "transposed 2-D": Case("ConvTranspose", (4, 6, 3, 3), (2, 4, 5, 5)),
    "transposed 3-D": Case("ConvTranspose", (4, 6, 2, 2, 2), (1, 4, 3, 3, 3)),
}
TORCH: dict[tuple[str, int], Callable[..., torch.Tensor]] = {
    ("Conv", 3): F.conv1d,
    ("Conv", 4): F.conv2d,
    ("Conv", 5): F.conv3d,
    ("ConvTranspose", 4): F.conv_transpose2d,
    ("ConvTranspose", 5): F.conv_transpose3d,
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_codes_and_scales_are_those_of_the_contract(case: Case, tmp_path: Path) -> None:
    """Bit for bit, one scale an output channel, on the axis that DequantizeLinear is told."""
    found = quantized(model_of(single(case), case), tmp_path)
    weight = initializer(load_graph(found.model).graph, "conv.weight")
    rows = np.moveaxis(weight, case.channel_axis, 0)
    matrix = rows.reshape(len(rows), -1)
    scale = weight_scale_int8(matrix)
    codes = np.moveaxis(quantize_weight_int8(matrix, scale).reshape(rows.shape), 0, case.channel_axis)
    assert np.array_equal(initializer(found.graph, "conv.weight_codes"), codes)
    assert np.array_equal(initializer(found.graph, "conv.weight_scales"), scale)
    (dequantize,) = (use.node for use in found.graph.initializers["conv.weight_codes"].uses())
    assert dequantize.attributes.get_int("axis") == case.channel_axis


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_graph_computes_integer_sums_times_scales(case: Case, tmp_path: Path) -> None:
    """conv(codes of x, codes of W) x both scales + bias, from integers in float64, whatever the rank and the groups."""
    found = quantized(model_of(single(case), case), tmp_path)
    _, after = found.outputs(*case.x)
    x_scale = static_scale(ABSMAX)
    codes = torch.from_numpy(quantize_activation(random_x(*case.x), x_scale)).double()
    w_codes = torch.from_numpy(initializer(found.graph, "conv.weight_codes").astype(np.float64))
    bias = torch.from_numpy(initializer(found.graph, "conv.bias").astype(np.float64))
    scales = torch.from_numpy(initializer(found.graph, "conv.weight_scales").astype(np.float64)) * float(x_scale)
    per_channel = [1, -1, *[1] * (len(case.x) - 2)]
    convolve = TORCH[case.op_type, len(case.x)]
    expected = convolve(codes, w_codes, groups=case.group) * scales.reshape(per_channel) + bias.reshape(per_channel)
    magnitude = convolve(codes.abs(), w_codes.abs(), groups=case.group) * scales.reshape(per_channel)
    bound = SUM_ORDER * (magnitude + bias.abs().reshape(per_channel))
    assert ((torch.from_numpy(after["y"]).double() - expected).abs() <= bound).all()


def test_convolutions_that_read_one_tensor_share_its_codes(tmp_path: Path) -> None:
    """It is quantized once; each has its own weight."""
    case = CASES["2-D"]
    graph = single(case)
    graph.op("Conv", ["x", graph.weight("other.weight", 3, 4, 1, 1)], "other", "z")
    found = quantized(model_of(graph, case, z=[2, 3, 9, 9]), tmp_path)
    assert [node.op_type for node in found.graph].count("QuantizeLinear") == 1
    assert {"conv.weight_codes", "other.weight_codes"} <= found.graph.initializers.keys()


def test_weight_that_something_else_reads_keeps_its_values_there(tmp_path: Path) -> None:
    """A float convolution with the same weight, and a sum of it, give the same bits as before."""
    case = CASES["2-D"]
    graph = single(case)
    graph.op("ReduceSum", ["conv.weight"], "total", "sum", keepdims=0)
    graph.op("Conv", ["x", "conv.weight"], "float_conv", "z")
    outputs: dict[str, list[int | str]] = {"sum": [], "z": [2, 6, 7, 7]}
    found = quantized(model_of(graph, case, **outputs), tmp_path, "conv_1=float")
    assert {path: entry.precision for path, entry in found.policy.convolutions.items()} == {
        "conv": "w8a8",
        "conv_1": "float",
    }
    before, after = found.outputs(*case.x)
    assert all(np.array_equal(before[name], after[name]) for name in outputs)
    assert not np.array_equal(before["y"], after["y"])


def test_tensor_that_something_else_reads_stays_float_there(tmp_path: Path) -> None:
    """A skip connection before the convolution, and a graph output, give the same bits as before."""
    case = CASES["2-D"]
    graph = GraphBuilder()
    h = graph.op("Relu", ["x"], "relu", "h")
    graph.op("Conv", [h, graph.weight("conv.weight", *case.weight)], "conv", "y")
    graph.op("Neg", [h], "skip", "z")
    shape: list[int | str] = list(case.x)
    found = quantized(model_of(graph, case, h=shape, z=shape), tmp_path)
    before, after = found.outputs(*case.x)
    assert all(np.array_equal(before[name], after[name]) for name in ("h", "z"))


@pytest.mark.parametrize("how", ["excluded", "in groups", "computed"])
def test_float_convolution_is_left_alone(how: str, tmp_path: Path) -> None:
    """Its node, its weight and its output are as they were."""
    case = CASES["2-D"]
    graph = single(case)
    if how == "in groups":
        graph.op("ConvTranspose", ["x", graph.weight("odd.weight", 4, 3, 2, 2)], "odd", "z", group=2)
    elif how == "computed":
        graph.op("Conv", ["x", graph.op("Tanh", ["x"], "filters")], "odd", "z")
    else:
        graph.op("Conv", ["x", graph.weight("odd.weight", 5, 4, 3, 3)], "odd", "z")
    precision = ["odd=float"] if how == "excluded" else []
    found = quantized(model_of(graph, case, z=["a", "b", "c", "d"]), tmp_path, *precision)
    before, after = found.outputs(*case.x)
    assert np.array_equal(before["z"], after["z"])
    assert not any(name.startswith("odd.weight_") for name in found.graph.initializers)
    assert found.policy.convolutions["odd"].precision == "float"


def test_graph_without_quantized_convolutions_is_not_modified(tmp_path: Path) -> None:
    """The pass says so, and the nodes stay."""
    case = CASES["2-D"]
    model, sites, policy, arrays = decided(model_of(single(case), case), tmp_path, "conv=float")
    graph = load_graph(model)
    assert not QuantizeConvolutions(sites, policy, arrays)(graph).modified
    assert [node.op_type for node in graph.graph] == ["Conv"]


def test_other_rewrites_of_the_policy_are_refused(tmp_path: Path) -> None:
    """A scale on the way that is not the policy's, and codes that no policy names."""
    case = CASES["2-D"]
    model, sites, policy, arrays = decided(model_of(single(case), case), tmp_path)
    graph = load_graph(model)
    interface = interface_from_graph(graph)
    QuantizeConvolutions(sites, policy, arrays)(graph)
    entry = policy.convolutions["conv"].model_copy(update={"activation_scale": 0.5})
    for changed, fault in (({"conv": entry}, "conv: its activations are quantized"), ({}, "belongs to no quantized")):
        other = policy.model_copy(update={"convolutions": changed})
        with pytest.raises(PrecisionError, match=fault):
            CheckInvariants(interface, sites, other)(graph)


def test_policy_of_another_graph_is_refused(tmp_path: Path) -> None:
    """A convolution that is not there, or has no scale, is named before anything changes."""
    case = CASES["2-D"]
    model, sites, policy, arrays = decided(model_of(single(case), case), tmp_path)
    entry = policy.convolutions["conv"]
    for entries in ({"other": entry}, {"conv": entry.model_copy(update={"activation_scale": None})}):
        changed = policy.model_copy(update={"convolutions": entries})
        with pytest.raises(ir.passes.PreconditionError, match=next(iter(entries))):
            QuantizeConvolutions(sites, changed, arrays)(load_graph(model))
