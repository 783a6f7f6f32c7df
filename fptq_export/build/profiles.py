"""Optimization profiles: the shapes an engine accepts, from trtexec's grammar or from an LLM's limits.

One profile covers prefill and decode unless the caller makes more. A second one lets TensorRT choose kernels for decode
alone, but every layer is compiled again: for SmolLM2-135M under TensorRT for RTX 1.7.1 the build takes twice as long
and the engine grows from 139 to 165 MB, while RTX specializes kernels at run time in any case.

| input | shape | range |
|---|---|---|
| `input_ids`, `position_ids` | [batch, sequence] | batch 1..max_batch_size, sequence 1..max_input_len |
| `inputs_embeds` | [batch, sequence, hidden] | the same |
| `past_key_values.N.key`, `.value` | [batch, heads, past, head_dim] | past 0..max_kv_len |
| `attention_mask` | [batch, past + sequence] | 1..max_kv_len + max_input_len |
| `encoder_hidden_states` | [batch, source, hidden] | source 1..max_input_len |
| `encoder_attention_mask` | [batch, source] | the same |

The optimum is batch 1 and the middle of the other ranges. Every input with symbolic dimensions gets its range from the
names of its dimensions, so other decoders and encoders work as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from fptq_export.errors import Problem, UserErrors
from fptq_export.graph_io import load_graph

__all__ = [
    "ExplicitShapes",
    "GraphInput",
    "LlmLimits",
    "Profile",
    "ShapeRange",
    "check_profiles",
    "inputs_from_graph",
    "inputs_from_onnx",
    "profile_for_inputs",
    "shapes_from_option",
]

Shape = tuple[int, ...]
Range = tuple[int, int, int]
"""(minimum, optimum, maximum) of one dimension."""

_SYNONYMS = {
    "batch": ("batch", "batch_size"),
    "sequence": ("sequence", "sequence_length", "seq_len"),
    "source": ("source", "encoder_sequence_length"),
    "past": ("past", "past_sequence_length", "past_sequence", "past_length"),
    "total": ("past+sequence", "sequence+past", "past_sequence_length+sequence_length", "total_sequence_length"),
}
_CONTRACT = (
    (r"encoder_(hidden_states|attention_mask)", 1, "source"),
    (r"attention_mask", 1, "total"),
    (r"past_key_values\..*", 2, "past"),
    (r"past_key_values\..*", 0, "batch"),
    (r"input_ids|inputs_embeds", 1, "sequence"),
    (r"input_ids|inputs_embeds", 0, "batch"),
)
"""(input, axis, role) of the exported graphs. Later lines win: an encoder's mask has the symbol of `input_ids`."""

_HINT = "name every dynamic input in --minShapes, --optShapes and --maxShapes, e.g. input_ids:1x1"


@dataclass(frozen=True)
class GraphInput:
    """A graph input; a dynamic dimension is its symbol."""

    name: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, best and largest shape of one input; all of one rank."""

    name: str
    minimum: Shape
    optimum: Shape
    maximum: Shape


@dataclass(frozen=True)
class Profile:
    """Shape ranges of every dynamic input."""

    ranges: tuple[ShapeRange, ...]


@dataclass(frozen=True)
class LlmLimits:
    """What the engine must hold."""

    max_batch_size: int
    max_input_len: int
    """Most new tokens a sequence may bring in one call, and most of what the encoder before a decoder gave."""
    max_kv_len: int
    """Most tokens a sequence may have in the cache before a call."""


@dataclass(frozen=True)
class ExplicitShapes:
    """`--minShapes`, `--optShapes`, `--maxShapes`, by input name.

    An input named in only some of them: the optimum is the maximum, else the minimum; the others are the optimum.
    """

    minimum: Mapping[str, Shape] = field(default_factory=dict)
    optimum: Mapping[str, Shape] = field(default_factory=dict)
    maximum: Mapping[str, Shape] = field(default_factory=dict)

    def ranges(self) -> tuple[ShapeRange, ...]:
        """One range for each input named in any of the three."""
        found = []
        for name in dict.fromkeys((*self.minimum, *self.optimum, *self.maximum)):
            low, best, high = (shapes.get(name) for shapes in (self.minimum, self.optimum, self.maximum))
            given = [shape for shape in (best, high, low) if shape is not None]
            best = best if best is not None else given[0]
            high = high if high is not None else best
            found.append(ShapeRange(name, low if low is not None else best, best, high))
        return tuple(found)


def shapes_from_option(option: str, text: str) -> dict[str, Shape]:
    """Parse trtexec's `name:1x2x3,name2:4x5`; a name may hold colons and may stand in single quotes.

    Args:
        option: Name of the option, for the error message.
        text: Its value.

    Raises:
        UserErrors: Every entry that is not `name:AxBxC`, and every input named twice.
    """
    shapes: dict[str, Shape] = {}
    problems = []
    for entry in text.split(","):
        name, colon, dims = entry.strip().rpartition(":")
        name = name.strip("'")
        if not colon or not name or re.fullmatch(r"\d+(x\d+)*", dims) is None:
            problems.append(Problem(entry.strip(), "not of the form name:AxBxC"))
        elif name in shapes:
            problems.append(Problem(entry.strip(), f"input {name!r} is named twice"))
        else:
            shapes[name] = tuple(int(dim) for dim in dims.split("x"))
    if problems:
        raise UserErrors(option, problems, "write for example input_ids:1x128,attention_mask:1x128")
    return shapes


def inputs_from_onnx(path: Path) -> tuple[GraphInput, ...]:
    """Inputs of a graph file. Raises UserError when it cannot be read, and as `inputs_from_graph`."""
    return inputs_from_graph(load_graph(path).graph, str(path))


def inputs_from_graph(graph: ir.Graph, where: str) -> tuple[GraphInput, ...]:
    """Inputs of a graph; a dynamic dimension without a name gets one of its own.

    Args:
        graph: The graph.
        where: Its file, for the error message.

    Raises:
        UserErrors: Inputs whose rank is not known.
    """
    inputs, problems = [], []
    for value in graph.inputs:
        name = value.name or ""
        if value.shape is None:
            problems.append(Problem(name, "the input has no shape"))
            continue
        sizes = [dim if isinstance(dim, int) else dim.value for dim in value.shape.dims]
        dims = [f"{name}[{axis}]" if size is None else size for axis, size in enumerate(sizes)]
        inputs.append(GraphInput(name, tuple(dims)))
    if problems:
        raise UserErrors(where, problems, "export the model with the rank of every input known")
    return tuple(inputs)


def profile_for_inputs(
    inputs: Sequence[GraphInput], limits: LlmLimits, explicit: ExplicitShapes | None = None
) -> Profile | None:
    """The profile of a graph; None when no input is dynamic.

    Args:
        inputs: Inputs of the graph.
        limits: Limits for the dimensions of an LLM.
        explicit: Shapes the user gave. They win over the limits; inputs that are not named follow the dimensions they
            share with those that are.

    Raises:
        UserErrors: Everything that does not fit, at once: unknown inputs, wrong ranks, changed static dimensions,
            minimum > optimum > maximum, one symbol with two ranges, dimensions nothing is known about.
    """
    given = explicit.ranges() if explicit is not None else ()
    problems = _range_problems(given, inputs)
    problems += _limit_problems(limits)
    if problems:
        raise UserErrors("optimization profile", problems, _HINT)
    by_symbol = _ranges_by_symbol(inputs, limits, given)
    named = {item.name: item for item in given}
    ranges = []
    for item in (item for item in inputs if _is_dynamic(item)):
        dims = [(dim, dim, dim) if isinstance(dim, int) else by_symbol.get(dim) for dim in item.dims]
        problems += [
            Problem(f"{item.name}[{axis}]", f"nothing says how large {item.dims[axis]!r} gets")
            for axis, dim in enumerate(dims)
            if dim is None and item.name not in named
        ]
        known = [dim for dim in dims if dim is not None]
        follow = ShapeRange(item.name, *(tuple(dim[end] for dim in known) for end in range(3)))
        ranges.append(named.get(item.name, follow))
    problems = problems or _range_problems(ranges, inputs)
    if problems:
        raise UserErrors("optimization profile", problems, _HINT)
    return Profile(tuple(ranges)) if ranges else None


def check_profiles(profiles: Sequence[Profile], inputs: Sequence[GraphInput]) -> None:
    """Check that profiles fit a graph. Raises UserErrors with every misfit of every profile."""
    problems = []
    dynamic = [item.name for item in inputs if _is_dynamic(item)]
    if dynamic and not profiles:
        problems.append(Problem(dynamic[0], "the graph has dynamic inputs and there is no profile"))
    for index, profile in enumerate(profiles):
        found = _range_problems(profile.ranges, inputs)
        ranged = {item.name for item in profile.ranges}
        found += [Problem(name, "dynamic input without a range") for name in dynamic if name not in ranged]
        problems += [Problem(f"profile {index}: {problem.path}", problem.message) for problem in found]
    if problems:
        raise UserErrors("optimization profile", problems, _HINT)


def _is_dynamic(item: GraphInput) -> bool:
    return any(isinstance(dim, str) for dim in item.dims)


def _limit_problems(limits: LlmLimits) -> list[Problem]:
    floors = {"max_batch_size": 1, "max_input_len": 1, "max_kv_len": 0}
    values = {name: getattr(limits, name) for name in floors}
    return [
        Problem(f"--{name.replace('_', '-')}", f"{values[name]} is below {floor}")
        for name, floor in floors.items()
        if values[name] < floor
    ]


def _range_problems(ranges: Sequence[ShapeRange], inputs: Sequence[GraphInput]) -> list[Problem]:
    """What is wrong with each range on its own, then symbols that two inputs give different ranges."""
    by_name = {item.name: item for item in inputs}
    problems = []
    seen: dict[str, tuple[Range, str]] = {}
    for item in ranges:
        if item.name not in by_name:
            problems.append(Problem(item.name, f"the graph has no such input (it has {', '.join(by_name)})"))
            continue
        dims = by_name[item.name].dims
        found = _shape_problems(item, dims)
        problems += found
        for symbol, here in _symbol_ranges(item, dims).items() if not found else ():
            other, where = seen.setdefault(symbol, (here, item.name))
            if other != here:
                cause = f"{symbol!r} is {_text(here)} here and {_text(other)} in {where}"
                problems.append(Problem(item.name, cause))
    return problems


def _symbol_ranges(item: ShapeRange, dims: tuple[int | str, ...]) -> dict[str, Range]:
    ends = zip(dims, item.minimum, item.optimum, item.maximum, strict=True)
    return {dim: (low, best, high) for dim, low, best, high in ends if isinstance(dim, str)}


def _shape_problems(item: ShapeRange, dims: tuple[int | str, ...]) -> list[Problem]:
    ends = {"minimum": item.minimum, "optimum": item.optimum, "maximum": item.maximum}
    wrong = [
        Problem(item.name, f"the {end} has {len(shape)} dimensions, the graph {len(dims)}")
        for end, shape in ends.items()
        if len(shape) != len(dims)
    ]
    if wrong:
        return wrong
    for axis, dim in enumerate(dims):
        low, best, high = (shape[axis] for shape in ends.values())
        sizes = _text((low, best, high))
        if isinstance(dim, int) and not low == best == high == dim:
            wrong.append(Problem(f"{item.name}[{axis}]", f"the graph fixes this dimension to {dim}, not {sizes}"))
        elif not low <= best <= high:
            wrong.append(Problem(f"{item.name}[{axis}]", f"minimum <= optimum <= maximum does not hold: {sizes}"))
    return wrong


def _text(sizes: Range) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else "{}/{}/{}".format(*sizes)


def _ranges_by_symbol(inputs: Sequence[GraphInput], limits: LlmLimits, given: Sequence[ShapeRange]) -> dict[str, Range]:
    """Range of every symbol whose meaning is known; what the user gave wins, and `total` stays past + sequence."""
    roles = _roles(inputs)
    ranges: dict[str, Range] = {
        "batch": (1, 1, limits.max_batch_size),
        "sequence": (1, (1 + limits.max_input_len) // 2, limits.max_input_len),
        "source": (1, (1 + limits.max_input_len) // 2, limits.max_input_len),
        "past": (0, limits.max_kv_len // 2, limits.max_kv_len),
    }
    by_name = {item.name: item for item in inputs}
    explicit: dict[str, Range] = {}
    for item in given:
        explicit |= _symbol_ranges(item, by_name[item.name].dims)
    ranges |= {roles.get(symbol, symbol): sizes for symbol, sizes in explicit.items()}
    if "total" not in (roles.get(symbol) for symbol in explicit):
        past, sequence = ranges["past"], ranges["sequence"]
        ranges["total"] = (past[0] + sequence[0], past[1] + sequence[1], past[2] + sequence[2])
    return {symbol: ranges[role] for symbol, role in roles.items()} | explicit


def _roles(inputs: Sequence[GraphInput]) -> dict[str, str]:
    """Symbol -> what it counts, by the inputs of the export contract, else by its name."""
    roles: dict[str, str] = {}
    for item in inputs:
        for dim in item.dims:
            plain = re.sub(r"\s", "", str(dim)).lower()
            roles |= {str(dim): role for role, names in _SYNONYMS.items() if plain in names}
    for pattern, axis, role in _CONTRACT:
        for item in inputs:
            if re.fullmatch(pattern, item.name) and axis < len(item.dims) and isinstance(item.dims[axis], str):
                roles[str(item.dims[axis])] = role
    return roles
