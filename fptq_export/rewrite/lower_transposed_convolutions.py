"""Write quantized transposed convolutions as convolutions, for which TensorRT for RTX has INT8 kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from fptq_export.rewrite.functions import dequantized_int8_weight
from fptq_export.rewrite.initializers import element_type, lazy_initializer
from fptq_export.rewrite.matching import producer
from fptq_export.rewrite.names import UniqueNames

__all__ = ["LowerTransposedConvolutions", "codes_of_convolution"]

_TO_THE_END = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Match:
    """A quantized ConvTranspose: codes INT8 [in, out, kernel...], scales FLOAT [out]."""

    node: ir.Node
    codes: ir.Value
    scales: ir.Value
    bias: ir.Value | None
    strides: tuple[int, ...]
    kernel: tuple[int, ...]
    """Of the convolution: as many inputs as one output sees."""
    crop: tuple[tuple[int, int], ...]
    """Elements that are cut off at the begin and the end of each dimension."""

    @property
    def path(self) -> str:
        """Path of the layer."""
        return (self.node.name or "").rpartition("/")[0]

    @property
    def phases(self) -> int:
        """Outputs between two inputs, in all dimensions together."""
        return prod(self.strides)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """[out x phases, in, kernel...]."""
        in_features, out_features, *_ = self.codes.shape.numpy() if self.codes.shape is not None else (0, 0)
        return (out_features * self.phases, in_features, *self.kernel)


class LowerTransposedConvolutions(ir.passes.InPlacePass):
    """`ConvTranspose(x, DQ(codes))` becomes a Conv with an output channel for each phase, put side by side.

    An output at q s + r (stride s, phase r) is a sum over inputs q - m with the weights m s + r, so

        y[o, q s + r] = sum over c, m of x[c, q - m] W[c, o, m s + r],    m < ceil(K / s)

    is a convolution with s phases as output channels. Each product and each scale stays what it is; where s does not
    divide K, codes of 0 are added. Afterwards the phases are interleaved (DepthToSpace) and the padding is cut off.

    Rules:
        1. The weight is `[Cast](DequantizeLinear(INT8 codes, FLOAT scales [out], axis 1))` and nothing else reads it;
           one group, no dilation, pads given, and the bias a constant.
        2. In two dimensions with equal strides sizes may be dynamic. Otherwise all but the batch are known.
        3. Anything else, float ones among it, is left alone; the proof then says what the engine makes of it.

    After the pass, `lowered` has the shape of the new weight of each layer, by path.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lowered: dict[str, tuple[int, ...]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Lower every match."""
        names = UniqueNames(model)
        for node in list(model.graph):
            match = _match(node)
            if match is not None:
                _lower(model, match, names)
                self.lowered[match.path] = match.weight_shape
        return ir.passes.PassResult(model, modified=bool(self.lowered))


def codes_of_convolution(codes: NDArray[np.int8], strides: Sequence[int], kernel: Sequence[int]) -> NDArray[np.int8]:
    """Codes [in, out, K...] of a ConvTranspose -> [out x phases, in, kernel...] of the Conv; phases vary fastest."""
    in_features, out_features, *sizes = codes.shape
    rank = len(sizes)
    padding = [(0, m * s - size) for m, s, size in zip(kernel, strides, sizes, strict=True)]
    padded = np.pad(codes, [(0, 0), (0, 0), *padding])
    split = padded.reshape(
        in_features, out_features, *(size for pair in zip(kernel, strides, strict=True) for size in pair)
    )
    m_axes, r_axes = [2 + 2 * axis for axis in range(rank)], [3 + 2 * axis for axis in range(rank)]
    ordered = split.transpose(1, *r_axes, 0, *m_axes)
    flipped = np.flip(ordered, axis=tuple(range(2 + rank, 2 + 2 * rank)))  # ONNX's Conv correlates
    return np.ascontiguousarray(flipped.reshape(out_features * prod(strides), in_features, *kernel))


def _match(node: ir.Node) -> _Match | None:
    if node.op_type != "ConvTranspose" or node.domain:
        return None
    x, weight, bias = (*node.inputs, None)[:3]
    dequantize = producer(weight, "Cast")
    dequantize = producer(dequantize.inputs[0] if dequantize is not None else weight, "DequantizeLinear")
    if x is None or dequantize is None or dequantize.attributes.get_int("axis", 1) != 1:
        return None
    codes, scales = dequantize.inputs[:2]
    if codes is None or scales is None or not all(value.is_initializer() for value in (codes, scales, bias or codes)):
        return None
    if codes.dtype != ir.DataType.INT8 or codes.shape is None or len(codes.uses()) != 1:
        return None
    sizes = tuple(int(size) for size in codes.shape.numpy()[2:])
    ones, get = (1,) * len(sizes), node.attributes.get_ints
    strides, more = tuple(get("strides", ones)), tuple(get("output_padding", (0,) * len(sizes)))
    crop = _crop(sizes, strides, tuple(get("pads", (0,) * 2 * len(sizes))), more)
    square = len(sizes) == 2 and len(set(strides)) == 1
    if not _is_plain(node, ones) or min(map(min, crop)) < 0 or not (square or len(_spatial_sizes(x)) == len(sizes)):
        return None
    kernel = tuple(-(-size // stride) for size, stride in zip(sizes, strides, strict=True))
    return _Match(node, codes, scales, bias, strides, kernel, crop)


def _is_plain(node: ir.Node, ones: tuple[int, ...]) -> bool:
    """One group, no dilation, and padding that is written out."""
    alone = node.attributes.get_int("group", 1) == 1
    given = node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET" and "output_shape" not in node.attributes
    return alone and given and tuple(node.attributes.get_ints("dilations", ones)) == ones


def _spatial_sizes(x: ir.Value) -> list[int]:
    """Dimensions behind the channels, those that are known."""
    return [dim for dim in list(x.shape)[2:] if isinstance(dim, int)] if x.shape is not None else []


def _crop(
    sizes: tuple[int, ...], strides: tuple[int, ...], pads: tuple[int, ...], more: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """What is too much: the padding at the begin; at the end, that and the zeros of the last phases, less `more`."""
    ends = zip(sizes, strides, pads[len(sizes) :], more, strict=True)
    after = [-(-size // stride) * stride - size + pad - extra for size, stride, pad, extra in ends]
    return tuple(zip(pads[: len(sizes)], after, strict=True))


def _lower(model: ir.Model, match: _Match, names: UniqueNames) -> None:
    node, tape = match.node, Tape()
    x, before = node.inputs[0], node.outputs[0]
    if x is None or match.codes.const_value is None or match.scales.const_value is None:
        raise RuntimeError(f"{node.name} lacks an input")
    codes, scales = match.codes.const_value, match.scales.const_value
    weight = dequantized_int8_weight(
        tape,
        lazy_initializer(
            model,
            f"{match.path}.weight_codes_by_phase",
            ir.DataType.INT8,
            match.weight_shape,
            lambda: codes_of_convolution(codes.numpy(), match.strides, match.kernel),
        ),
        _repeated(model, f"{match.path}.weight_scales_by_phase", scales, match.phases),
        element_type(before),
        axis=0,
    )
    inputs = [x, weight]
    if match.bias is not None and match.bias.const_value is not None:
        inputs.append(_repeated(model, f"{match.path}.bias_by_phase", match.bias.const_value, match.phases))
    y = tape.op("Conv", inputs, {"pads": [size - 1 for size in match.kernel] * 2})
    y = _cropped(tape, _interleaved(tape, y, x, match), match)
    names.name_nodes(tape.nodes, match.path)
    y.name, y.type, y.shape = before.name, before.type, before.shape
    model.graph.insert_before(node, tape.nodes)
    ir.convenience.replace_all_uses_with(before, y, replace_graph_outputs=True)
    _remove(model, match)


def _repeated(model: ir.Model, name: str, tensor: ir.TensorProtocol, times: int) -> ir.Value:
    """A vector with each element several times in a row."""
    size = tensor.size * times
    return lazy_initializer(model, name, tensor.dtype, (size,), lambda: np.repeat(tensor.numpy().reshape(-1), times))


def _interleaved(tape: Tape, y: ir.Value, x: ir.Value, match: _Match) -> ir.Value:
    """[N, out x phases, Q...] -> [N, out, Q s...]."""
    if match.phases == 1:
        return y
    rank, strides = len(match.strides), match.strides
    if rank == 2 and strides[0] == strides[1]:
        return tape.op("DepthToSpace", [y], {"blocksize": strides[0], "mode": "CRD"})
    outputs = [size + m - 1 for size, m in zip(_spatial_sizes(x), match.kernel, strict=True)]
    channels = match.weight_shape[0] // match.phases
    split = tape.op("Reshape", [y, _constant(tape, [0, channels, *strides, *outputs])])
    order = [0, 1, *(axis for d in range(rank) for axis in (2 + rank + d, 2 + d))]
    moved = tape.op("Transpose", [split], {"perm": order})
    joined = [q * s for q, s in zip(outputs, strides, strict=True)]
    return tape.op("Reshape", [moved, _constant(tape, [0, channels, *joined])])


def _cropped(tape: Tape, y: ir.Value, match: _Match) -> ir.Value:
    axes = [axis for axis, ends in enumerate(match.crop) if any(ends)]
    if not axes:
        return y
    starts = [match.crop[axis][0] for axis in axes]
    ends = [-match.crop[axis][1] or _TO_THE_END for axis in axes]
    bounds = [_constant(tape, numbers) for numbers in (starts, ends, [2 + axis for axis in axes])]
    return tape.op("Slice", [y, *bounds])


def _constant(tape: Tape, numbers: Sequence[int]) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(numbers, np.int64))})


def _remove(model: ir.Model, match: _Match) -> None:
    """Drop the node, its weight, and what only it read."""
    weight = match.node.inputs[1]
    model.graph.remove(match.node, safe=True)
    while weight is not None and not weight.uses() and (node := weight.producer()) is not None:
        weight = node.inputs[0]
        model.graph.remove(node, safe=True)
    for value in (match.codes, match.scales, match.bias):
        if value is not None and not value.uses() and not value.is_graph_output():
            del model.graph.initializers[value.name or ""]
