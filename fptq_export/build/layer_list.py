"""The proof of precision: what the engine runs, read from the builder's log and compared with the policy.

With profiling verbosity DETAILED the builder ends its VERBOSE log with the engine's layers, one a line, each with the
data types of its constants and the ONNX nodes it was made from. It needs no GPU. What TensorRT for RTX 1.7.1 shows:

* A linear that stays 4-bit is one layer that names `<torch path>/MatMul` and holds an Int4 constant of its in x out
  codes. Linears that share their input may be fused along `out`: one Int4 constant for all of them, every MatMul named.
* A weight with a single group along `in`, or one that is cast after its dequantization (FP16 scales in a BF16 graph),
  is dequantized in a layer of its own at every call, which names only `<torch path>/DequantizeLinear`: the numbers are
  right, the GEMM is not fused. Where linears share a two-dimensional input, as experts do, one such layer holds the
  codes of all of them under the name of one; the GEMM that reads it names every MatMul.
* Without the barrier of the lowering (see `rewrite`) a block-quantized weight is unpacked to Int8, multiplied over all
  of `in`, and scaled afterwards by a constant of the wrong length. Nothing warns; the numbers are wrong.
* A linear that the plugin runs is one layer of type `custom_layer` (`PluginV3` in TensorRT proper) that names its node
  `<torch path>/FptqW4A8Gemm...` and holds an Int4 constant with the padding of the packed weight. Linears that were
  fused before (q, k and v) are one such layer too, with a path of its own: it proves the precision of all of them.
* Every optimization profile has its own copy of each layer; the weights are shared.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from fptq_export.build.findings import Findings, PrecisionProblem, refuse_problems
from fptq_export.errors import PrecisionError

__all__ = [
    "EngineLayer",
    "EngineTensor",
    "PrecisionReport",
    "check_layers",
    "find_int4_linears",
    "layers_from_log",
    "layers_from_text",
    "names_matmul",
    "precision_report",
]

_INT4 = "Int4"
_INT8 = "Int8"

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*)"
    r", Inputs: \[(?P<inputs>|.*?\})\]"
    r"(?:, Constants: \[(?P<constants>|.*?\})\])?"
    r", Outputs: \[(?P<outputs>|.*?\})\]"
    r"(?P<rest>, .*)"
)
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[^\]]*)\][^{}]*?Datatype: (?P<type>\w+)"
)
_TACTIC = re.compile(r"Tactic(?:Name|Value): ([^,]+),")
_ONNX_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=[\x1e\x1f\[]|\s*$)")
_MATMUL = re.compile(r"MatMul(_\d+)?")
_DEQUANTIZE = re.compile(r"DequantizeLinear(_\d+)?")
_PLUGIN = re.compile(r"FptqW4A8Gemm(Static|PerToken)(_\d+)?")
_PLUGIN_TYPES = frozenset({"custom_layer", "PluginV3", "PLUGIN_V3"})
_BARRIER = re.compile(r"Max(_\d+)?")


@dataclass(frozen=True)
class EngineTensor:
    """A tensor a layer reads, holds or writes."""

    name: str
    dims: tuple[int, ...]
    """-1 where the size is dynamic."""
    datatype: str
    """TensorRT's word: `Half`, `Float`, `BFloat16`, `Int8`, `Int4`, ..."""

    @property
    def elements(self) -> int:
        """Number of elements; meaningless for a dynamic shape."""
        return prod(self.dims)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of an engine."""

    name: str
    type: str
    """`kgen` (generated kernel), `gemm`, `runtime_fusion` (GEMM with its weight's dequantization), `signal`, ..."""
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    tactic: str
    onnx_nodes: tuple[str, ...]

    @property
    def int4_codes(self) -> int:
        """Number of INT4 codes the layer holds."""
        return sum(constant.elements for constant in self.constants if constant.datatype == _INT4)


@dataclass(frozen=True)
class PrecisionReport:
    """What was proven about an engine."""

    quantized_linears: int
    int4_constants: int
    """Int4 constants in all layers; fused linears share one, and each profile counts its own."""
    int4_codes: int
    """INT4 codes of one profile."""
    unfused: tuple[str, ...]
    """Torch paths of linears whose weight is dequantized in a layer of its own at every call."""
    layers_by_type: Mapping[str, int]
    profiles: int
    plugin_layers: int = 0
    """Layers of one profile that the plugin runs."""
    plugin_linears: int = 0
    """Linears of the policy in these layers."""


def layers_from_log(log_path: Path) -> tuple[EngineLayer, ...]:
    """Read the layers from a VERBOSE builder log.

    Raises:
        PrecisionError: The log has no layer list, or one in a form that is not understood; nothing is proven then.
    """
    with log_path.open(encoding="utf-8", errors="replace") as lines:
        return layers_from_text(lines, str(log_path))


def layers_from_text(lines: Iterable[str], where: str) -> tuple[EngineLayer, ...]:
    """Read the layers from the lines of a log, or of what an engine inspector prints, which has the same form.

    Raises:
        PrecisionError: As `layers_from_log`; `where` is where the lines come from.
    """
    layers = []
    listing = found = False
    for line in lines:
        if re.fullmatch(r"(\[\w\] )?Layers:\s*", line):
            listing = found = True
        elif listing and not line.startswith("Name: "):
            listing = False
        elif listing:
            layers.append(_layer_from_line(line.rstrip("\n"), where))
    if not found:
        raise PrecisionError(f"{where}: the builder listed no layers, so the precision of the engine is not proven")
    return tuple(layers)


def check_layers(
    layers: Sequence[EngineLayer],
    quantized: Mapping[str, int],
    profiles: int = 1,
    plugin: Mapping[str, str] | None = None,
    fused: Mapping[str, tuple[str, ...]] | None = None,
) -> PrecisionReport:
    """Check that every quantized linear runs from an INT4 constant, and that none is unpacked to INT8.

    Args:
        layers: Layers of the engine.
        quantized: Number of INT4 codes (in x out, with the padding of packed weights) of each quantized linear, by
            torch path; linears that were fused before the build are one, by their common path.
        profiles: Optimization profiles of the engine; each has its own copy of every layer.
        plugin: Operator of each linear that the plugin must run, by path; no other linear may run there.
        fused: Common path of fused linears -> their torch paths.

    Raises:
        PrecisionError: Naming every linear that is missing, doubled, of another size, unpacked to INT8, or not run by
            what must run it, and every INT4 constant that belongs to no linear of the policy.
    """
    plugin, fused = plugin or {}, fused or {}
    found = find_int4_linears(layers, quantized, profiles, plugin)
    refuse_problems(found.problems)
    return precision_report(layers, found.holders, quantized, profiles, plugin, fused)


def precision_report(
    layers: Sequence[EngineLayer],
    holders: Mapping[str, Sequence[EngineLayer]],
    quantized: Mapping[str, int],
    profiles: int,
    plugin: Mapping[str, str],
    fused: Mapping[str, tuple[str, ...]],
) -> PrecisionReport:
    """What was found in an engine without problems: `holders` by `find_int4_linears`, the rest as of `check_layers`."""
    return PrecisionReport(
        quantized_linears=sum(len(fused.get(path, (path,))) for path in quantized),
        int4_constants=sum(constant.datatype == _INT4 for layer in layers for constant in layer.constants),
        int4_codes=sum(quantized.values()),
        unfused=tuple(
            path
            for path in quantized
            if path not in plugin and not all(names_matmul(layer, path) for layer in holders[path])
        ),
        layers_by_type=dict(sorted(Counter(layer.type for layer in layers).items())),
        profiles=profiles,
        plugin_layers=len(plugin),
        plugin_linears=sum(len(fused.get(path, (path,))) for path in plugin),
    )


def find_int4_linears(
    layers: Sequence[EngineLayer], quantized: Mapping[str, int], profiles: int, plugin: Mapping[str, str]
) -> Findings:
    """Who holds the INT4 codes of each linear, and what is wrong with that. Arguments as of `check_layers`."""
    holders: dict[str, list[EngineLayer]] = {path: [] for path in quantized}
    problems: list[PrecisionProblem] = []
    for layer in layers:
        if layer.int4_codes:
            owners = _owners(layer, quantized, layers)
            for path in owners:
                holders[path].append(layer)
            problems += [*_size_problems(layer, owners, quantized), *_unpacking_problems(layer, owners, layers)]
    for path, found in holders.items():
        if not found:
            text = f"{path}: no layer holds its INT4 codes; {_where_instead(path, layers)}"
            problems.append(PrecisionProblem((path,), text))
        elif len(found) != profiles:
            names = ", ".join(layer.name for layer in found)
            text = f"{path}: {len(found)} layers hold its INT4 codes, {profiles} expected ({names})"
            problems.append(PrecisionProblem((path,), text))
        problems += [problem for layer in found for problem in _plugin_problems(layer, path, plugin.get(path))]
    return Findings(holders, problems)


def _layer_from_line(line: str, where: str) -> EngineLayer:
    match = _LAYER.fullmatch(line)
    if match is None:
        raise PrecisionError(f"{where}: cannot read this layer, so nothing is proven: {line[:200]}")
    tactic = _TACTIC.search(match["rest"])
    _, _, metadata = match["rest"].partition(", Metadata: ")
    return EngineLayer(
        name=match["name"],
        type=match["type"],
        inputs=_tensors(match["inputs"]),
        constants=_tensors(match["constants"] or ""),
        outputs=_tensors(match["outputs"]),
        tactic=tactic[1] if tactic else "",
        onnx_nodes=tuple(_ONNX_NODE.findall(metadata)),
    )


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(match["name"], tuple(int(dim) for dim in match["dims"].split(",") if dim), match["type"])
        for match in _TENSOR.finditer(text)
    )


def _owners(layer: EngineLayer, quantized: Mapping[str, int], layers: Sequence[EngineLayer]) -> list[str]:
    """Linears whose codes a layer holds: those it computes.

    A layer that only dequantizes weights, for one GEMM, may name the MatMul of one of them or of none. If it holds more
    codes than it names, they are those of the linears that its readers compute, or else those that it dequantizes.
    """

    def known(paths: Iterable[str]) -> list[str]:
        return [path for path in dict.fromkeys(paths) if path in quantized]

    def codes(paths: Iterable[str]) -> int:
        return sum(quantized[path] for path in paths)

    computed = known([*_paths(layer.onnx_nodes, _MATMUL), *_paths(layer.onnx_nodes, _PLUGIN)])
    if codes(computed) >= layer.int4_codes:
        return computed
    written = {output.name for output in layer.outputs}
    readers = [other for other in layers if written & {tensor.name for tensor in other.inputs}]
    merged = known(path for reader in readers for path in _paths(reader.onnx_nodes, _MATMUL))
    if codes(merged) == layer.int4_codes:
        return merged
    return computed or known(_paths(layer.onnx_nodes, _DEQUANTIZE))


def _paths(nodes: Iterable[str], operator: re.Pattern[str]) -> list[str]:
    """Torch paths of the nodes `<torch path>/<operator>`."""
    split = (node.rpartition("/") for node in nodes)
    return [path for path, _, op_type in split if operator.fullmatch(op_type)]


def names_matmul(layer: EngineLayer, path: str) -> bool:
    """Whether a layer computes the product of a linear."""
    return path in _paths(layer.onnx_nodes, _MATMUL)


def _size_problems(layer: EngineLayer, owners: Sequence[str], quantized: Mapping[str, int]) -> list[PrecisionProblem]:
    """INT4 codes that are not those of the layer's linears."""
    expected = sum(quantized[path] for path in owners)
    if layer.int4_codes == expected:
        return []
    whose = ", ".join(owners) or "no linear of the policy"
    text = f"{whose}: layer {layer.name} holds {layer.int4_codes} INT4 codes, {expected} expected"
    return [PrecisionProblem(tuple(owners), text)]


def _plugin_problems(layer: EngineLayer, path: str, operator: str | None) -> list[PrecisionProblem]:
    """A linear in the plugin that belongs elsewhere, the reverse, or in the plugin's other mode."""
    runs_plugin = layer.type in _PLUGIN_TYPES
    if operator is None:
        text = f"{path}: the plugin runs it in layer {layer.name}, natively expected"
        return [PrecisionProblem((path,), text)] if runs_plugin else []
    if not runs_plugin or f"{path}/{operator}" not in layer.onnx_nodes:
        text = f"{path}: layer {layer.name} ({layer.type}) runs it, {operator} of the plugin expected"
        return [PrecisionProblem((path,), text)]
    return []


def _unpacking_problems(
    layer: EngineLayer, owners: Sequence[str], layers: Sequence[EngineLayer]
) -> list[PrecisionProblem]:
    """INT4 codes on their way into an INT8 GEMM, where block scales cannot be applied inside the sum."""
    whose = ", ".join(owners) or "unknown linear"
    if not layer.inputs and any(output.datatype == _INT8 for output in layer.outputs):
        written = {output.name for output in layer.outputs}
        readers = [other.name for other in layers if written & {tensor.name for tensor in other.inputs}]
        chain = f"layer {layer.name} unpacks its INT4 codes to INT8 for {', '.join(readers) or 'another layer'}"
        text = f"{whose}: {chain}, which sums over all groups before their scales are applied"
        return [PrecisionProblem(tuple(owners), text)]
    # Linears that share their input share its barrier, under the name of one of them.
    if any(tensor.datatype == _INT8 for tensor in layer.inputs) and not _paths(layer.onnx_nodes, _BARRIER):
        text = f"{whose}: layer {layer.name} multiplies INT4 codes by INT8 activations without the barrier between them"
        return [PrecisionProblem(tuple(owners), text)]
    return []


def _where_instead(path: str, layers: Sequence[EngineLayer]) -> str:
    """What runs a linear that has lost its INT4 constant."""
    for layer in layers:
        if names_matmul(layer, path):
            kinds = ", ".join(f"{constant.datatype} {list(constant.dims)}" for constant in layer.constants)
            return f"its MatMul is in layer {layer.name} ({layer.type}) with constants {kinds or 'none'}"
    return "no layer names its MatMul"
