"""Which parameters read and write the residual stream, found by following it through the model.

The forward pass runs on the meta device, where tensors have shapes and no values. Each function that is called on the
stream must be one that a rotation of it can be moved through:

* a table gives it, and linears or tables add to it (each may be scaled by numbers that do not depend on the channel);
* its length is taken (the mean of its squares), and every token is multiplied or divided by one number;
* a norm weight multiplies its channels, and only linears read the result;
* linears read it.

Anything else ends the search with the function and the module that calls it. No name of an architecture is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from calib.rotation.labels import KEEPING, Channels, Label, Squares, Stream, Written, keeps_channels, scales_tokens
from fptq_export.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["HINT", "ResidualRoles", "roles_from_model"]

HINT = "leave --rotate out: for this model it would not be exact"
_TOKENS = 4


@dataclass(frozen=True)
class ResidualRoles:
    """What a rotation of the residual stream does to each parameter, by name."""

    size: int
    """Channels of the stream."""
    tables: frozenset[str]
    """Embeddings [rows, size] whose rows are added to the stream."""
    writers: frozenset[str]
    """Weights [size, in] and biases [size] of linears whose output is added to the stream."""
    readers: Mapping[str, Channels | None]
    """Weights [out, size] of linears that read the stream, with the norm weight between; None where there is none."""

    def norms(self) -> dict[str, float]:
        """Norm weights that the readers take over, with what is left in their place: 1 minus the offset."""
        return {scale.parameter: 1.0 - scale.offset for scale in self.readers.values() if scale is not None}


def roles_from_model(model: PreTrainedModel) -> ResidualRoles:
    """Follow the residual stream through a model.

    Args:
        model: In eval mode, on the meta device; embedding and head do not share their weight. It gets hooks.

    Raises:
        UserError: A rotation would not be exact; names the module and the reason.
    """
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise UserError("--rotate", "the model has no table of token embeddings", HINT)
    walk = _Walk(model, embedding.weight)
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    # A mask of four dimensions is used as it is: making one asks for values, and tensors have none here.
    mask = torch.zeros(1, 1, _TOKENS, _TOKENS, device="meta")
    try:
        with walk.following_modules(model), torch.no_grad(), walk:
            output = model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except UserError:
        raise
    except Exception as error:  # what a model's code raises on tensors without values has no common base
        message = str(error).partition("\n")[0]
        cause = f"the residual stream cannot be followed ({type(error).__name__}: {message})"
        raise UserError(f"module {walk.module}", cause, HINT) from error
    walk.check_result(output.logits)
    return walk.roles()


@dataclass
class _Uses:
    """What the parameters were seen doing, by name. Not all of it goes together."""

    tables: set[str] = field(default_factory=set)
    """Looked up in."""
    written: set[str] = field(default_factory=set)
    """What comes from them is added to the stream."""
    read_elsewhere: set[str] = field(default_factory=set)
    """What comes from them is also used as it is."""
    readers: dict[str, Channels | None] = field(default_factory=dict)
    """Multiplied with the stream, after this norm weight."""
    multiplied: set[str] = field(default_factory=set)
    """Multiplied with another tensor."""
    other: set[str] = field(default_factory=set)
    """Used in any other way."""

    def clashes(self) -> list[str]:
        """Parameters that a rotation must change and must leave alone."""
        norms = {scale.parameter for scale in self.readers.values() if scale is not None}
        changed = self.written | set(self.readers) | norms
        twice = (self.written & self.read_elsewhere) | (set(self.readers) & (self.multiplied | self.tables))
        return sorted(twice | (changed & self.other) | (self.tables & self.multiplied & self.written))


class _Walk(TorchFunctionMode):
    """Labels the tensors of a forward pass.

    Args:
        model: Its parameters are followed.
        table: The token embedding, where the stream begins.
    """

    def __init__(self, model: nn.Module, table: torch.Tensor) -> None:
        super().__init__()
        self._size = int(table.shape[1])
        self._table = table
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._labels: dict[int, Label] = {
            id(parameter): Channels(name)
            for name, parameter in model.named_parameters()
            if tuple(parameter.shape) == (self._size,)
        }
        self._alive: list[torch.Tensor] = []
        """Labelled tensors: while they live, no other tensor gets their id."""
        self._uses = _Uses()
        self._modules: list[str] = []
        self._rules: Mapping[str, Callable[[_Call], Label | None]] = {
            **dict.fromkeys(KEEPING, self._keep),
            **dict.fromkeys(("mul", "multiply", "div", "true_divide"), self._scale),
            **dict.fromkeys(("pow", "square"), self._square),
            **dict.fromkeys(("mean", "sum"), self._sum),
            "add": self._add,
            "rms_norm": self._rms_norm,
            "linear": self._linear,
            "embedding": self._embedding,
        }

    @property
    def module(self) -> str:
        """Path of the module that runs."""
        return self._modules[-1] if self._modules else "(model)"

    @contextmanager
    def following_modules(self, model: nn.Module) -> Iterator[None]:
        """Know which module runs, inside the block."""

        def enter(path: str) -> Callable[..., None]:
            return lambda *_: self._modules.append(path)

        def leave(*_: object) -> None:
            self._modules.pop()

        hooks = []
        for path, module in model.named_modules():
            if path:
                hooks += [module.register_forward_pre_hook(enter(path)), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, then label its result."""
        result = func(*args, **(kwargs or {}))
        call = _Call(getattr(func, "__name__", str(func)), args, kwargs or {}, result)
        concerned = any(id(operand) in self._labels or id(operand) in self._names for operand in call.operands)
        if concerned and call.gives_tensors:
            rule = self._rules.get(call.name, self._only_read)
            label = rule(call)
            if label is not None:
                self._labels[id(result)] = label
                self._alive.append(result)
        return result

    def roles(self) -> ResidualRoles:
        """What was found.

        Raises:
            UserError: A parameter has two roles, or the stream is not one that linears read and write.
        """
        uses = self._uses
        for name in uses.clashes():
            raise UserError(f"parameter {name}", "it is also used where the residual stream is not rotated", HINT)
        writers = uses.written - uses.tables
        if not uses.readers or not writers:
            raise UserError("--rotate", "no linear reads the residual stream, or none writes it", HINT)
        return ResidualRoles(self._size, frozenset(uses.written & uses.tables), frozenset(writers), dict(uses.readers))

    def check_result(self, logits: torch.Tensor) -> None:
        """Refuse a model that gives the stream itself."""
        if isinstance(self._label(logits), Stream | Squares):
            raise UserError("--rotate", "the model's output is its residual stream: no linear head reads it", HINT)

    def _label(self, value: Any) -> Label | None:
        return self._labels.get(id(value)) if isinstance(value, torch.Tensor) else None

    def _refused(self, cause: str) -> UserError:
        return UserError(f"module {self.module}", cause, HINT)

    def _only_read(self, call: _Call) -> Label | None:
        """A function that a rotation cannot be moved through: its result is nothing of the stream's."""
        for operand in call.operands:
            label = self._label(operand)
            if isinstance(label, Stream | Squares):
                raise self._refused(_cause(call.name, label))
            if isinstance(label, Written):
                self._uses.read_elsewhere |= label.parameters
            if isinstance(label, Channels):
                self._uses.other.add(label.parameter)
            elif id(operand) in self._names:
                self._uses.other.add(self._names[id(operand)])
        return None

    def _keep(self, call: _Call) -> Label | None:
        label = self._label(call.args[0]) if call.args else None
        if label is not None and not isinstance(label, Squares) and keeps_channels(call.name, call.args, call.result):
            return label
        return self._only_read(call)

    def _add(self, call: _Call) -> Label | None:
        if len(call.args) != 2 or call.kwargs:
            return self._only_read(call)
        labels = [self._label(operand) for operand in call.args]
        for label, other in (labels, labels[::-1]):
            number = call.args[0] if other is labels[0] else call.args[1]
            if isinstance(label, Channels) and isinstance(number, int | float):
                return Channels(label.parameter, label.offset + number)
        if any(label is None or isinstance(label, Channels | Squares) for label in labels):
            return self._only_read(call)
        if any(operand.shape[-1] != self._size for operand in call.args) or Stream() not in labels:
            written = [label.parameters for label in labels if isinstance(label, Written)]
            return Written(frozenset.union(*written)) if len(written) == 2 else self._only_read(call)
        for label in labels:
            if isinstance(label, Stream) and label.scale is not None:
                return self._only_read(call)
            if isinstance(label, Written):
                self._uses.written |= label.parameters
        return Stream()

    def _scale(self, call: _Call) -> Label | None:
        if len(call.args) != 2 or call.kwargs:
            return self._only_read(call)
        pairs = (call.args,) if call.name.endswith(("div", "divide")) else (call.args, call.args[::-1])
        for value, factor in pairs:
            label, by = self._label(value), self._label(factor)
            if isinstance(label, Stream | Written) and by is None and scales_tokens(factor):
                return label
            if label == Stream() and isinstance(by, Channels) and len(pairs) == 2:
                return Stream(by)
        if call.args[0] is call.args[1] and self._label(call.args[0]) == Stream():
            return Squares()
        return self._only_read(call)

    def _square(self, call: _Call) -> Label | None:
        squares = call.name == "square" or call.args[1:] in ((2,), (2.0,))
        return Squares() if squares and self._label(call.args[0]) == Stream() else self._only_read(call)

    def _sum(self, call: _Call) -> Label | None:
        dim = call.args[1] if len(call.args) > 1 else call.kwargs.get("dim")
        if isinstance(self._label(call.args[0]), Squares) and dim in (-1, [-1], (-1,)):
            return None
        return self._only_read(call)

    def _rms_norm(self, call: _Call) -> Label | None:
        weight = call.argument(2, "weight")
        whole = tuple(call.argument(1, "normalized_shape")) == (self._size,)
        by = self._label(weight)
        if not whole or self._label(call.args[0]) != Stream() or not (weight is None or isinstance(by, Channels)):
            return self._only_read(call)
        return Stream(by if isinstance(by, Channels) else None)

    def _linear(self, call: _Call) -> Label | None:
        x, weight, bias = call.args[0], call.argument(1, "weight"), call.argument(2, "bias")
        name, label = self._names.get(id(weight)), self._label(x)
        names = [self._names.get(id(part)) for part in (weight, bias) if part is not None]
        if name is None or None in names:
            return self._only_read(call)
        if isinstance(label, Stream):
            if self._uses.readers.setdefault(name, label.scale) != label.scale:
                raise UserError(f"parameter {name}", "it reads the residual stream after different norms", HINT)
        else:
            self._uses.multiplied.add(name)
            self._only_read(_Call(call.name, (x,), {}, call.result))
        written = frozenset(part for part in names if part is not None)
        return Written(written) if call.result.shape[-1] == self._size else None

    def _embedding(self, call: _Call) -> Label | None:
        table = call.argument(1, "weight")
        name = self._names.get(id(table))
        if name is None:
            return self._only_read(call)
        self._uses.tables.add(name)
        if table is self._table:
            self._uses.written.add(name)
            return Stream()
        return Written(frozenset({name})) if call.result.shape[-1] == self._size else None


@dataclass(frozen=True)
class _Call:
    """One function call of the forward pass."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    result: Any

    def argument(self, position: int, name: str) -> Any:
        """An argument that may be given either way, or be left out."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name)

    @property
    def operands(self) -> list[torch.Tensor]:
        """Every tensor among the arguments."""
        return list(_tensors((self.args, dict(self.kwargs))))

    @property
    def gives_tensors(self) -> bool:
        """False for shapes, types and the like."""
        return any(True for _ in _tensors(self.result))


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def _cause(function: str, label: Stream | Squares) -> str:
    if function in ("layer_norm", "mean") and isinstance(label, Stream):
        return "its norm subtracts the mean of the channels, which a rotation does not keep"
    if isinstance(label, Stream) and label.scale is not None:
        return f"{function} reads what the norm weight {label.scale.parameter} scales: it cannot move into a linear"
    if function == "add":
        return "something that no linear wrote, or that a norm scales, is added to the residual stream"
    return f"{function} reads the residual stream, and a rotation cannot be moved through it"
