"""From measured ranges to a policy: the FPTQ rule for every linear, then its INT4 codes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from calib.choose_equalization import EqualizerOptions, choose_equalization
from calib.equalize import closed_form_scale, scale_after_equalization
from calib.linears import LinearWeights
from calib.load import Checkpoint
from calib.policy_arrays import policy_arrays
from calib.replay import replay_policy
from calib.rule import float_layer, tier_from_absmax
from calib.site_scales import SiteScales, scales_of_policy, site_absmax
from calib.stats import Stats
from calib.weights import WEIGHT_METHODS
from fptq_export.errors import UserError
from fptq_export.policy import GROUP_SIZES, ArrayStream, LayerPolicy, Policy, Rule, WeightMethod, group_size_for
from fptq_export.progress import Progress
from fptq_export.sites import Linear, Sites

__all__ = ["DEFAULT_EXCLUDE", "PolicyOptions", "decide_policy", "excluded_paths", "replay_policy"]

DEFAULT_EXCLUDE = ("lm_head",)
"""The head stays float: it is a large part of the accuracy and a small part of the work."""


@dataclass(frozen=True)
class PolicyOptions:
    """How the rule is applied.

    Raises:
        UserError: A threshold, the group size or the method makes no sense.
    """

    v0: float = 15.0
    v1: float = 150.0
    group_size: int = GROUP_SIZES[0]
    weight_method: WeightMethod = "rtn"
    signed_scales: bool = False
    """Let group scales be negative: all 16 levels are used, and only the plugin runs the result."""
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    """Regular expressions, searched for in torch paths."""
    equalization: EqualizerOptions = field(default_factory=EqualizerOptions)

    def __post_init__(self) -> None:
        if not 0.0 <= self.v0 <= self.v1 < math.inf:
            cause = f"need 0 <= v0 <= v1 < infinity, got {self.v0:g} and {self.v1:g}"
            raise UserError("--v0, --v1", cause, "the paper has 15 and 150")
        if self.weight_method not in WEIGHT_METHODS:
            raise UserError("--weight-method", f"{self.weight_method!r} is unknown", f"use {', '.join(WEIGHT_METHODS)}")
        if self.group_size not in GROUP_SIZES:
            supported = ", ".join(map(str, GROUP_SIZES))
            raise UserError("--group-size", f"{self.group_size} is not supported", f"choose one of {supported}")


def decide_policy(
    sites: Sites,
    stats: Stats,
    checkpoint: Checkpoint,
    options: PolicyOptions,
    progress: Progress,
    hessians: Path | None = None,
) -> tuple[Policy, ArrayStream]:
    """Apply the FPTQ rule to every linear and quantize the weights.

    Args:
        sites: Linears and fold sites of the traced graph.
        stats: Covers every linear that is not excluded.
        checkpoint: Read weight by weight.
        options: Thresholds, group size, weight method, exclusions. A model that came with INT4 codes keeps them: group
            size and weight method are then not used.
        progress: Reports layers.
        hessians: `hessians.safetensors`, where the weight method needs it.

    Returns:
        The policy, and its arrays for `write_policy`: weights are quantized as they are asked for.

    Raises:
        UserError: A pattern is no regular expression or matches nothing, no layer can be quantized, the statistics miss
            a layer, or a weight cannot be quantized.
    """
    options.equalization.check_given(checkpoint.given)
    rule = Rule(v0=options.v0, v1=options.v1, equalizer=options.equalization.equalizer)
    excluded = excluded_paths([linear.path for linear in sites.linears], options.exclude)
    layers = {
        linear.path: float_layer(linear, f"excluded by {excluded[linear.path]!r}: keeps the float precision")
        if linear.path in excluded
        else checkpoint.given.layer_policy(linear, _site_absmax(linear, sites, stats, excluded), rule)
        if checkpoint.given is not None
        else _layer_policy(linear, _site_absmax(linear, sites, stats, excluded), rule, options)
        for linear in sites.linears
    }
    layers.update({
        linear.path: LayerPolicy(
            precision="float", activation=None, reason=linear.reason,
            in_features=linear.in_features, out_features=linear.out_features,
        )
        for linear in sites.unmatched
    })  # fmt: skip
    policy = Policy(model=checkpoint.name, rule=rule, layers=layers)
    if not policy.quantized():
        reasons = "; ".join(dict.fromkeys(layer.reason for layer in layers.values()))
        raise UserError(
            checkpoint.name, f"no layer can be quantized ({reasons})", "exclude less, or take another model"
        )
    policy, site_scales = _equalized(policy, sites, stats, checkpoint, options.equalization, hessians, progress)
    return policy, policy_arrays(policy, sites, stats.channel_absmax, checkpoint, progress, hessians, site_scales)


def _equalized(
    policy: Policy,
    sites: Sites,
    stats: Stats,
    checkpoint: Checkpoint,
    options: EqualizerOptions,
    hessians: Path | None,
    progress: Progress,
) -> tuple[Policy, SiteScales | None]:
    """Fill in the equalization table, and the scales of static inputs that depend on it."""
    if not options.folds_everywhere:
        return policy, None
    weights = LinearWeights.from_checkpoint(checkpoint)
    table = choose_equalization(policy, sites, stats.channel_absmax, weights, options, hessians, progress)
    policy = policy.model_copy(update={"equalization": dict(table.entries)})
    scales = scales_of_policy(policy, sites, stats.channel_absmax, weights.read, table.rms)
    layers = dict(policy.layers)
    sites_read = sites.site_by_consumer()
    for path, layer in policy.quantized().items():
        site = sites_read.get(path, "")
        if layer.activation == "static" and site in table.entries:
            maxima = site_absmax(sites.site(site), policy, stats.channel_absmax)
            scale = scale_after_equalization(maxima, table.entries[site], scales.equalization[site])
            layers[path] = layer.model_copy(update={"activation_scale": scale})
    return policy.model_copy(update={"layers": layers}), scales


def excluded_paths(paths: Sequence[str], patterns: Sequence[str]) -> dict[str, str]:
    """Path -> the pattern that excludes it.

    Raises:
        UserError: A pattern is not a regular expression, or matches no path (unless it is a default).
    """
    excluded: dict[str, str] = {}
    for pattern in patterns:
        try:
            matcher = re.compile(pattern)
        except re.error as error:
            raise UserError(
                f"--exclude {pattern!r}", f"not a regular expression ({error})", "mend the pattern"
            ) from None
        matches = [path for path in paths if matcher.search(path)]
        if not matches and pattern not in DEFAULT_EXCLUDE:
            hint = f"the paths look like {paths[0]}" if paths else ""
            raise UserError(f"--exclude {pattern!r}", "matches no linear of the model", hint)
        excluded.update({path: pattern for path in matches if path not in excluded})
    return excluded


def _site_absmax(linear: Linear, sites: Sites, stats: Stats, excluded: Mapping[str, str]) -> float:
    """V of a linear; linears of one site share it, so that they share the decision."""
    consumers = [linear.path] if linear.site is None else sites.site(linear.site).consumers
    return max(stats.absmax(path) for path in consumers if path not in excluded)


def _layer_policy(linear: Linear, absmax: float, rule: Rule, options: PolicyOptions) -> LayerPolicy:
    group_size = group_size_for(linear.in_features, options.group_size)
    if group_size is None:
        tried = ", ".join(str(size) for size in GROUP_SIZES if size <= options.group_size)
        return float_layer(
            linear, f"no group size of {tried} divides its {linear.in_features} inputs: keeps the float precision"
        )
    activation, reason = tier_from_absmax(absmax, rule, linear)
    if group_size != options.group_size:
        reason += f"; group size {group_size}, because {options.group_size} does not divide {linear.in_features}"
    equalized = activation == "lae_static"
    return LayerPolicy(
        precision="w4a8",
        activation=activation,
        reason=reason,
        in_features=linear.in_features,
        out_features=linear.out_features,
        input_absmax=absmax,
        activation_scale=None if activation == "per_token" else closed_form_scale(absmax, equalized=equalized),
        group_size=group_size,
        weight_method=options.weight_method,
        signed_scales=options.signed_scales,
        site=linear.site,
    )
