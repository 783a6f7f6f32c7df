"""Replay an edited policy: check it whole, then recompute what follows from it. No calibration is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from calib.check_equalization import outdated_code_problems, outdated_scale_problems, table_problems
from calib.check_policy import policy_problems
from calib.convolutions import completed_convolutions, convolution_problems
from calib.equalize import scale_after_equalization
from calib.equalizers import NEEDS_RMS
from calib.given import GivenWeights
from calib.graph_weights import GraphWeights
from calib.hessians import HESSIANS_FILE, Hessians
from calib.linears import weights_from_source
from calib.load import Checkpoint
from calib.policy_arrays import policy_arrays
from calib.rule import AUTO_REASON_START, RULE_REASON_START, tier_from_absmax
from calib.site_scales import rms_from_hessian, scales_of_policy
from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.policy import (
    Activation,
    ArrayStream,
    LayerPolicy,
    Policy,
    PolicyArrays,
    Rule,
    arrays_path,
    read_policy,
)
from fptq_export.progress import Progress
from fptq_export.sites import Linear, Sites

__all__ = ["replay_policy"]

_BY_HAND = "set by hand"


def replay_policy(
    path: Path, sites: Sites, checkpoint: Checkpoint | GraphWeights, progress: Progress
) -> tuple[Policy, ArrayStream]:
    """Read a policy that a person may have edited, and recompute scales and codes from the checkpoint.

    What a layer runs is taken from its entry, and how a site is equalized from the table; neither the rule's thresholds
    nor a search are applied again. An `activation_scale` that is null gets its closed form from the channel maxima
    stored in `policy.safetensors`; another value is kept. Codes of layers with a `sequential` entry are kept too.

    Args:
        path: `policy.json`, with `policy.safetensors` beside it, and `hessians.safetensors` where a weight method needs
            it.
        sites: Linears and fold sites of the traced graph.
        checkpoint: Read weight by weight.
        progress: Reports layers.

    Returns:
        The completed policy, and its arrays for `write_policy`: weights are quantized as they are asked for.

    Raises:
        UserErrors: Everything that is wrong with the file, each with its JSON path.
        UserError: A file is missing or damaged, or a weight cannot be quantized.
    """
    policy = read_policy(path)
    maxima = _maxima_from_arrays(arrays_path(path), sites)
    stored = _site_arrays(arrays_path(path), "equalization", sites)
    beside = path.with_name(HESSIANS_FILE)
    hessians = beside if beside.is_file() else None
    rms = _known_rms(path, policy, sites, hessians)
    given = checkpoint.given.layers if checkpoint.given is not None else None
    problems = [*policy_problems(policy, sites, maxima, given), *table_problems(policy, sites, maxima, rms)]
    _raise_if_any(path, [*problems, *convolution_problems(policy, sites, maxima)])
    scales = scales_of_policy(policy, sites, maxima, weights_from_source(checkpoint).read, rms)
    now = scales.equalization
    outdated = outdated_scale_problems(policy, sites, maxima, now, stored)
    _raise_if_any(path, [*outdated, *outdated_code_problems(policy, sites, now, stored)])
    entries, sites_read = policy.equalizations(), sites.site_by_consumer()
    layers = {}
    for name, layer in policy.layers.items():
        if layer.precision != "float":
            site = sites_read.get(name, "")
            scale = scale_after_equalization(maxima[name], entries.get(site), scales.equalization.get(site))
            measured = float(maxima[name].max())
            layers[name] = _completed(layer, sites.linear(name), measured, scale, policy.rule, checkpoint.given)
        else:
            layers[name] = _float_layer(layer)
    convolutions = completed_convolutions(policy, maxima)
    completed = policy.model_copy(update={"layers": layers, "convolutions": convolutions})
    before = PolicyArrays(arrays_path(path))
    arrays = policy_arrays(completed, sites, maxima, checkpoint, progress, hessians, scales, stored=before)
    return completed, arrays


def _raise_if_any(path: Path, problems: Sequence[Problem]) -> None:
    if problems:
        raise UserErrors(str(path), problems, "mend every entry listed above and run again")


def _site_arrays(path: Path, kind: str, sites: Sites) -> dict[str, NDArray[np.float32]]:
    """`<site>.<kind>` of every site that has a sound one."""
    arrays = PolicyArrays(path)
    found = {}
    for site in sites.fold_sites:
        name = f"{site.id}.{kind}"
        if name in arrays:
            values = arrays.read(name)
            if values.shape != (site.channels,) or values.dtype != np.float32 or not np.isfinite(values).all():
                cause = f"{name} is not {site.channels} finite float32 numbers"
                raise UserError(str(path), cause, "calibrate again: the file was changed")
            found[site.id] = values
    return found


def _known_rms(path: Path, policy: Policy, sites: Sites, hessians: Path | None) -> dict[str, NDArray[np.float32]]:
    """Root mean squares of every site of the table that needs them: as stored, or else from the Hessians."""
    stored = _site_arrays(arrays_path(path), "input_rms", sites)
    wanted = [site for site, entry in policy.equalization.items() if entry.method in NEEDS_RMS]
    rms = {site: stored[site] for site in wanted if site in stored}
    if hessians is not None and len(rms) < len(wanted):
        matrices = Hessians(hessians, sites)
        for site in sites.fold_sites:
            if site.id in wanted and site.id not in rms and any(map(matrices.covers, site.consumers)):
                rms[site.id] = rms_from_hessian(matrices.read_sum(site.consumers))
    return rms


def _maxima_from_arrays(path: Path, sites: Sites) -> Mapping[str, NDArray[np.float32]]:
    sizes = {linear.path: linear.in_features for linear in sites.linears}
    sizes.update({found.path: 1 for found in sites.convolutions})
    maxima: dict[str, NDArray[np.float32]] = {}
    try:
        arrays = PolicyArrays(path)
        for layer in sizes:
            name = f"{layer}.input_absmax"
            if name in arrays:
                maxima[layer] = arrays.read(name)
    except SafetensorError as error:
        raise UserError(str(path), f"damaged ({error})", "restore it, or calibrate again") from None
    for layer, absmax in maxima.items():
        usable = absmax.shape == (sizes[layer],) and absmax.dtype == np.float32
        if not usable or not np.isfinite(absmax).all() or (absmax < 0).any():
            raise UserError(
                str(path),
                f"{layer}.input_absmax is not {sizes[layer]} finite float32 magnitudes",
                "calibrate again: the file belongs to another model or was changed",
            )
    return maxima


def _completed(
    layer: LayerPolicy, linear: Linear, measured: float, scale: float, rule: Rule, given: GivenWeights | None
) -> LayerPolicy:
    """Fill in what an edit left open: the closed-form scale, and who decided."""
    update: dict[str, Any] = {"input_absmax": measured}
    if layer.activation_scale is None and layer.activation not in (None, "per_token"):
        update["activation_scale"] = scale
    activation: Activation | None
    if layer.weight_method == "given" and given is not None:
        decided = given.layer_policy(linear, measured, rule)
        activation, rule_reason = decided.activation, decided.reason
    else:
        activation, rule_reason = tier_from_absmax(measured, rule, linear)
    if layer.activation != activation and layer.reason.startswith((RULE_REASON_START, rule_reason)):
        update["reason"] = f"{_BY_HAND} to {layer.activation or layer.precision}; by the rule: {rule_reason}"
    if layer.reason.startswith(AUTO_REASON_START) and not layer.reason.startswith(f"{AUTO_REASON_START}{layer.runs}:"):
        update["reason"] = f"{_BY_HAND} to {layer.runs}; {layer.reason}"
    return layer.model_copy(update=update)


def _float_layer(layer: LayerPolicy) -> LayerPolicy:
    if not layer.reason.startswith((RULE_REASON_START, AUTO_REASON_START)):
        return layer
    return layer.model_copy(update={"reason": f"{_BY_HAND}: keeps the float precision"})
