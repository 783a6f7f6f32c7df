"""One row for each layer of the policy: where it stands, what range its input has, before and after equalization."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fptq_export.policy import CandidateFigures, LayerPolicy, Policy, PolicyArrays
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
    reader = _InputReader.of(documents, policy)
    linears = [_linear(number, path, layer, reader) for number, (path, layer) in enumerate(policy.layers.items(), 1)]
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


def _linear(number: int, path: str, layer: LayerPolicy, reader: _InputReader) -> LayerFigures:
    channels, equalized = reader.channels(path)
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


@dataclass(frozen=True)
class _InputReader:
    """Reads the channel maxima of inputs; those of one tensor once."""

    documents: RunDocuments
    equalized: frozenset[str]
    """Ids of the sites that the policy equalizes."""
    extensions: Mapping[str, str]
    """Linear path -> fold site that `sites.json` alone names."""
    scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    @classmethod
    def of(cls, documents: RunDocuments, policy: Policy) -> _InputReader:
        """Of a run whose policy is known."""
        sites = documents.sites
        extensions = sites.site_by_consumer() if sites is not None and policy.equalization else {}
        return cls(documents, frozenset(policy.equalizations()), extensions)

    def channels(self, path: str) -> tuple[NDArray[np.float32] | None, bool]:
        """Largest magnitude of each input channel after equalization, float32 [in], and whether there is one.

        None where the arrays are missing, as in a policy that a person wrote.
        """
        policy, arrays = self.documents.policy, self.documents.arrays
        name = f"{path}.input_absmax"
        if policy is None or arrays is None or name not in arrays:
            return None, False
        maxima = arrays.read(name, (policy.layers[path].in_features,))
        s = self._scales(policy.layers[path].site or self.extensions.get(path), arrays)
        if s is None or s.shape != maxima.shape:
            return maxima, False
        equalized: NDArray[np.float32] = (maxima / s).astype(np.float32)
        return equalized, True

    def _scales(self, site: str | None, arrays: PolicyArrays) -> NDArray[np.float32] | None:
        name = f"{site}.equalization"
        if site not in self.equalized or name not in arrays:
            return None
        if site not in self.scales:
            self.scales[site] = arrays.read(name)
        return self.scales[site]


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
