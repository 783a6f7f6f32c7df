"""The proof of precision for linears with INT8 weights: that the engine multiplies INT8 by INT8.

What TensorRT for RTX 1.7.1 shows for `w8a8`, in FP16, BF16 and FP32 graphs, static and per token:

* The GEMM is one layer of type `gemm` that names `<torch path>/MatMul`, reads Int8 and holds an Int8 constant of the
  in x out codes. It writes Float: the scales of the channels (and of the tokens) are multiplied after it, in FP32, by
  layers that name the same nodes and hold no Int8. So no sum is rounded to Half before it is scaled.
* Linears that share their quantized input may be fused along `out`: one constant for all of them, every MatMul named.
* A weight that lost its precision is a constant of another type, or none, in the layer that names its MatMul.
* Linears that read an embedding directly (OLMo 2) may have its table stored rounded and looked up: Q(E[i]) = Q(E)[i].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from fptq_export.build.findings import Findings, PrecisionProblem, refuse_problems
from fptq_export.build.layer_list import EngineLayer

__all__ = ["check_int8_layers", "find_int8_linears"]

_INT8 = "Int8"
_INDICES = frozenset({"Int32", "Int64"})
_MATMUL = re.compile(r"(?P<path>.*)/MatMul(_\d+)?")


def check_int8_layers(layers: Sequence[EngineLayer], int8: Mapping[str, int], profiles: int = 1) -> None:
    """Check that every `w8a8` linear runs as an INT8 GEMM, and that nothing else does.

    Args:
        layers: Layers of the engine.
        int8: Number of INT8 codes (in x out) of each such linear, by torch path.
        profiles: Optimization profiles of the engine; each has its own copy of every layer.

    Raises:
        PrecisionError: Naming every linear that is missing, doubled, of another size, or multiplied by a float input.
    """
    refuse_problems(find_int8_linears(layers, int8, profiles).problems)


def find_int8_linears(layers: Sequence[EngineLayer], int8: Mapping[str, int], profiles: int) -> Findings:
    """Who holds the INT8 codes of each linear, and what is wrong with that. Arguments as of `check_int8_layers`."""
    holders: dict[str, list[EngineLayer]] = {path: [] for path in int8}
    problems: list[PrecisionProblem] = []
    for layer in layers:
        if _int8_codes(layer) and not _only_looks_up(layer):
            owners = _owners(layer, int8)
            for path in owners:
                holders[path].append(layer)
            problems += _layer_problems(layer, owners, int8)
    for path, found in holders.items():
        if not found:
            text = f"{path}: no layer holds its INT8 codes; {_where_instead(path, layers)}"
            problems.append(PrecisionProblem((path,), text))
        elif len(found) != profiles:
            names = ", ".join(layer.name for layer in found)
            text = f"{path}: {len(found)} layers hold its INT8 codes, {profiles} expected ({names})"
            problems.append(PrecisionProblem((path,), text))
    return Findings(holders, problems)


def _int8_codes(layer: EngineLayer) -> int:
    """INT8 elements of the matrices a layer holds; scalars and vectors are no weights."""
    return sum(item.elements for item in layer.constants if item.datatype == _INT8 and len(item.dims) > 1)


def _only_looks_up(layer: EngineLayer) -> bool:
    """Whether a layer takes rows of its table by index: it multiplies nothing, and nothing but indices goes in."""
    kinds = {tensor.datatype for tensor in layer.inputs}
    return bool(kinds) and kinds <= _INDICES and not _matmuls(layer)


def _owners(layer: EngineLayer, int8: Mapping[str, int]) -> list[str]:
    return [path for path in _matmuls(layer) if path in int8]


def _matmuls(layer: EngineLayer) -> list[str]:
    matches = (_MATMUL.fullmatch(node) for node in layer.onnx_nodes)
    return list(dict.fromkeys(match["path"] for match in matches if match is not None))


def _layer_problems(layer: EngineLayer, owners: Sequence[str], int8: Mapping[str, int]) -> Iterator[PrecisionProblem]:
    whose = ", ".join(owners) or "no linear of the policy"
    expected = sum(int8[path] for path in owners)
    if _int8_codes(layer) != expected:
        text = f"{whose}: layer {layer.name} holds {_int8_codes(layer)} INT8 codes, {expected} expected"
        yield PrecisionProblem(tuple(owners), text)
    if owners and not any(tensor.datatype == _INT8 for tensor in layer.inputs):
        kinds = ", ".join(tensor.datatype for tensor in layer.inputs) or "nothing"
        text = f"{whose}: layer {layer.name} multiplies its INT8 codes by {kinds}, INT8 expected"
        yield PrecisionProblem(tuple(owners), text)


def _where_instead(path: str, layers: Sequence[EngineLayer]) -> str:
    """What runs a linear that has lost its INT8 constant."""
    for layer in layers:
        if path in _matmuls(layer):
            kinds = ", ".join(f"{constant.datatype} {list(constant.dims)}" for constant in layer.constants)
            return f"its MatMul is in layer {layer.name} ({layer.type}) with constants {kinds or 'none'}"
    return "no layer names its MatMul"
