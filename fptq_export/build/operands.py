"""What a layer list shows of the two operands of a linear or convolution: how its weights and its input are stored.

The input of a native `w4a8` linear is rounded to INT8 and multiplied in float. The layer that rounds names
`<path>/QuantizeLinear` (static) or `<path>/Round` (per token); linears that share their input and its scale share that
node, under the name of one of them. So it is looked for in the GEMM's own layer, and in those that write what it reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fptq_export.build.layer_list import EngineLayer, EngineTensor, names_matmul
from fptq_export.policy import ConvolutionPolicy, LayerPolicy, Policy

__all__ = ["LayerList", "Operands", "float_operands", "operands_of"]

_WORDS = {
    "Half": "FP16",
    "Float": "FP32",
    "BFloat16": "BF16",
    "Int8": "INT8",
    "Int4": "INT4",
}
"""TensorRT's words for data types, and ours."""
_ROUNDS = re.compile(r"(?P<path>.*)/(QuantizeLinear|Round)(_\d+)?")
_MULTIPLIES = re.compile(r".*/(MatMul|Gemm|Conv|ConvTranspose|FptqW4A8Gemm\w+)(_\d+)?")
_LAYERS_BACK = 3
"""A rounding further up belongs to another product: between the two stand at most a reshape and a copy."""


@dataclass(frozen=True)
class Operands:
    """What is shown of one linear or convolution."""

    layers: tuple[str, ...]
    weights: str
    activation: str
    verdict: Literal["proven", "partly", "float_arithmetic", "not_shown"]
    evidence: tuple[str, ...]


class LayerList:
    """Layers of an engine, by what they write.

    Args:
        layers: The layers.
        policy: What each linear and convolution should run.
    """

    def __init__(self, layers: Sequence[EngineLayer], policy: Policy) -> None:
        self.layers = layers
        self.policy = policy
        self._writers: dict[str, list[EngineLayer]] = {}
        for layer in layers:
            for tensor in layer.outputs:
                self._writers.setdefault(tensor.name, []).append(layer)

    def readers(self, layer: EngineLayer) -> list[EngineLayer]:
        """Layers that read what a layer writes."""
        written = {tensor.name for tensor in layer.outputs}
        return [other for other in self.layers if written & {tensor.name for tensor in other.inputs}]

    def rounding(self, gemm: EngineLayer, path: str) -> tuple[EngineLayer, str] | None:
        """The layer that rounds what a GEMM reads for a linear, and the node that it names; None if none is shown."""
        wanted = self.policy.layers[path]
        front = [gemm]
        for _ in range(_LAYERS_BACK):
            for layer in front:
                for node in layer.onnx_nodes:
                    named = _ROUNDS.fullmatch(node)
                    if named is not None and (named["path"] == path or self._rounds_alike(named["path"], wanted)):
                        return layer, node
            passing = [
                layer for layer in front if layer is gemm or not any(map(_MULTIPLIES.fullmatch, layer.onnx_nodes))
            ]
            read = [tensor.name for layer in passing for tensor in layer.inputs]
            front = [layer for name in read for layer in self._writers.get(name, ())]
        return None

    def _rounds_alike(self, path: str, wanted: LayerPolicy) -> bool:
        """Whether two linears that share an input round it alike, so that one rounding serves both."""
        other = self.policy.layers.get(path)
        return other is not None and (other.activation, other.activation_scale, other.in_features) == (
            wanted.activation,
            wanted.activation_scale,
            wanted.in_features,
        )


def operands_of(
    listed: LayerList, path: str, common: str, holders: Sequence[EngineLayer], plugin: str | None
) -> Operands:
    """What is shown of a quantized linear or convolution.

    Args:
        listed: The engine's layers.
        path: Its path.
        common: Path of the fused linears it is one of, else its own.
        holders: Layers that hold its codes, one a profile.
        plugin: Operator of the plugin that runs it.
    """
    entry = listed.policy.layers.get(path) or listed.policy.convolutions[path]
    held = [f"layer {layer.name} ({layer.type}) holds {_matrices(layer)}" for layer in holders]
    if common != path:
        held.append(f"its codes are part of those of {common}")
    if plugin is not None:
        reads = f"{plugin} reads {_kinds(layer.inputs for layer in holders)} and rounds it to INT8 itself"
        return _operands(holders, "INT4", f"INT8, {_tier(entry)}, in the plugin", "proven", (*held, reads))
    if entry.precision == "w8a8":
        return _int8_operands(holders, held)
    computing = [layer for holder in holders for layer in _computing(listed, holder, path)]
    unfused = [layer for layer in computing if layer not in holders]
    weights = f"INT4, dequantized to {_kinds(layer.outputs for layer in holders)} on every call" if unfused else "INT4"
    held += [f"layer {layer.name} ({layer.type}) multiplies them after they were dequantized" for layer in unfused]
    codes = {tensor.name for layer in holders for tensor in layer.outputs} if unfused else set()
    kind = _kinds([[tensor for layer in computing for tensor in layer.inputs if tensor.name not in codes]])
    layers = [*holders, *unfused]
    if entry.precision == "w4a16":
        return _operands(layers, weights, kind, "proven", (*held, f"the product reads {kind}"))
    found = [listed.rounding(layer, path) for layer in computing]
    rounded = [item for item in found if item is not None]
    if not rounded or len(rounded) < len(computing):
        missing = f"the product reads {kind}; no layer before it names a rounding of its input"
        return _operands(layers, weights, f"{kind}, rounding not shown", "partly", (*held, missing))
    where = dict.fromkeys(f"layer {layer.name} names {node}, which rounds what it reads" for layer, node in rounded)
    activation = f"INT8, {_tier(entry)}, rounded and multiplied in {kind}"
    return _operands(layers, weights, activation, "proven", (*held, *where))


def float_operands(listed: LayerList, path: str, node: str | None) -> Operands:
    """What is shown of a linear or convolution that stays in float; `node` is None where its graph has none."""
    layers = [layer for layer in listed.layers if node in layer.onnx_nodes or names_matmul(layer, path)]
    holders = [layer for layer in layers if any(len(constant.dims) > 1 for constant in layer.constants)]
    if not layers:
        text = f"no layer of the engine names {node}" if node is not None else "the graph has no such linear"
        return Operands((), "float", "float", "not_shown", (text,))
    reads = _kinds(layer.inputs for layer in layers)
    if not holders:
        return _operands(layers, "float", reads, "proven", ("no layer that names it holds an integer weight",))
    kinds = _kinds([constant for constant in layer.constants if len(constant.dims) > 1] for layer in holders)
    held = [f"layer {layer.name} ({layer.type}) holds {_matrices(layer)}" for layer in holders]
    return _operands(holders, kinds, _kinds(layer.inputs for layer in holders), "proven", held)


def _int8_operands(holders: Sequence[EngineLayer], held: Sequence[str]) -> Operands:
    reads = [any(tensor.datatype == "Int8" for tensor in layer.inputs) for layer in holders]
    if all(reads):
        return _operands(holders, "INT8", "INT8", "proven", (*held, "the same layer reads INT8"))
    why = "TensorRT has no INT8 kernel for it: the codes are dequantized and multiplied in float"
    return _operands(holders, "INT8, dequantized", "rounded to INT8, then float", "float_arithmetic", (*held, why))


def _operands(
    layers: Sequence[EngineLayer],
    weights: str,
    activation: str,
    verdict: Literal["proven", "partly", "float_arithmetic"],
    evidence: Sequence[str],
) -> Operands:
    names = tuple(dict.fromkeys(layer.name for layer in layers))
    return Operands(names, weights, activation, verdict, tuple(evidence))


def _computing(listed: LayerList, holder: EngineLayer, path: str) -> list[EngineLayer]:
    """The layers that multiply by the codes a layer holds: itself, or those that read what it dequantizes."""
    if names_matmul(holder, path) and holder.inputs:
        return [holder]
    return listed.readers(holder) or [holder]


def _tier(entry: LayerPolicy | ConvolutionPolicy) -> str:
    if not isinstance(entry, LayerPolicy) or entry.activation is None:
        return "static"
    return {"static": "static", "lae_static": "static (equalized)", "per_token": "per token"}[entry.activation]


def _matrices(layer: EngineLayer) -> str:
    """`INT4 [256, 128], FP16 [4, 128]`: what is more than a vector."""
    matrices = [constant for constant in layer.constants if len(constant.dims) > 1]
    return ", ".join(f"{_word(item)} {list(item.dims)}" for item in matrices) or "no matrix"


def _kinds(tensors: Iterable[Iterable[EngineTensor]]) -> str:
    """`FP16`, or `FP16 and INT8` where several are read."""
    words = dict.fromkeys(_word(tensor) for items in tensors for tensor in items)
    return " and ".join(words) or "nothing"


def _word(tensor: EngineTensor) -> str:
    return _WORDS.get(tensor.datatype, tensor.datatype)
