"""From measured ranges to a policy: the FPTQ rule for every linear, then its codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from calib.choose_equalization import EqualizerOptions, choose_equalization
from calib.convolutions import decide_convolutions
from calib.equalize import closed_form_scale, scale_after_equalization
from calib.given import GivenWeights
from calib.graph_weights import GraphWeights
from calib.hessians import owners_from_sites
from calib.linears import weights_from_source
from calib.load import Checkpoint
from calib.policy_arrays import policy_arrays
from calib.precision import DEFAULT_EXCLUDE, Choice, chosen_precisions
from calib.ranges import CalibratedRange, RangeCalibrator, calibrated_range
from calib.replay import replay_policy
from calib.rule import float_layer, tier_from_absmax
from calib.sequential import Sequential, check_sequential_given, with_sequential_entries
from calib.shared_inputs import stats_of_tensors
from calib.site_scales import SiteScales, scales_of_policy, site_absmax
from calib.stats import Stats
from calib.weights import WEIGHT_METHODS
from fptq_export.errors import UserError
from fptq_export.policy import GROUP_SIZES, ArrayStream, LayerPolicy, Policy, Rule, WeightMethod, group_size_for
from fptq_export.progress import Progress
from fptq_export.sites import Linear, Sites

__all__ = ["PolicyOptions", "decide_policy", "replay_policy"]


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
    range_calibrator: RangeCalibrator = "absmax"
    """How much of an input a static scale covers."""
    percentile: float = 99.99
    """Of the values that a range covers, `percentile` only."""
    precision: tuple[str, ...] = ()
    """`REGEX=NAME`: layers of another precision than `w4a8`; later ones win, also over `exclude`."""
    equalization: EqualizerOptions = field(default_factory=EqualizerOptions)

    def __post_init__(self) -> None:
        if not 0.0 <= self.v0 <= self.v1 < math.inf:
            cause = f"need 0 <= v0 <= v1 < infinity, got {self.v0:g} and {self.v1:g}"
            raise UserError("--v0, --v1", cause, "the paper has 15 and 150")
        if self.weight_method not in WEIGHT_METHODS:
            raise UserError("--weight-method", f"{self.weight_method!r} is unknown", f"use {', '.join(WEIGHT_METHODS)}")
        if not 0.0 < self.percentile <= 100.0:
            raise UserError("--percentile", f"{self.percentile:g} is not above 0 and up to 100", "try 99.99")
        if self.group_size not in GROUP_SIZES:
            supported = ", ".join(map(str, GROUP_SIZES))
            raise UserError("--group-size", f"{self.group_size} is not supported", f"choose one of {supported}")


def decide_policy(
    sites: Sites,
    stats: Stats,
    checkpoint: Checkpoint | GraphWeights,
    options: PolicyOptions,
    progress: Progress,
    hessians: Path | None = None,
    sequential: Sequential | None = None,
) -> tuple[Policy, ArrayStream]:
    """Apply the FPTQ rule to every linear and quantize the weights.

    Args:
        sites: Linears, convolutions and fold sites of the graph.
        stats: Covers every linear that is not excluded.
        checkpoint: Read weight by weight.
        options: Thresholds, group size, weight method, exclusions. A model that came with INT4 codes keeps them: group
            size and weight method are then not used.
        progress: Reports layers.
        hessians: `hessians.safetensors`, where the weight method needs it.
        sequential: Quantize weights block by block, with this text. What a layer runs does not depend on it.

    Returns:
        The policy, and its arrays for `write_policy`: weights are quantized as they are asked for.

    Raises:
        UserError: A pattern is no regular expression or matches nothing, no layer can be quantized, the statistics miss
            a layer, or a weight cannot be quantized.
    """
    options.equalization.check_given(checkpoint.given)
    if sequential is not None:
        check_sequential_given(checkpoint.given)
    rule = Rule(v0=options.v0, v1=options.v1, equalizer=options.equalization.equalizer)
    stats = stats_of_tensors(stats, sites)
    choices = chosen_precisions(sites.paths(), options.exclude, options.precision)
    layers = _layers(sites, stats, checkpoint.given, rule, options, choices)
    convolutions = decide_convolutions(sites, stats, choices)
    policy = Policy(model=checkpoint.name, rule=rule, layers=layers, convolutions=convolutions, outside=sites.outside)
    if not policy.quantized() and not policy.quantized_convolutions():
        said = (*(layer.reason for layer in layers.values()), *(entry.reason for entry in convolutions.values()))
        reasons = "; ".join(dict.fromkeys(said))
        raise UserError(
            checkpoint.name, f"no layer can be quantized ({reasons})", "exclude less, or take another model"
        )
    policy, site_scales = _equalized(policy, sites, stats, checkpoint, options.equalization, hessians, progress)
    policy = _with_calibrated_ranges(policy, sites, stats, options)
    if sequential is not None:
        policy = with_sequential_entries(policy, sequential)
    arrays = policy_arrays(
        policy, sites, stats.channel_absmax, checkpoint, progress, hessians, site_scales, sequential=sequential
    )
    return policy, arrays


def _layers(
    sites: Sites,
    stats: Stats,
    given: GivenWeights | None,
    rule: Rule,
    options: PolicyOptions,
    choices: Mapping[str, Choice],
) -> dict[str, LayerPolicy]:
    """What every linear runs, by its own input alone; those that stay float come with the reason."""
    layers = {}
    for linear in sites.linears:
        choice = choices.get(linear.path)
        if linear.float_reason is not None:
            layers[linear.path] = float_layer(linear, linear.float_reason)
        elif choice is not None and choice.precision == "float":
            layers[linear.path] = float_layer(linear, choice.float_reason)
        elif given is not None:
            layers[linear.path] = _given_layer(given, linear, stats.absmax(linear.path), rule, choice)
        else:
            layers[linear.path] = _layer_policy(linear, stats.absmax(linear.path), rule, options, choice)
    for unmatched in sites.unmatched:
        layers[unmatched.path] = LayerPolicy(
            precision="float", activation=None, reason=unmatched.reason,
            in_features=unmatched.in_features, out_features=unmatched.out_features,
        )  # fmt: skip
    return layers


def _equalized(
    policy: Policy,
    sites: Sites,
    stats: Stats,
    checkpoint: Checkpoint | GraphWeights,
    options: EqualizerOptions,
    hessians: Path | None,
    progress: Progress,
) -> tuple[Policy, SiteScales | None]:
    """Fill in the equalization table, and the scales of static inputs that depend on it."""
    if not options.folds_everywhere:
        return policy, None
    weights = weights_from_source(checkpoint)
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


def _layer_policy(
    linear: Linear, absmax: float, rule: Rule, options: PolicyOptions, choice: Choice | None
) -> LayerPolicy:
    activation, reason = tier_from_absmax(absmax, rule, linear)
    equalized = activation == "lae_static"
    layer = LayerPolicy(
        precision="w4a8",
        activation=activation,
        reason=reason,
        in_features=linear.in_features,
        out_features=linear.out_features,
        input_absmax=absmax,
        activation_scale=None if activation == "per_token" else closed_form_scale(absmax, equalized=equalized),
        group_size=group_size_for(linear.in_features, options.group_size),
        weight_method=options.weight_method,
        signed_scales=options.signed_scales,
        site=linear.site,
    )
    if choice is not None and choice.precision == "w8a8":
        reason = f"{reason}; INT8 weights by {choice.pattern!r}"
        int8 = {"precision": "w8a8", "group_size": None, "weight_method": "rtn", "signed_scales": False}
        return layer.model_copy(update={**int8, "reason": reason})
    if layer.group_size is None:
        tried = ", ".join(str(size) for size in GROUP_SIZES if size <= options.group_size)
        return float_layer(
            linear, f"no group size of {tried} divides its {linear.in_features} inputs: keeps the float precision"
        )
    if choice is not None and choice.precision == "w4a16":
        layer = _with_float_input(layer, choice)
    if layer.group_size == options.group_size:
        return layer
    cause = f"group size {layer.group_size}, because {options.group_size} does not divide {linear.in_features}"
    return layer.model_copy(update={"reason": f"{layer.reason}; {cause}"})


def _range_reader(sites: Sites, stats: Stats, options: PolicyOptions) -> Callable[[str], CalibratedRange]:
    """Give a function that calibrates the range of a linear's input, once for linears that read the same tensor."""
    owners = owners_from_sites(sites, stats.histograms)

    @cache
    def range_of_owner(path: str) -> CalibratedRange:
        histogram, absmax = stats.histogram(path), stats.absmax(path)
        return calibrated_range(histogram, absmax, options.range_calibrator, options.percentile)

    return lambda path: range_of_owner(owners.get(path, path))


def _with_calibrated_ranges(policy: Policy, sites: Sites, stats: Stats, options: PolicyOptions) -> Policy:
    """Static scales from histograms; others keep theirs.

    A histogram is measured on the input as it is, so an equalized input keeps its scale. Given scales are kept.
    """
    name = options.range_calibrator
    if name == "absmax":
        return policy
    range_of = _range_reader(sites, stats, options)
    by = f"{name} {options.percentile:g}" if name == "percentile" else name
    equalized = {path for site in policy.equalizations() for path in sites.site(site).consumers}
    layers = dict(policy.layers)
    for path, layer in policy.quantized().items():
        if layer.activation_scale is None:
            continue
        if layer.weight_method == "given" or path in equalized:
            cause = (
                "the scale is given" if layer.weight_method == "given" else "its histogram is from before equalization"
            )
            layers[path] = layer.model_copy(update={"reason": f"{layer.reason}; not by {name}: {cause}"})
            continue
        chosen = range_of(path)
        words = f"range {chosen.absmax:.6g} by {by} clips {chosen.clipped:.3g} of the values"
        update = {"activation_scale": closed_form_scale(chosen.absmax, equalized=False)}
        layers[path] = layer.model_copy(update={**update, "reason": f"{layer.reason}; {words}"})
    return policy.model_copy(update={"layers": layers})


def _with_float_input(layer: LayerPolicy, choice: Choice) -> LayerPolicy:
    """The same INT4 weight with an input that is not quantized. No plugin runs it, so its scales are positive."""
    reason = f"INT4 weights and a float input by {choice.pattern!r}"
    update = {"precision": "w4a16", "activation": None, "activation_scale": None, "signed_scales": False}
    return layer.model_copy(update={**update, "reason": reason})


def _given_layer(given: GivenWeights, linear: Linear, absmax: float, rule: Rule, choice: Choice | None) -> LayerPolicy:
    layer = given.layer_policy(linear, absmax, rule)
    if choice is None:
        return layer
    signed = layer.signed_scales and choice.precision == "w4a16"
    if layer.precision == "float" or choice.precision == "w8a8" or signed:
        cause = f"{linear.path} cannot be {choice.precision}: the model came quantized, with other codes or none for it"
        raise UserError(
            f"--precision {choice.pattern!r}", cause, "leave the pattern out, or start from the float model"
        )
    return _with_float_input(layer, choice) if choice.precision == "w4a16" else layer
