"""One row for each layer of the policy: where it stands, what range its input has, before and after equalization."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fptq_export.equalized_inputs import EqualizedInputs
from fptq_export.policy import CandidateFigures, LayerPolicy
from fptq_export.report.documents import RunDocuments

__all__ = ["LayerFigures", "Panel", "layer_figures", "panels_from_layers"]

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)")
_MOST_PANELS = 8
"""More kinds of layers than that are no row of equal blocks: they are drawn one after the other."""


@dataclass(frozen=True)
class LayerFigures:
    """A linear or convolution of the policy."""

    number: int
    """Place in the policy, from 1."""
    path: str
    runs: str
    """`w4a8 static g64`."""
    tier: str
    """`static`, `lae_static`, `per_token`, or `float` where the input is not quantized."""
    reason: str
    before: float | None
    """Largest magnitude of the input in calibration."""
    after: float | None
    """The same after equalization; None where the input is not equalized."""
    scale: float | None
    """INT8 scale of a static input."""
    levels: float | None
    """INT8 levels, of 127, that the median channel of a static input reaches in calibration."""
    weight_method: str | None
    shape: tuple[int, int] | None
    """Inputs and outputs of a linear."""
    sqnr_db: float | None
    """Output SQNR on real inputs in dB, where `--policy auto` measured it."""

    @property
    def block(self) -> int | None:
        """First number in the path: 7 of `model.layers.7.mlp.up_proj`."""
        found = _INDEX.search(self.path)
        return int(found[0]) if found else None

    @property
    def role(self) -> str:
        """What follows the block's number, experts and the like as `*`: `mlp.experts.*.up_proj`."""
        found = _INDEX.search(self.path)
        return _INDEX.sub("*", self.path[found.end() :]).lstrip(".") if found else self.path


@dataclass(frozen=True)
class Panel:
    """Layers that are drawn beside each other."""

    title: str
    layers: tuple[LayerFigures, ...]
    places: tuple[int, ...]
    """Where each of them stands: its block, or its number."""
    in_blocks: bool


def layer_figures(documents: RunDocuments) -> tuple[LayerFigures, ...]:
    """Every layer of the policy, linears first."""
    policy = documents.policy
    if policy is None:
        return ()
    arrays = documents.arrays
    inputs = None if arrays is None else EqualizedInputs(policy, arrays, documents.sites)
    linears = [_linear(number, path, layer, inputs) for number, (path, layer) in enumerate(policy.layers.items(), 1)]
    start = len(linears) + 1
    convolutions = [
        LayerFigures(
            number,
            path,
            entry.precision,
            "static" if entry.precision == "w8a8" else "float",
            entry.reason,
            before=entry.input_absmax,
            after=None,
            scale=entry.activation_scale,
            levels=None,
            weight_method=None,
            shape=None,
            sqnr_db=None,
        )
        for number, (path, entry) in enumerate(policy.convolutions.items(), start)
    ]
    return (*linears, *convolutions)


def _linear(number: int, path: str, layer: LayerPolicy, inputs: EqualizedInputs | None) -> LayerFigures:
    """Arrays are missing of a policy that a person wrote."""
    channels = None if inputs is None else inputs.channel_absmax(path)
    equalized = inputs is not None and inputs.site(path) is not None
    after = float(channels.max()) if channels is not None and equalized else None
    levels = None
    if channels is not None and layer.activation_scale is not None:
        levels = float(np.median(np.minimum(channels / layer.activation_scale, 127.0)))
    chosen = [found for found in layer.candidates if _is_chosen(found, layer)]
    return LayerFigures(
        number=number,
        path=path,
        runs=layer.runs,
        tier=layer.activation or "float",
        reason=layer.reason,
        before=layer.input_absmax,
        after=after,
        scale=layer.activation_scale,
        levels=levels,
        weight_method=layer.weight_method,
        shape=(layer.in_features, layer.out_features),
        sqnr_db=chosen[0].sqnr_db if chosen else None,
    )


def _is_chosen(candidate: CandidateFigures, layer: LayerPolicy) -> bool:
    return all(getattr(candidate, name) == getattr(layer, name) for name in ("precision", "activation", "group_size"))


def panels_from_layers(layers: tuple[LayerFigures, ...], *, of_inputs: bool) -> tuple[Panel, ...]:
    """Layers of equal role in a panel, by block.

    Graphs whose layers are no row of blocks are one panel, in the order of the policy.

    Args:
        layers: What is drawn.
        of_inputs: Whether figures of inputs are drawn: layers that read one tensor then share a panel and a mark.
    """
    by_role: dict[str, list[LayerFigures]] = {}
    for layer in layers:
        by_role.setdefault(layer.role, []).append(layer)
    rows = {role: found for role, found in by_role.items() if any(layer.block is not None for layer in found)}
    merged = _merged(rows) if of_inputs else [([role], found) for role, found in rows.items()]
    others = tuple(layer for role, found in by_role.items() if role not in rows for layer in found)
    if not rows or len(merged) > _MOST_PANELS:
        return (Panel("all layers, in order", layers, tuple(layer.number for layer in layers), in_blocks=False),)
    what = "input of " if of_inputs else ""
    panels = [
        Panel(what + ", ".join(roles), tuple(found), tuple(layer.block or 0 for layer in found), in_blocks=True)
        for roles, found in merged
    ]
    if others:
        panels.append(Panel("other layers", others, tuple(layer.number for layer in others), in_blocks=False))
    return tuple(panels)


def _merged(rows: Mapping[str, list[LayerFigures]]) -> list[tuple[list[str], list[LayerFigures]]]:
    """Roles whose inputs have the same ranges in all blocks are drawn once."""
    merged: dict[tuple[object, ...], tuple[list[str], list[LayerFigures]]] = {}
    for role, found in rows.items():
        key = tuple((layer.block, layer.before, layer.after, layer.scale, layer.tier) for layer in found)
        roles, _ = merged.setdefault(key, ([], found))
        roles.append(role)
    return list(merged.values())
