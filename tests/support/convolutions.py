"""Single convolutions as graphs, quantized by the road's own parts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from calib.convolutions import convolution_arrays, convolution_specs, decide_convolutions
from calib.graph_weights import GraphWeights
from calib.precision import chosen_precisions
from calib.stats import Stats
from fptq_export.graph_io import load_graph
from fptq_export.policy import ArrayStream, Policy, PolicyArrays, Rule, arrays_path, write_policy
from fptq_export.progress import NoProgress
from fptq_export.rewrite import RewritePaths, rewrite
from fptq_export.sites import Sites
from fptq_export.trace.from_onnx import trace_onnx
from tests.support.onnx_graphs import GraphBuilder
from tests.support.traced import run

__all__ = ["ABSMAX", "Case", "Quantized", "decided", "initializer", "model_of", "quantized", "random_x", "single"]

ABSMAX = 4.0
"""Largest input that calibration is said to have seen; larger ones are clipped."""


@dataclass(frozen=True)
class Case:
    """A convolution: operator, shape of its weight, shape of its input, attributes."""

    op_type: str
    weight: tuple[int, ...]
    x: tuple[int, ...]
    group: int = 1
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()

    @property
    def channel_axis(self) -> int:
        """Axis of output channels in the weight."""
        return int(self.op_type == "ConvTranspose")


@dataclass(frozen=True)
class Quantized:
    """A graph before and after, and what was made of it."""

    model: Path
    qdq: Path
    w4a8: Path
    sites: Sites
    policy: Policy
    arrays: PolicyArrays

    @property
    def graph(self) -> ir.Graph:
        """The graph afterwards."""
        return load_graph(self.w4a8).graph

    def outputs(self, *shape: int) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.float32]]]:
        """What both make of one random x."""
        feed = {"x": random_x(*shape)}
        return run(self.model, feed), run(self.w4a8, feed)


def random_x(*shape: int) -> NDArray[np.float32]:
    """With a few values beyond `ABSMAX`."""
    return (2 * np.random.default_rng(5).standard_normal(shape)).astype(np.float32)


def decided(proto: onnx.ModelProto, directory: Path, *precision: str) -> tuple[Path, Sites, Policy, PolicyArrays]:
    """Trace a graph and write its policy."""
    onnx.save(proto, str(directory / "user.onnx"))
    model = directory / "model.onnx"
    sites = trace_onnx(directory / "user.onnx", model, directory / "sites.json", NoProgress())
    stats = Stats({found.path: np.array([ABSMAX], np.float32) for found in sites.convolutions}, 1, "made up")
    entries = decide_convolutions(sites, stats, chosen_precisions(sites.paths(), (), precision))
    policy = Policy(model="test", rule=Rule(), layers={}, convolutions=entries)
    weights = GraphWeights("test", model, sites)
    arrays = convolution_arrays(policy, sites, weights.read_convolution)
    path = directory / "policy.json"
    write_policy(policy, ArrayStream(convolution_specs(policy, sites), arrays), path)
    return model, sites, policy, PolicyArrays(arrays_path(path))


def quantized(proto: onnx.ModelProto, directory: Path, *precision: str) -> Quantized:
    """Trace, decide and rewrite."""
    model, sites, policy, arrays = decided(proto, directory, *precision)
    paths = RewritePaths(model, directory / "model.qdq.onnx", directory / "model.w4a8.onnx")
    rewrite(paths, sites, policy, arrays, NoProgress())
    return Quantized(model, paths.qdq, paths.w4a8, sites, policy, arrays)


def single(case: Case) -> GraphBuilder:
    """A graph of one convolution `conv` with a bias."""
    graph = GraphBuilder()
    out_features = case.weight[case.channel_axis] * (case.group if case.channel_axis else 1)
    inputs = ["x", graph.weight("conv.weight", *case.weight), graph.weight("conv.bias", out_features)]
    names = ("strides", "pads", "output_padding")
    given = {name: list(numbers) for name in names if (numbers := getattr(case, name))}
    graph.op(case.op_type, inputs, "conv", "y", group=case.group, **given)
    return graph


def model_of(graph: GraphBuilder, case: Case, **outputs: list[int | str]) -> onnx.ModelProto:
    """Its shapes are inferred."""
    return graph.model({"x": list(case.x)}, {"y": [f"d{axis}" for axis in range(len(case.x))], **outputs})


def initializer(graph: ir.Graph, name: str) -> NDArray[Any]:
    """The values of a constant."""
    tensor = graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()
