"""What a policy says: how many layers run what, how many bits that costs, and what stays in float and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from fptq_export.inspect.report import Cell, Inspection, Section
from fptq_export.policy import LayerPolicy, Policy, mean_bits, read_policy

__all__ = ["inspect_policy", "sections_from_policy"]


def inspect_policy(path: Path) -> Inspection:
    """Look at `policy.json`.

    Raises:
        UserErrors: It is not one; every field that is wrong is named.
    """
    return Inspection(path=str(path), kind="policy", sections=sections_from_policy(read_policy(path)))


def sections_from_policy(policy: Policy) -> tuple[Section, ...]:
    """The tables of a policy."""
    sections = (_about(policy), _runs(policy), _sites(policy), _convolutions(policy), _float(policy))
    return tuple(section for section in sections if section.rows)


def _about(policy: Policy) -> Section:
    quantized = policy.quantized().values()
    rows: list[tuple[Cell, ...]] = [
        ("model", policy.model),
        ("rule", f"{policy.rule.name}, equalizer {policy.rule.equalizer}, v0 {policy.rule.v0}, v1 {policy.rule.v1}"),
        ("linears", len(policy.layers)),
        ("of these quantized", len(quantized)),
    ]
    for what, layers in (
        ("bits per quantized weight, scales included", quantized),
        ("bits per weight of all linears, 16 where float", policy.layers.values()),
    ):
        bits = mean_bits(layers)
        if bits is not None:
            rows.append((what, round(bits, 3)))
    return Section(name="about", title="policy", columns=("what", "value"), rows=tuple(rows))


def _runs(policy: Policy) -> Section:
    counts = Counter(layer.runs for layer in policy.layers.values())
    rows: list[tuple[Cell, ...]] = []
    for runs, count in counts.most_common():
        alike = [layer for layer in policy.layers.values() if layer.runs == runs]
        bits = mean_bits(alike) or 0.0
        ranges = [layer.input_absmax for layer in alike if layer.input_absmax is not None]
        spread = f"{min(ranges):.3g} to {max(ranges):.3g}" if ranges else None
        rows.append((runs, count, sum(map(_weights, alike)), round(bits, 3), spread))
    columns = ("what it runs", "linears", "weights", "bits a weight", "largest input of each")
    return Section(name="runs", title="linears, by what they run", columns=columns, rows=tuple(rows))


def _sites(policy: Policy) -> Section:
    counts = Counter(site.method for site in policy.equalizations().values())
    rows = tuple(counts.most_common())
    return Section(name="equalization", title="equalized fold sites", columns=("method", "sites"), rows=rows)


def _convolutions(policy: Policy) -> Section:
    counts = Counter(entry.precision for entry in policy.convolutions.values())
    rows = tuple(counts.most_common())
    return Section(name="convolutions", title="convolutions", columns=("what it runs", "count"), rows=rows)


def _float(policy: Policy) -> Section:
    rows = [(path, layer.reason) for path, layer in policy.layers.items() if layer.precision == "float"]
    rows += [(path, entry.reason) for path, entry in policy.convolutions.items() if entry.precision == "float"]
    return Section(name="float", title="left in float, and why", columns=("layer", "reason"), rows=tuple(rows))


def _weights(layer: LayerPolicy) -> int:
    return layer.in_features * layer.out_features
