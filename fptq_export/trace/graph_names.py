"""Names of what a traced graph holds: tensors as in the checkpoint, dimensions as people look for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import onnx_ir as ir

__all__ = ["name_dimensions", "name_initializers"]

_WRAPPER = "wrapped"
"""Attribute of the traced module that holds the model."""


def name_initializers(graph: ir.Model) -> None:
    """`wrapped.model.layers...` -> `model.layers...`: the names of the checkpoint."""
    for value in list(graph.graph.initializers.values()):
        if value.name is not None:
            value.name = value.name.removeprefix(f"{_WRAPPER}.")


def name_dimensions(graph: ir.Model, names: Mapping[str, tuple[str | None, ...]]) -> None:
    """Give dynamic dimensions the names people look for in the file, everywhere in the graph.

    Args:
        graph: Changed in place.
        names: Input -> names of its dimensions; an input that is not there is a cache.
    """
    symbols: dict[str, str] = {}
    for value in graph.graph.inputs:
        wanted = names.get(value.name or "", ("batch", None, "past", None))
        for name, dim in zip(wanted, value.shape or (), strict=True):
            if name is not None:
                symbols[str(dim)] = name
    for value in _values(graph):
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else _renamed(str(dim), symbols) for dim in value.shape]
            )


def _values(graph: ir.Model) -> Iterator[ir.Value]:
    yield from graph.graph.inputs
    for node in graph.graph:
        yield from node.outputs


def _renamed(expression: str, symbols: Mapping[str, str]) -> str:
    """`s17 + s70` -> `past + sequence`."""
    return re.sub(r"\w+", lambda match: symbols.get(match[0], match[0]), expression)
