"""The proof of precision for convolutions with INT8 weights.

What TensorRT for RTX 1.7.1 shows for Conv in 1, 2 and 3 dimensions, in groups and depthwise, in FP16 and FP32 graphs:

* A Conv is one layer of type `correlation` that names `<path>/Conv`, reads Int8 and holds an Int8 constant with the
  codes of the weight, in/group padded to a multiple of 4. It writes Float: channel scales, bias and what follows
  come after it, in layers that name the same node and hold no Int8.
* Where input channels are padded, the layer that makes the input (`kgen`, a generated kernel) holds the padding, an
  Int8 constant, and names the node too. It writes Int8.
* There is no INT8 kernel for ConvTranspose: its codes are dequantized in a layer of their own, which has no input and
  names `<path>/DequantizeLinear`, and multiplied in float by the input, which is rounded to INT8 and back. The numbers
  are those of the policy, the arithmetic is not; a Conv like this is refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from fptq_export.build.findings import Findings, PrecisionProblem, refuse_problems
from fptq_export.build.layer_list import EngineLayer

__all__ = [
    "Int8Convolution",
    "check_int8_convolutions",
    "find_int8_convolutions",
    "float_convolutions",
    "is_of_convolution",
]

_INT8 = "Int8"
_GENERATED = "kgen"
_PADDING = 4
"""Channels of INT8 kernels come in fours."""
_CONVOLUTION = re.compile(r"(?P<path>.*)/(Conv|ConvTranspose)(_\d+)?")
_DEQUANTIZE = re.compile(r"(?P<path>.*)/DequantizeLinear(_\d+)?")


@dataclass(frozen=True)
class Int8Convolution:
    """What the policy says of a convolution."""

    weight_shape: tuple[int, ...]
    """[out, in/group, kernel...]; of a transposed one [in, out, kernel...]."""
    transposed: bool

    @property
    def codes(self) -> int:
        """INT8 codes of the weight."""
        return prod(self.weight_shape)

    @property
    def padded_codes(self) -> int:
        """The same with the second dimension padded as INT8 kernels want it."""
        first, second, *kernel = self.weight_shape
        return first * -(-second // _PADDING) * _PADDING * prod(kernel)


def is_of_convolution(layer: EngineLayer, convolutions: Collection[str]) -> bool:
    """Whether a layer names a node of one of these convolutions, so that the INT8 it holds is for this check."""
    return bool(_named(layer, _CONVOLUTION, convolutions) or _named(layer, _DEQUANTIZE, convolutions))


def check_int8_convolutions(
    layers: Sequence[EngineLayer], convolutions: Mapping[str, Int8Convolution], profiles: int = 1
) -> tuple[str, ...]:
    """Check that every quantized convolution multiplies INT8 by INT8.

    Args:
        layers: Layers of the engine.
        convolutions: The quantized ones, by path.
        profiles: Optimization profiles of the engine; each has its own copy of every layer.

    Returns:
        Paths of those that multiply in float what INT8 codes say, for want of a kernel: transposed ones only.

    Raises:
        PrecisionError: Naming every convolution that is missing, doubled, of another size, or computed in float.
    """
    found = find_int8_convolutions(layers, convolutions, profiles)
    refuse_problems(found.problems)
    return float_convolutions(found.holders, convolutions)


def float_convolutions(holders: Mapping[str, Sequence[EngineLayer]], convolutions: Collection[str]) -> tuple[str, ...]:
    """Those of the convolutions that multiply in float what their INT8 codes say."""
    return tuple(path for path in convolutions if not all(map(_reads_int8, holders[path])))


def find_int8_convolutions(
    layers: Sequence[EngineLayer], convolutions: Mapping[str, Int8Convolution], profiles: int
) -> Findings:
    """Who holds the codes of each convolution, and what is wrong with that.

    Arguments as of `check_int8_convolutions`.
    """
    holders: dict[str, list[EngineLayer]] = {path: [] for path in convolutions}
    problems: list[PrecisionProblem] = []
    for layer in layers:
        if not _int8_constants(layer) or not is_of_convolution(layer, convolutions):
            continue
        multiplied, dequantized = (_named(layer, names, convolutions) for names in (_CONVOLUTION, _DEQUANTIZE))
        reads, writes = _reads_int8(layer), any(item.datatype == _INT8 for item in layer.outputs)
        if writes and (not reads or layer.type == _GENERATED):
            continue  # it makes an input and pads its channels
        owners = multiplied if reads else dequantized
        for path in owners:
            holders[path].append(layer)
        if reads:
            problems += _size_problems(layer, owners, convolutions)
        else:
            problems += _float_problems(layer, owners, convolutions)
    for path, found in holders.items():
        if len(found) != profiles:
            names = ", ".join(layer.name for layer in found) or _where_instead(path, layers)
            text = f"{path}: {len(found)} layers hold its INT8 codes, {profiles} expected ({names})"
            problems.append(PrecisionProblem((path,), text))
    return Findings(holders, problems)


def _reads_int8(layer: EngineLayer) -> bool:
    return any(tensor.datatype == _INT8 for tensor in layer.inputs)


def _int8_constants(layer: EngineLayer) -> list[int]:
    """Elements of the INT8 tensors a layer holds; vectors are no weights."""
    return [item.elements for item in layer.constants if item.datatype == _INT8 and len(item.dims) > 1]


def _named(layer: EngineLayer, pattern: re.Pattern[str], convolutions: Collection[str]) -> list[str]:
    matches = (pattern.fullmatch(node) for node in layer.onnx_nodes)
    paths = dict.fromkeys(match["path"] for match in matches if match is not None)
    return [path for path in paths if path in convolutions]


def _size_problems(
    layer: EngineLayer, owners: Sequence[str], convolutions: Mapping[str, Int8Convolution]
) -> list[PrecisionProblem]:
    held = sum(_int8_constants(layer))
    allowed = {
        sum(convolutions[path].codes for path in owners),
        sum(convolutions[path].padded_codes for path in owners),
    }
    if held in allowed:
        return []
    text = f"{', '.join(owners)}: layer {layer.name} holds {held} INT8 codes, {max(allowed)} expected"
    return [PrecisionProblem(tuple(owners), text)]


def _float_problems(
    layer: EngineLayer, owners: Sequence[str], convolutions: Mapping[str, Int8Convolution]
) -> list[PrecisionProblem]:
    """Codes that do not meet INT8: those of a transposed convolution may be dequantized alone, no others may."""
    if layer.inputs or not owners or not all(convolutions[path].transposed for path in owners):
        whose = ", ".join(owners) or "unknown convolution"
        text = f"{whose}: layer {layer.name} ({layer.type}) multiplies its INT8 codes in float, INT8 expected"
        return [PrecisionProblem(tuple(owners), text)]
    return _size_problems(layer, owners, convolutions)


def _where_instead(path: str, layers: Sequence[EngineLayer]) -> str:
    """What runs a convolution that has lost its INT8 constant."""
    for layer in layers:
        if layer.type != _GENERATED and _named(layer, _CONVOLUTION, (path,)):
            kinds = ", ".join(f"{constant.datatype} {list(constant.dims)}" for constant in layer.constants)
            return f"it is in layer {layer.name} ({layer.type}) with constants {kinds or 'none'}"
    return "no layer names it"
