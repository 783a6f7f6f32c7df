"""What an engine reads and writes, as Triton is told: from the graph it was built of and from its profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import onnx_ir as ir
from pydantic import BaseModel, ConfigDict

from fptq_export.build.engine_facts import InputRange
from fptq_export.errors import Problem, UserErrors
from fptq_export.graph_io import load_graph
from fptq_export.verify.causal_inputs import WRITE_INDICES

__all__ = ["CacheTensor", "PlanFacts", "PlanTensor", "plan_facts"]

Dim = int | str
_PAST, _PRESENT = "past_key_values.", "present."
_PAST_AXIS = 2
"""Of a cache [batch, heads, past, size]."""
_TYPES: Mapping[ir.DataType, str] = {
    ir.DataType.BOOL: "BOOL",
    ir.DataType.UINT8: "UINT8",
    ir.DataType.INT8: "INT8",
    ir.DataType.INT32: "INT32",
    ir.DataType.INT64: "INT64",
    ir.DataType.FLOAT16: "FP16",
    ir.DataType.FLOAT: "FP32",
    ir.DataType.BFLOAT16: "BF16",
}
"""Types that TensorRT has at its borders -> what Triton calls them."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PlanTensor(_Model):
    """An input or an output."""

    name: str
    data_type: str
    """As Triton calls it: `FP16`, `INT64`."""
    dims: tuple[int, ...]
    """Without the batch, where there is one; -1 where the length varies."""
    optimum: tuple[int, ...] = ()
    """Of an input: the shape the engine is best at, without the batch."""


class CacheTensor(_Model):
    """Keys, values or scales of a layer: the input, and the output that goes into it at the next call."""

    past: PlanTensor
    present: str


class PlanFacts(_Model):
    """An engine."""

    max_batch_size: int
    """0 where not every input and output has the batch in front."""
    inputs: tuple[PlanTensor, ...]
    """Without the cache."""
    outputs: tuple[PlanTensor, ...]
    cache: tuple[CacheTensor, ...]
    cache_kind: Literal["none", "concat", "static"]
    max_input_len: int | None = None
    """Most tokens of a call, where the engine reads tokens."""
    max_kv_len: int | None = None
    """Most tokens in the cache when a text has been written token by token."""

    @property
    def batch_dims(self) -> int:
        """1 where the inputs of a causal language model have the batch among their `dims`, in front; else 0.

        So it is with an output without a batch, as `range_monitor` is: Triton wants the batch in front of all or none.
        """
        return int(self.max_batch_size == 0 and bool(self.cache))


def plan_facts(graph: Path, profiles: Sequence[Sequence[InputRange]]) -> PlanFacts:
    """Facts of an engine.

    Args:
        graph: The graph it was built of. Its names, types and ranks are those of the engine; the length of a static
            cache is not in it.
        profiles: Of the engine; empty where every shape is fixed. Where there are several, the widest limits count.

    Raises:
        UserError: The graph cannot be read.
        UserErrors: Inputs or outputs have types or shapes that Triton cannot be told.
    """
    model = load_graph(graph)
    ranges = _widest(profiles)
    symbols = _symbols(model.graph.inputs, ranges)
    batch = _batch_symbol((*model.graph.inputs, *model.graph.outputs))
    _check(graph, (*model.graph.inputs, *model.graph.outputs))
    inputs = {tensor.name: tensor for tensor in (_tensor(item, symbols, batch, ranges) for item in model.graph.inputs)}
    outputs = {tensor.name: tensor for tensor in (_tensor(item, symbols, batch, {}) for item in model.graph.outputs)}
    pairs = {name: name.replace(_PAST, _PRESENT, 1) for name in inputs if name.startswith(_PAST)}
    kind: Literal["none", "concat", "static"] = "static" if WRITE_INDICES in inputs else "concat"
    return PlanFacts(
        max_batch_size=symbols[batch][1] if batch is not None else 0,
        inputs=tuple(tensor for name, tensor in inputs.items() if name not in pairs),
        outputs=tuple(tensor for name, tensor in outputs.items() if name not in pairs.values()),
        cache=tuple(CacheTensor(past=inputs[past], present=present) for past, present in pairs.items()),
        cache_kind=kind if pairs else "none",
        max_input_len=_last_maximum(ranges, "input_ids"),
        max_kv_len=_most_cached(ranges, kind, next(iter(pairs), "")),
    )


def _widest(profiles: Sequence[Sequence[InputRange]]) -> dict[str, InputRange]:
    widest: dict[str, InputRange] = {}
    for item in (item for profile in profiles for item in profile):
        other = widest.get(item.name, item)
        lows = tuple(map(min, item.minimum, other.minimum))
        highs = tuple(map(max, item.maximum, other.maximum))
        widest[item.name] = InputRange(name=item.name, minimum=lows, optimum=other.optimum, maximum=highs)
    return widest


def _dims(value: ir.Value) -> tuple[Dim, ...]:
    """Sizes and names of dimensions; one without a name gets its own."""
    dims = value.shape.dims if value.shape is not None else ()
    sizes = [dim if isinstance(dim, int) else dim.value for dim in dims]
    return tuple(f"{value.name}[{axis}]" if size is None else size for axis, size in enumerate(sizes))


def _symbols(inputs: Sequence[ir.Value], ranges: Mapping[str, InputRange]) -> dict[str, tuple[int, int]]:
    """Smallest and largest size of every named dimension that a profile says something about."""
    found: dict[str, tuple[int, int]] = {}
    for value in inputs:
        item = ranges.get(value.name or "")
        for axis, dim in enumerate(_dims(value)):
            if isinstance(dim, str) and item is not None:
                found[dim] = (item.minimum[axis], item.maximum[axis])
    return found


def _batch_symbol(values: Sequence[ir.Value]) -> str | None:
    """The dimension that every input and output has in front, if it is one."""
    first = {dims[0] if (dims := _dims(value)) else None for value in values}
    name = next(iter(first)) if len(first) == 1 else None
    return name if isinstance(name, str) else None


def _check(graph: Path, values: Sequence[ir.Value]) -> None:
    problems = [
        Problem(value.name or "", f"{value.dtype} is no type that TensorRT and Triton share")
        for value in values
        if value.dtype not in _TYPES
    ]
    problems += [Problem(value.name or "", "has no known rank") for value in values if value.shape is None]
    if problems:
        raise UserErrors(str(graph), problems, "export the model again with plain inputs and outputs")


def _tensor(
    value: ir.Value,
    symbols: Mapping[str, tuple[int, int]],
    batch: str | None,
    ranges: Mapping[str, InputRange],
) -> PlanTensor:
    dims = [_size(dim, symbols) for dim in _dims(value)]
    item = ranges.get(value.name or "")
    skip = 1 if batch is not None else 0
    if value.dtype is None:
        raise AssertionError("types were checked")
    return PlanTensor(
        name=value.name or "",
        data_type=_TYPES[value.dtype],
        dims=tuple(dims[skip:]),
        optimum=item.optimum[skip:] if item is not None else tuple(dims[skip:]),
    )


def _size(dim: Dim, symbols: Mapping[str, tuple[int, int]]) -> int:
    """The size where the profile leaves one, else -1."""
    if isinstance(dim, int):
        return dim
    low, high = symbols.get(dim, (0, 1))
    return high if low == high else -1


def _most_cached(ranges: Mapping[str, InputRange], kind: str, past: str) -> int | None:
    """A growing cache holds one token more after a decode step than the profile allows before it."""
    slots = ranges[past].maximum[_PAST_AXIS] if past in ranges else None
    total = _last_maximum(ranges, "attention_mask")
    if slots is None or kind == "static":
        return total
    return slots + 1 if total is None else min(total, slots + 1)


def _last_maximum(ranges: Mapping[str, InputRange], name: str) -> int | None:
    item = ranges.get(name)
    return None if item is None else item.maximum[-1]
