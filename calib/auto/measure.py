"""What there is to choose for every linear of a model, with figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calib.auto.candidates import (
    Candidate,
    LinearProblem,
    candidates_from_linear,
    figures_from_candidates,
    figures_without_probe,
)
from calib.auto.choose import LinearChoice
from calib.auto.cost import DecodeCost
from calib.auto.probe import Probe
from calib.decide import PolicyOptions
from calib.equalize import LinearScales, closed_form_scale, scale_after_equalization, scales_from_sites
from calib.equalizers import SiteStatistics, scale_from_formula
from calib.hessians import Hessians
from calib.linears import LinearWeights
from calib.load import Checkpoint
from calib.shared_inputs import was_reached
from calib.site_scales import SiteScales, site_absmax
from calib.stats import Stats
from calib.weights import WEIGHT_METHODS
from fptq_export.errors import UserError
from fptq_export.policy import Policy, SiteEqualization
from fptq_export.progress import Progress
from fptq_export.sites import Linear, Sites

__all__ = ["SMALLEST_GROUP", "Measured", "candidates_of", "choices_from_probes", "static_scale_of"]

SMALLEST_GROUP = 32
"""Smaller groups cost more than they win: at 16, a byte of every five is a scale."""


@dataclass(frozen=True)
class Measured:
    """What calibration knows of a model."""

    sites: Sites
    stats: Stats
    checkpoint: Checkpoint
    hessians: Path | None
    """`hessians.safetensors`, where the weight method needs it."""


def choices_from_probes(
    measured: Measured,
    paper: Policy,
    scales: SiteScales,
    probes: Mapping[str, Probe],
    options: PolicyOptions,
    cost: DecodeCost,
    progress: Progress,
) -> dict[str, LinearChoice]:
    """Measure every candidate of every linear that the paper's policy quantizes.

    Args:
        measured: The model, and what calibration knows of it.
        paper: The policy to compare with. What its equalization table says holds for every candidate.
        scales: s of its equalized sites.
        probes: Of every linear.
        options: Weight method and signs of scales.
        cost: Time of a candidate.
        progress: Reports layers.

    Raises:
        UserError: A linear was not probed, or a weight cannot be quantized.
    """
    weights = LinearWeights.from_checkpoint(measured.checkpoint)
    needs_hessian = WEIGHT_METHODS[options.weight_method].needs_hessian
    hessians = Hessians(measured.hessians, measured.sites) if needs_hessian and measured.hessians else None
    touched = scales_from_sites(measured.sites, paper.equalization, scales.equalization)
    quantized = paper.quantized()

    def problem_of(linear: Linear) -> LinearProblem:
        path = linear.path
        return LinearProblem(
            linear=linear,
            probe=probes[path],
            weight=weights.read(path),
            hessian=hessians.read(path) if hessians is not None else None,
            lae=_lae(linear, measured, paper),
            static_scale=static_scale_of(measured, paper, scales, path),
            absmax=quantized[path].input_absmax or 0.0,
            weight_method=options.weight_method,
            signed_scales=options.signed_scales,
        ).equalized(touched.get(path, LinearScales()))

    choices: dict[str, LinearChoice] = {}
    with progress.task("measure candidates", len(quantized), unit="layers") as task:
        for path in quantized:
            linear = measured.sites.linear(path)
            if path not in probes and linear.expert is None:
                cause = "never ran on the probed text"
                raise UserError(f"layer {path}", cause, "calibrate on more text, or exclude it")
            candidates = candidates_of(measured, paper, path)
            seconds = [cost(linear, candidate) for candidate in candidates]
            try:
                figures = (
                    figures_from_candidates(problem_of(linear), candidates, seconds)
                    if path in probes
                    else figures_without_probe(linear, candidates, seconds)
                )
            except ValueError as error:
                hint = "calibrate on more text, or use another --weight-method"
                raise UserError(f"layer {path}", f"{options.weight_method} failed: {error}", hint) from error
            # An expert that calibration did not reach is quantized token by token, whatever others that read x do.
            tensor = linear.input if was_reached(linear, measured.stats) else path
            choices[path] = LinearChoice(figures, linear.in_features * linear.out_features, tensor)
            task.advance()
    return choices


def static_scale_of(measured: Measured, paper: Policy, scales: SiteScales, path: str) -> float:
    """INT8 scale of a linear's input if it is `static`: that of the paper's policy, or what it would have there."""
    layer = paper.layers[path]
    if layer.activation == "static" and layer.activation_scale is not None:
        return layer.activation_scale
    site = measured.sites.site_by_consumer().get(path, "")
    entry, s = paper.equalization.get(site), scales.equalization.get(site)
    if entry is None:
        return closed_form_scale(layer.input_absmax or 0.0, equalized=False)
    return scale_after_equalization(measured.stats.channel_absmax[path], entry, s)


def candidates_of(measured: Measured, paper: Policy, path: str) -> tuple[Candidate, ...]:
    """What a linear could run, among it what the paper's policy says; that alone where `--precision` chose already."""
    layer = paper.layers[path]
    if layer.precision != "w4a8":
        return (Candidate(layer.precision, layer.activation, layer.group_size),)
    size = layer.group_size or SMALLEST_GROUP
    linear = measured.sites.linear(path)
    every = candidates_from_linear(linear, min(SMALLEST_GROUP, size), lae=_may_have_lae(linear, paper))
    if was_reached(linear, measured.stats):
        return tuple(every)
    return tuple(candidate for candidate in every if candidate.activation == "per_token")


def _may_have_lae(linear: Linear, paper: Policy) -> bool:
    """Whether the tier `lae_static` is open: any other `--equalizer` has decided about the fold sites."""
    return linear.site is not None and paper.rule.equalizer == "paper"


def _lae(linear: Linear, measured: Measured, paper: Policy) -> NDArray[np.float32] | None:
    if linear.site is None or not _may_have_lae(linear, paper):
        return None
    absmax = site_absmax(measured.sites.site(linear.site), paper, measured.stats.channel_absmax)
    return scale_from_formula(SiteEqualization(method="lae"), SiteStatistics(absmax=absmax))
