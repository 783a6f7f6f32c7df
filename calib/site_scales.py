"""s of every equalized fold site of a policy, from what is stored: channel maxima, root mean squares, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from calib.equalizers import NEEDS_RMS, SiteStatistics, scale_from_formula
from fptq_export.policy import Policy
from fptq_export.sites import FoldSite, Sites

__all__ = ["SiteScales", "rms_from_hessian", "scales_of_policy", "site_absmax", "weight_absmax"]

Maxima = Mapping[str, NDArray[np.float32]]
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class SiteScales:
    """Arrays of the equalized sites of a policy, by site id; float32 [channels]."""

    equalization: Mapping[str, Vector] = field(default_factory=dict)
    """s."""
    rms: Mapping[str, Vector] = field(default_factory=dict)
    """Root mean square of the site's tensor, where s is computed from it."""


def scales_of_policy(
    policy: Policy,
    sites: Sites,
    maxima: Maxima,
    read_weight: Callable[[str], torch.Tensor],
    rms: Mapping[str, Vector],
) -> SiteScales:
    """Compute s of every equalized site.

    Args:
        policy: Says which sites are equalized and how. Each has a quantized consumer.
        sites: Fold sites.
        maxima: Linear path -> channel maxima, float32 [in].
        read_weight: Linear path -> float32 [out, in]; called where s depends on weights.
        rms: Site id -> root mean squares; needed where s depends on them.

    Raises:
        ValueError: A site's root mean squares are missing.
    """
    equalization = {}
    entries = policy.equalizations()
    for site_id, entry in entries.items():
        site = sites.site(site_id)
        statistics = SiteStatistics(
            absmax=site_absmax(site, policy, maxima),
            weight_absmax=weight_absmax(site, policy, read_weight) if entry.method == "smoothquant" else None,
            rms=rms.get(site_id),
        )
        equalization[site_id] = site.tied(scale_from_formula(entry, statistics))
    used = {site_id: rms[site_id] for site_id, entry in entries.items() if entry.method in NEEDS_RMS}
    return SiteScales(equalization, used)


def site_absmax(site: FoldSite, policy: Policy, maxima: Maxima) -> Vector:
    """Channel maxima of the site's tensor, float32 [channels].

    They are the largest over the site's quantized consumers. These read one tensor, so their maxima are the same.
    """
    quantized = policy.quantized()
    result: Vector = np.maximum.reduce([maxima[path] for path in site.consumers if path in quantized])
    return result


def weight_absmax(site: FoldSite, policy: Policy, read_weight: Callable[[str], torch.Tensor]) -> Vector:
    """Largest |W_ij| of each input channel over all rows of the site's quantized consumers: float32 [channels].

    Rows that another site divides count as the checkpoint has them, so that no site depends on another.
    """
    quantized = policy.quantized()
    columns = [read_weight(path).abs().amax(dim=0) for path in site.consumers if path in quantized]
    result: Vector = torch.stack(columns).amax(dim=0).numpy()
    return result


def rms_from_hessian(hessian: torch.Tensor) -> Vector:
    """Root mean square of each channel from mean x x^T, float32 [in, in] -> [in]."""
    result: Vector = np.sqrt(hessian.diagonal().clamp(min=0.0).numpy())
    return result
