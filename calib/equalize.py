"""Equalization: what the scales s of a policy's sites do to weights and to INT8 scales.

x' = x / s and W' = W s leave x W^T as it is, for any positive s (`equalizers` has the formulas). The division is folded
into whatever produces x. For a `norm` site that is the norm; for others it is a linear, whose output rows (and bias)
are divided.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fptq_export import numerics
from fptq_export.policy import SiteEqualization
from fptq_export.sites import FoldSite, Sites

__all__ = [
    "LinearScales",
    "closed_form_scale",
    "equalized_weight",
    "scale_after_equalization",
    "scales_from_sites",
]


def closed_form_scale(absmax: float, *, equalized: bool) -> float:
    """INT8 scale of an input whose largest magnitude was `absmax`: v / 127, or log2(2 + v) / 127 after equalization."""
    return float(numerics.static_scale(numerics.equalized_absmax(absmax) if equalized else absmax))


def scale_after_equalization(
    channel_absmax: NDArray[np.float32], entry: SiteEqualization | None, s: NDArray[np.float32] | None
) -> float:
    """INT8 scale of a static input.

    Args:
        channel_absmax: m, largest magnitude of each channel before equalization, float32 [in].
        entry: How the site is equalized; None where it is not.
        s: Its scales, float32 [in]; needed for methods other than LAE, which has a closed form.

    Returns:
        max_j(m_j / s_j) / 127.
    """
    if entry is None or entry.method == "lae":
        return closed_form_scale(float(channel_absmax.max()), equalized=entry is not None)
    if s is None:
        raise RuntimeError(f"the scale after {entry.method} needs s")
    return closed_form_scale(float((channel_absmax.astype(np.float64) / s).max()), equalized=False)


@dataclass(frozen=True)
class LinearScales:
    """How equalization changes one linear; float32, None where it does not."""

    input: NDArray[np.float32] | None = None
    """[in]: columns of the weight [out, in] are multiplied by it."""
    output: NDArray[np.float32] | None = None
    """[out]: rows of the weight, and the bias, are divided by it."""


def scales_from_sites(
    sites: Sites, equalized: Iterable[str], equalization: Mapping[str, NDArray[np.float32]]
) -> dict[str, LinearScales]:
    """Scales of every linear that an equalized site touches.

    Args:
        sites: Fold sites of the graph.
        equalized: Ids of the sites that the policy equalizes.
        equalization: Site id -> s, float32 [channels].

    Returns:
        Linear path -> its scales. Linears that no site touches are absent. Consumers that stay float are present:
        they read the equalized tensor too.
    """
    scales: dict[str, LinearScales] = {}
    for site_id in equalized:
        site, s = sites.site(site_id), equalization[site_id]
        for path in site.consumers:
            scales[path] = LinearScales(input=s, output=scales.get(path, LinearScales()).output)
        if site.producer_linear is not None:
            before = scales.get(site.producer_linear, LinearScales())
            output = _row_scale(site, s, sites)
            if before.output is not None:  # another part of the same matrix
                output = output * before.output
            scales[site.producer_linear] = LinearScales(input=before.input, output=output)
    return scales


def _row_scale(site: FoldSite, s: NDArray[np.float32], sites: Sites) -> NDArray[np.float32]:
    """What the rows of a site's producing linear are divided by, float32 [out]: 1 outside the site's part of it."""
    span, scale = site.producers[0].span, site.producer_scale(s)
    if span is None or site.producer_linear is None:
        return scale
    rows = np.ones(sites.linear(site.producer_linear).out_features, np.float32)
    rows[slice(*span)] = scale
    return rows


def equalized_weight(weight: torch.Tensor, scales: LinearScales) -> torch.Tensor:
    """W' = W s_input / s_output, one float32 rounding each: [out, in] -> [out, in]."""
    if scales.input is not None:
        weight = weight * torch.from_numpy(scales.input)
    if scales.output is not None:
        weight = weight / torch.from_numpy(scales.output)[:, None]
    return weight
