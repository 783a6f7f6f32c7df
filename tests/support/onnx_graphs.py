"""Tiny ONNX graphs as users bring them, and input data for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["GraphBuilder", "mlp_graph", "save_inputs", "unet_graph"]

FLOAT = TensorProto.FLOAT


@dataclass
class GraphBuilder:
    """Nodes and initializers of a graph in the making; weights are drawn from one generator."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)
    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, name: str, array: NDArray[Any] | np.generic) -> str:
        """Add an initializer."""
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """Add a random float32 initializer."""
        scale = 1.0 / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 1.0)
        return self.constant(name, (scale * self.random.standard_normal(shape)).astype(np.float32))

    def op(self, op_type: str, inputs: list[str], name: str, output: str = "", **attributes: Any) -> str:
        """Add a node and return its output."""
        self.nodes.append(helper.make_node(op_type, inputs, [output or f"{name}.output"], name=name, **attributes))
        return output or f"{name}.output"

    def model(
        self, inputs: dict[str, list[int | str]], outputs: dict[str, list[int | str]], opset: int = 17
    ) -> onnx.ModelProto:
        """The graph; inputs and outputs are FLOAT."""
        graph = helper.make_graph(
            self.nodes,
            "user",
            [helper.make_tensor_value_info(name, FLOAT, dims) for name, dims in inputs.items()],
            [helper.make_tensor_value_info(name, FLOAT, dims) for name, dims in outputs.items()],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def mlp_graph() -> onnx.ModelProto:
    """LayerNorm -> MatMul, Add -> Relu -> Gemm, for x [batch, 64]; two channels of the norm are outliers."""
    graph = GraphBuilder()
    gain = np.linspace(0.5, 2.0, 64).astype(np.float32)
    gain[[3, 40]] = 15.0
    norm = [graph.constant("norm.weight", gain), graph.weight("norm.bias", 64)]
    x = graph.op("LayerNormalization", ["x", *norm], "norm", axis=-1)
    x = graph.op("MatMul", [x, graph.weight("fc1.weight", 64, 128)], "fc1/MatMul")
    x = graph.op("Relu", [graph.op("Add", [x, graph.weight("fc1.bias", 128)], "fc1/Add")], "relu")
    graph.op("Gemm", [x, graph.weight("fc2.weight", 32, 128), graph.weight("fc2.bias", 32)], "fc2", "y", transB=1)
    return graph.model({"x": ["batch", 64]}, {"y": ["batch", 32]})


def unet_graph() -> onnx.ModelProto:
    """Two Conv down, a MatMul over pixels, two ConvTranspose up, a skip connection; x [1, 4, 16, 16], opset 13."""
    graph = GraphBuilder()

    def conv(op_type: str, x: str, name: str, shape: tuple[int, ...], channels: int, **attributes: Any) -> str:
        inputs = [x, graph.weight(f"{name}.weight", *shape), graph.weight(f"{name}.bias", channels)]
        return graph.op(op_type, inputs, name, **attributes)

    wide = graph.op("Relu", [conv("Conv", "x", "down1", (16, 4, 3, 3), 16, strides=[2, 2], pads=[1, 1, 1, 1])], "relu1")
    deep = conv("Conv", wide, "down2", (32, 16, 3, 3), 32, strides=[2, 2], pads=[1, 1, 1, 1])
    rows = graph.op("Transpose", [graph.op("Relu", [deep], "relu2")], "to_rows", perm=[0, 2, 3, 1])
    mixed = graph.op("MatMul", [rows, graph.weight("mix.weight", 32, 32)], "mix/MatMul")
    image = graph.op("Transpose", [mixed], "to_image", perm=[0, 3, 1, 2])
    up = conv("ConvTranspose", image, "up1", (32, 16, 2, 2), 16, strides=[2, 2])
    both = graph.op("Concat", [graph.op("Relu", [up], "relu3"), wide], "skip", axis=1)
    last = [both, graph.weight("up2.weight", 32, 4, 2, 2), graph.weight("up2.bias", 4)]
    graph.op("ConvTranspose", last, "up2", "y", strides=[2, 2])
    return graph.model({"x": [1, 4, 16, 16]}, {"y": [1, 4, 16, 16]}, opset=13)


def save_inputs(path: Path, *shape: int, seed: int = 1) -> Path:
    """A .npz file with one random float32 array, `x`."""
    np.savez(path, x=np.random.default_rng(seed).standard_normal(shape).astype(np.float32))
    return path
