"""What a tensor of the forward pass is to the residual stream, and which operations keep that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["KEEPING", "Channels", "Label", "Squares", "Stream", "Written", "keeps_channels", "scales_tokens"]


@dataclass(frozen=True)
class Channels:
    """`offset` + a parameter with one number for each channel: the weight of a norm."""

    parameter: str
    offset: float = 0.0


@dataclass(frozen=True)
class Stream:
    """The residual stream, or what a norm makes of it; every token may be scaled by a number of its own."""

    scale: Channels | None = None
    """Channels are multiplied by it. A rotation does not commute with that: only linears may read the result."""


@dataclass(frozen=True)
class Squares:
    """The squares of the residual stream, channel by channel. Their sum is the same after a rotation."""


@dataclass(frozen=True)
class Written:
    """The sum of outputs of linears and rows of tables, with one channel for each of the stream's."""

    parameters: frozenset[str]
    """Weights, biases and tables that it comes from."""


Label = Channels | Stream | Squares | Written

KEEPING = frozenset(
    {
        *("to", "float", "half", "double", "bfloat16", "type", "type_as"),
        *("contiguous", "clone", "detach", "dropout", "view", "reshape", "__getitem__"),
    }
)
"""Functions that change no channel, where `keeps_channels` agrees."""


def keeps_channels(name: str, args: tuple[Any, ...], result: Any) -> bool:
    """Whether one of `KEEPING` leaves every vector of channels whole and in order."""
    before = args[0]
    if not isinstance(result, torch.Tensor) or result.ndim == 0 or result.shape[-1] != before.shape[-1]:
        return False
    if name != "__getitem__":
        return True
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    if not all(isinstance(part, slice) for part in index):
        return False
    return len(index) < before.ndim or bool(index[-1] == slice(None))


def scales_tokens(factor: Any) -> bool:
    """Whether a factor is one number, or one number a token: a rotation commutes with it."""
    if isinstance(factor, torch.Tensor):
        return factor.ndim == 0 or factor.shape[-1] == 1
    return isinstance(factor, int | float)
