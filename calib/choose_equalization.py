"""The equalization table of a policy: an entry for every fold site that the chosen equalizer takes on."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calib.equalizers import SiteStatistics, scale_from_formula
from calib.given import GivenWeights
from calib.graph_weights import GraphWeights
from calib.hessians import Hessians
from calib.linears import LinearWeights
from calib.search_equalization import Consumer, SiteProblem, site_error
from calib.site_scales import rms_from_hessian, site_absmax, weight_absmax
from fptq_export.errors import UserError
from fptq_export.policy import Equalizer, Policy, SiteEqualization
from fptq_export.progress import Progress
from fptq_export.sites import FoldSite, Sites

__all__ = ["EqualizationTable", "EqualizerOptions", "choose_equalization"]

_RATIOS = tuple(step / 20 for step in range(1, 20))
"""The grid of AWQ's code is 0 to 0.95; 0 is no equalization."""
_ALPHAS = tuple(step / 20 for step in range(21))
_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the LAE scale, and of the root mean square. Steps half as wide did not lower SmolLM2's perplexity."""
_LARGEST_SUM = 1.25
"""Of both exponents: beyond it channels are no longer made equal but turned around."""


@dataclass(frozen=True)
class EqualizerOptions:
    """Which equalizer runs.

    Raises:
        UserError: The exponent is out of range.
    """

    equalizer: Equalizer = "paper"
    smoothquant_alpha: float | None = 0.5
    """Exponent of the activations; None searches it site by site. The default is the paper's."""

    def __post_init__(self) -> None:
        alpha = self.smoothquant_alpha
        if alpha is not None and not 0.0 <= alpha <= 1.0:
            raise UserError("--smoothquant-alpha", f"{alpha:g} is not between 0 and 1", "give 0.5, or auto")

    @property
    def needs_hessian(self) -> bool:
        """Whether choosing needs mean x x^T."""
        searched_alpha = self.equalizer == "smoothquant" and self.smoothquant_alpha is None
        return self.equalizer in ("awq", "search") or searched_alpha

    @property
    def folds_everywhere(self) -> bool:
        """Whether sites are chosen here, and not by the thresholds of the rule."""
        return self.equalizer not in ("paper", "none")

    def check_given(self, given: GivenWeights | None) -> None:
        """Refuse to equalize a model that came with INT4 codes. Raises UserError."""
        if given is not None and self.folds_everywhere:
            cause = f"would change the INT4 codes of the {given.format} checkpoint"
            raise UserError(f"--equalizer {self.equalizer}", cause, "use paper or none, or a float model")


@dataclass(frozen=True)
class EqualizationTable:
    """What was chosen."""

    entries: Mapping[str, SiteEqualization]
    """By site id; a site without an entry stays as it is."""
    rms: Mapping[str, NDArray[np.float32]]
    """Root mean squares of sites whose s needs them, float32 [channels]."""


def choose_equalization(
    policy: Policy,
    sites: Sites,
    maxima: Mapping[str, NDArray[np.float32]],
    weights: LinearWeights | GraphWeights,
    options: EqualizerOptions,
    hessians: Path | None,
    progress: Progress,
) -> EqualizationTable:
    """Choose for every fold site that a quantized layer reads, unless no token of calibration reached it.

    Args:
        policy: Complete but for the equalization: tiers, group sizes, kinds of scales.
        sites: Fold sites.
        maxima: Linear path -> channel maxima, float32 [in].
        weights: Read one at a time.
        options: The equalizer.
        hessians: `hessians.safetensors`, where the equalizer needs it.
        progress: Reports sites.

    Raises:
        UserError: The Hessians are needed and not there.
    """
    entries: dict[str, SiteEqualization] = {}
    rms: dict[str, NDArray[np.float32]] = {}
    if options.folds_everywhere:
        quantized = policy.quantized()
        chosen = [site for site in sites.fold_sites if _is_known(site, quantized, maxima)]
        stored = _open_hessians(options, hessians, sites)
        with progress.task("choose equalization", len(chosen), unit="sites") as task:
            for site in chosen:
                if stored is None:
                    entries[site.id] = _fixed_entry(options)
                else:
                    entry, measured = _searched_entry(site, policy, maxima, weights, options, stored)
                    if entry is not None:
                        entries[site.id], rms[site.id] = entry, measured
                task.advance()
    return EqualizationTable(entries, rms)


def _is_known(site: FoldSite, quantized: Container[str], maxima: Mapping[str, NDArray[np.float32]]) -> bool:
    return any(path in quantized and maxima[path].any() for path in site.consumers)


def _open_hessians(options: EqualizerOptions, path: Path | None, sites: Sites) -> Hessians | None:
    if not options.needs_hessian:
        return None
    if path is None:
        raise UserError(f"--equalizer {options.equalizer}", "needs Hessians of the inputs", "calibrate with it")
    return Hessians(path, sites)


def _fixed_entry(options: EqualizerOptions) -> SiteEqualization:
    if options.equalizer == "smoothquant":
        return SiteEqualization(method="smoothquant", alpha=options.smoothquant_alpha)
    return SiteEqualization(method="lae")


def _searched_entry(
    site: FoldSite,
    policy: Policy,
    maxima: Mapping[str, NDArray[np.float32]],
    weights: LinearWeights | GraphWeights,
    options: EqualizerOptions,
    hessians: Hessians,
) -> tuple[SiteEqualization | None, NDArray[np.float32]]:
    """The candidate of least error, or None where none beats s = 1; and the site's root mean squares."""
    quantized = policy.quantized()
    readers = [path for path in site.consumers if path in quantized]
    hessian = hessians.read_sum(readers)
    absmax, rms = site_absmax(site, policy, maxima), rms_from_hessian(hessian)
    consumers = [
        Consumer(weights.read(path), layer.group_size, layer.signed_scales, layer.activation == "static")
        for path in readers
        if (layer := quantized[path]).group_size is not None
    ]
    of_weights = weight_absmax(site, policy, weights.read) if options.equalizer == "smoothquant" else None
    problem, statistics = SiteProblem(consumers, hessian, absmax), SiteStatistics(absmax, of_weights, rms)
    static_input = options.equalizer != "awq"
    before = site_error(problem, np.ones_like(absmax), static_input=static_input)
    best: SiteEqualization | None = None
    least = before
    for entry in _candidates(options):
        s = site.tied(scale_from_formula(entry, statistics))
        error = site_error(problem, s, static_input=static_input)
        if error < least:
            best, least = entry, error
    if best is None:
        return None, rms
    reason = f"{_described(best)} leaves {least / before:.3f} of the error without equalization"
    return best.model_copy(update={"reason": reason}), rms


def _candidates(options: EqualizerOptions) -> Iterator[SiteEqualization]:
    if options.equalizer == "smoothquant":
        yield from (SiteEqualization(method="smoothquant", alpha=alpha) for alpha in _ALPHAS)
    elif options.equalizer == "awq":
        yield from (SiteEqualization(method="awq", ratio=ratio) for ratio in _RATIOS)
    else:
        for of_lae, of_rms in product(_EXPONENTS, _EXPONENTS):
            if 0.0 < of_lae + of_rms <= _LARGEST_SUM:
                yield SiteEqualization(method="search", lae_exponent=of_lae, rms_exponent=of_rms)


def _described(entry: SiteEqualization) -> str:
    fields = entry.model_dump(exclude={"method", "reason"}, exclude_none=True)
    return ", ".join(f"{name} {value:g}" for name, value in fields.items())
