"""Linears of a finished SmolLM2 run: bytes of the plugin, function body for ONNX Runtime, real activations."""

from __future__ import annotations

import pydoc_data.topics
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
from numpy.typing import NDArray

from fptq_export.graph_io import data_path, load_graph
from fptq_export.policy import read_policy
from fptq_export.rewrite import lower_for_plugin
from fptq_export.rewrite.functions import DOMAIN, W4A8_PER_TOKEN, W4A8_STATIC, register_function, w4a8_function
from tests.plugins.emulation.weights import GROUP, Weight
from tests.support.traced import causal_feed, run

__all__ = ["RealLinear", "RealModel", "body_outputs"]

_INT8_NODES = ("QuantizeLinear", "Clip")
"""What writes the INT8 codes in the body: of the static operator, of the per-token operator (as FLOAT)."""


@dataclass(frozen=True)
class RealLinear:
    """A linear as the plugin runs it: one of the policy, or several that were fused."""

    paths: tuple[str, ...]
    """Torch paths, in the order of the output channels."""
    activation: str
    """Tier of the policy."""
    x: NDArray[np.float16]
    """What it reads in the quantized model for real text, [tokens, in]."""
    x_scale: float | None
    """Static activation scale; None is per token."""
    weight: Weight
    """Codes and scales of `model.w4a8.onnx`, and the packed bytes of the lowered graph."""


class RealModel:
    """A run directory of SmolLM2 and its graph lowered for the plugin.

    Args:
        run_directory: Of a finished run.
        scratch: For the lowered graph.
        tokens: Tokens of text to run.
    """

    def __init__(self, run_directory: Path, scratch: Path, tokens: int) -> None:
        self.policy = read_policy(run_directory / "policy.json")
        self.w4a8 = run_directory / "model.w4a8.onnx"
        self.lowered = scratch / "lowered.onnx"
        self.result = lower_for_plugin(self.w4a8, self.lowered)
        self._scratch = scratch
        self._portable = load_graph(self.w4a8)
        self._packed = load_graph(self.lowered)
        self._nodes = {(node.name or "").rpartition("/")[0]: node for node in self._portable.graph}
        self._ids = _token_ids(run_directory, tokens)
        self._inputs: dict[str, NDArray[np.float16]] = {}

    def path(self, names: str, activation: str) -> str:
        """Path in the plugin graph of the first linear of these names and tier, e.g. `q_proj+k_proj+v_proj`."""
        for path in self.result.plugin:
            first = self.result.fused.get(path, (path,))[0]
            if path.rpartition(".")[2] == names and self.policy.layers[first].activation == activation:
                return path
        raise AssertionError(f"the policy has no {names} in tier {activation}")

    def linear(self, path: str) -> RealLinear:
        """The linear of a path of the plugin graph."""
        paths = self.result.fused.get(path, (path,))
        layer = self.policy.layers[paths[0]]
        codes = np.concatenate([self._array(f"{name}.weight_codes").astype(np.int64) for name in paths], axis=1)
        scales = np.concatenate([self._array(f"{name}.weight_scales").astype(np.float64) for name in paths], axis=1)
        group_size = layer.group_size
        assert group_size is not None
        weight = Weight(
            values=np.ascontiguousarray(codes.T),
            scales=np.ascontiguousarray(scales.T),
            group_size=group_size,
            scheme=GROUP,
            kernel_group=group_size,
            codes=np.frombuffer(self._tensor(f"{path}.weight_tiles").tobytes(), np.uint8),
            scale_bytes=self._tensor(f"{path}.weight_tile_scales").numpy(),
        )
        scale = layer.activation_scale
        return RealLinear(paths, str(layer.activation), self.input(paths[0]), scale, weight)

    def input(self, path: str) -> NDArray[np.float16]:
        """What a linear reads in the quantized model, [tokens, in], from ONNX Runtime."""
        if not self._inputs:
            self._inputs = self._run_with_inputs()
        name = self._nodes[path].inputs[0]
        assert name is not None
        return self._inputs[name.name or ""].reshape(-1, self.policy.layers[path].in_features)

    def body(self, path: str, op_type: str) -> ir.Model:
        """The function body of one linear of the policy as a model: x -> y and the INT8 codes.

        Args:
            path: Torch path.
            op_type: The operator of the policy, or the other one with the same weight.
        """
        node = self._nodes[path]
        layer = self.policy.layers[path]
        x = ir.Value(name="x", shape=ir.Shape(["tokens", layer.in_features]), type=ir.TensorType(ir.DataType.FLOAT16))
        model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 21, DOMAIN: 1}, name="body"), ir_version=10)
        register_function(model, w4a8_function(op_type, ir.DataType.FLOAT16))
        values = [x]
        for value in node.inputs[1:3] if op_type == W4A8_PER_TOKEN else node.inputs[1:]:
            assert value is not None
            copy = ir.Value(name=value.name, shape=value.shape, type=value.type, const_value=value.const_value)
            model.graph.register_initializer(copy)
            values.append(copy)
        call = ir.Node(DOMAIN, op_type, values, node.attributes.values(), name="call")
        call.outputs[0].name, call.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT16)
        model.graph.append(call)
        model.graph.outputs.append(call.outputs[0])
        ir.external_data.load_to_model(model)
        common.InlinePass()(model)
        (codes,) = (inner.outputs[0] for inner in model.graph if inner.op_type in _INT8_NODES)
        codes.name, codes.type = "codes", ir.TensorType(_code_type(op_type))
        model.graph.outputs.append(codes)
        return model

    def _run_with_inputs(self) -> dict[str, NDArray[np.float16]]:
        """Run the quantized model on the text, with the input of every linear as an output."""
        probe = self._scratch / "probe.onnx"
        proto = onnx.load(self.w4a8, load_external_data=False)
        names = list(dict.fromkeys(node.input[0] for node in proto.graph.node if node.domain == DOMAIN))
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        onnx.save(proto, probe)
        shutil.copy(data_path(self.w4a8), self._scratch)
        return run(probe, causal_feed(self.w4a8, self._ids), outputs=names)

    def _array(self, name: str) -> NDArray[np.generic]:
        tensor = self._portable.graph.initializers[name].const_value
        assert tensor is not None
        return tensor.numpy()

    def _tensor(self, name: str) -> ir.TensorProtocol:
        tensor = self._packed.graph.initializers[name].const_value
        assert tensor is not None
        return tensor


def body_outputs(model: ir.Model, x: NDArray[np.float16]) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Output and INT8 codes of a function body in ONNX Runtime, every graph optimization off."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    y, codes = session.run(["y", "codes"], {"x": x})
    return y, np.asarray(codes, dtype=np.int64)


def _code_type(op_type: str) -> ir.DataType:
    return ir.DataType.INT8 if op_type == W4A8_STATIC else ir.DataType.FLOAT


def _token_ids(directory: Path, tokens: int) -> NDArray[np.int64]:
    """The first tokens of a text that every Python carries, [1, tokens]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids: Sequence[int] = tokenizer(pydoc_data.topics.topics["assignment"])["input_ids"]
    return np.array([ids[:tokens]], dtype=np.int64)
