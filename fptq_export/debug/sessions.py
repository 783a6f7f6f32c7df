"""A segment of a graph in ONNX Runtime: as it is, with linears that can be put into float, and its linears alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from fptq_export.debug.graph_linears import GraphLinear
from fptq_export.debug.segments import Segment
from fptq_export.verify.graph_session import OnnxGraphSession

__all__ = ["Probe", "SegmentSessions", "extracted"]

_PAST = "past_key_values."
_SLOTS = 64
"""Least length of a static cache; a multiple of it is used, as in `verify.sessions`."""
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Probe:
    """What a segment made of hidden states."""

    end: NDArray[Any]
    """Hidden states or logits."""
    x: Arrays
    """Path -> what each quantized linear read, [rows, in]."""
    y: Arrays
    """Path -> its own product, [rows, out], also where the float one was used in its place."""


class SegmentSessions:
    """One segment, ready to run.

    Args:
        path: The file whose weights the graph uses.
        model: The graph.
        segment: Of it.
        weights: Path of a quantized linear -> the float weight that replaces it, float32 [in, out].
    """

    def __init__(
        self, path: Path, model: ir.Model, segment: Segment, weights: Mapping[str, NDArray[np.float32]]
    ) -> None:
        self._path, self._model, self._segment = path, model, segment
        self._weights = {_name("weight", name): array for name, array in weights.items()}

    def run(self, ids: NDArray[np.int64], hidden: NDArray[Any] | None) -> NDArray[Any]:
        """Token ids int64 [B, S] and hidden states [B, S, H] -> what the segment gives.

        The ids of segments behind the first one count for their shape alone.
        """
        model, session = self._plain
        (end,) = session.run([self._end], _feed(model, self._segment, ids, hidden))
        return end

    def probe(self, ids: NDArray[np.int64], hidden: NDArray[Any] | None, kept: Collection[str] = ()) -> Probe:
        """The same with inputs and products of the quantized linears; those in `kept` are computed in float."""
        model, session = self._probing
        paths = [linear.path for linear in self._segment.linears]
        keeps = {_name("keep", path): np.array(path in kept) for path in paths}
        feed = {**_feed(model, self._segment, ids, hidden), **keeps, **self._weights}
        names = [_name(kind, path) for kind in ("x", "y") for path in paths]
        end, *taps = session.run([self._end, *names], feed)
        rows = [array.reshape(-1, array.shape[-1]) for array in taps]
        return Probe(end, dict(zip(paths, rows, strict=False)), dict(zip(paths, rows[len(paths) :], strict=True)))

    def alone(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Each quantized linear on an input of its own: path -> [rows, in] -> path -> [rows, out].

        One at a time: experts read one value of the graph, and here each gets the tokens that chose it.
        """
        found: Arrays = {}
        nothing = {
            linear.x.name or "": np.zeros((1, linear.layer.in_features), linear.dtype.numpy())
            for linear in self._segment.linears
        }
        for linear in self._segment.linears:
            if linear.path in inputs:
                feed = {**nothing, linear.x.name or "": inputs[linear.path]}
                (found[linear.path],) = self._alone.run([linear.y.name or ""], feed)
        return found

    @property
    def _end(self) -> str:
        return self._segment.end.name or ""

    @cached_property
    def _plain(self) -> tuple[ir.Model, OnnxGraphSession]:
        starts = () if self._segment.start is None else (self._segment.start,)
        model = extracted(self._model, starts, (self._segment.end,))
        return model, self._session(model)

    @cached_property
    def _probing(self) -> tuple[ir.Model, OnnxGraphSession]:
        starts = () if self._segment.start is None else (self._segment.start,)
        model = extracted(self._model, starts, (self._segment.end,))
        for linear in self._segment.linears:
            _add_float_path(model, linear)
        return model, self._session(model)

    @cached_property
    def _alone(self) -> OnnxGraphSession:
        linears = self._segment.linears
        starts = list(dict.fromkeys(linear.x for linear in linears))
        model = extracted(self._model, starts, [linear.y for linear in linears])
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = None
        return self._session(model)

    def _session(self, model: ir.Model) -> OnnxGraphSession:
        return OnnxGraphSession(self._path, ir.to_proto(model).SerializeToString())


def extracted(model: ir.Model, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
    """The part of a graph between values, as a graph of its own; of the graph's inputs it has those that it needs."""
    others = [value for value in model.graph.inputs if value not in inputs]
    graph = ir.convenience.extract(model.graph, [*others, *inputs], outputs)
    used = [value for value in graph.inputs if value.uses() or value.is_graph_output()]
    graph.inputs.clear()
    graph.inputs.extend(used)
    return ir.Model(graph, ir_version=model.ir_version, functions=tuple(model.functions.values()))


def _name(kind: str, path: str) -> str:
    return f"fptq.{kind}.{path}"


def _add_float_path(model: ir.Model, linear: GraphLinear) -> None:
    """Before: x -> linear -> y. After: y is `Where(keep, x W, linear(x))`, and x and linear(x) are outputs too."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    x, y = values[linear.x.name or ""], values[linear.y.name or ""]
    keep = ir.Value(name=_name("keep", linear.path), type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    weight = ir.Value(
        name=_name("weight", linear.path),
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape([linear.layer.in_features, linear.layer.out_features]),
    )
    model.graph.inputs.extend([keep, weight])
    readers = list(y.uses())
    tape = Tape()
    wide = tape.op("Cast", [x], {"to": int(ir.DataType.FLOAT)})
    product = tape.op("Cast", [tape.op("MatMul", [wide, weight])], {"to": int(linear.dtype)})
    chosen = tape.op("Where", [keep, product, y])
    taps = {"x": tape.op("Identity", [x]), "y": tape.op("Identity", [y])}
    node = y.producer()
    assert node is not None, "a linear's product is computed"
    model.graph.insert_after(node, tape.nodes)
    for use in readers:
        use.node.replace_input_with(use.idx, chosen)
    for index, output in enumerate(model.graph.outputs):
        if output is y:  # logits of a quantized head
            chosen.name, chosen.shape, y.name = y.name, y.shape, f"{y.name}.quantized"
            chosen.type = y.type
            model.graph.outputs[index] = chosen
    for kind, tap in taps.items():
        tap.name, tap.type = _name(kind, linear.path), ir.TensorType(linear.dtype)
        model.graph.outputs.append(tap)


def _feed(model: ir.Model, segment: Segment, ids: NDArray[np.int64], hidden: NDArray[Any] | None) -> Arrays:
    """Every input that the graph of a segment has beside those of `probe`: a prompt without padding, no past."""
    batch, length = ids.shape
    inputs = {value.name or "": value for value in model.graph.inputs}
    static = "write_indices" in inputs
    feed: Arrays = {}
    for name, value in inputs.items():
        if name.startswith(_PAST):
            feed[name] = _empty_past(value, batch, length if static else 0)
    slots = max((array.shape[2] for array in feed.values()), default=-(-length // _SLOTS) * _SLOTS)
    arrays = {
        "input_ids": ids,
        "attention_mask": np.ones((batch, slots if static else length)),
        "position_ids": np.broadcast_to(np.arange(length), (batch, length)),
        "write_indices": np.zeros(batch),
    }
    feed |= {name: np.ascontiguousarray(arrays[name], _numpy(inputs[name])) for name in arrays if name in inputs}
    if segment.start is not None and hidden is not None:
        feed[segment.start.name or ""] = hidden
    return feed


def _empty_past(value: ir.Value, batch: int, tokens: int) -> NDArray[Any]:
    """A cache without tokens; a static one with room for them."""
    assert value.shape is not None, "a cache has a shape"
    _, heads, slots, size = value.shape
    room = slots if tokens and isinstance(slots, int) else -(-tokens // _SLOTS) * _SLOTS
    return np.zeros((batch, int(str(heads)), room, int(str(size))), _numpy(value))


def _numpy(value: ir.Value) -> np.dtype[Any]:
    assert value.dtype is not None, "inputs have a type"
    return value.dtype.numpy()
