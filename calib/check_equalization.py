"""What can be wrong with the equalization table of an edited policy, and with input scales that it outdates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from calib.equalize import closed_form_scale, scale_after_equalization
from calib.equalizers import NEEDS_RMS
from fptq_export.errors import Problem
from fptq_export.files import json_path_from_location
from fptq_export.policy import Policy, SiteEqualization
from fptq_export.sites import FoldSite, Sites

__all__ = ["outdated_code_problems", "outdated_scale_problems", "table_problems"]

_ROUNDINGS = 2.0**-18
"""Relative difference of scales that another machine computed: a few float32 operations, powers among them."""

Maxima = Mapping[str, NDArray[np.float32]]


def table_problems(policy: Policy, sites: Sites, maxima: Maxima, rms: Collection[str]) -> Iterator[Problem]:
    """List entries of the table that cannot be carried out.

    Args:
        policy: As read from the file.
        sites: Fold sites of the traced graph.
        maxima: Linear path -> stored channel maxima.
        rms: Ids of the sites whose root mean squares are known.

    Yields:
        One problem for each wrong entry.
    """
    known = {site.id: site for site in sites.fold_sites}
    for site_id, entry in policy.equalization.items():
        if site_id not in known:
            yield _problem(site_id, "", "the traced model has no such fold site")
            continue
        if entry.method in NEEDS_RMS and site_id not in rms:
            cause = "needs the root mean squares of its input, which are neither in policy.safetensors nor in"
            yield _problem(site_id, "method", f"{entry.method} {cause} hessians.safetensors; choose lae or smoothquant")
        yield from _site_problems(known[site_id], entry, policy, maxima)


def _site_problems(site: FoldSite, entry: SiteEqualization, policy: Policy, maxima: Maxima) -> Iterator[Problem]:
    quantized = policy.quantized()
    readers = [path for path in site.consumers if path in quantized]
    if not any(path in maxima for path in readers):
        yield _problem(site.id, "", "no quantized layer reads it: remove the entry")
    for path in readers:
        if quantized[path].activation == "lae_static" and entry.method != "lae":
            cause = f"is lae_static, but its site {site.id} is equalized by {entry.method}: set it to static"
            yield Problem(json_path_from_location(("layers", path, "activation")), cause)
    for path in (*readers, *filter(None, [site.producer_linear])):
        if path in quantized and quantized[path].weight_method == "given":
            yield _problem(site.id, "", f"equalization would change the given codes of {path}: remove the entry")


def outdated_scale_problems(
    policy: Policy,
    sites: Sites,
    maxima: Maxima,
    now: Mapping[str, NDArray[np.float32]],
    before: Mapping[str, NDArray[np.float32]],
) -> Iterator[Problem]:
    """List input scales that belong to another equalization than the table has now.

    Args:
        policy: As read from the file, without other problems.
        sites: Fold sites of the traced graph.
        maxima: Linear path -> stored channel maxima.
        now: Site id -> s as the table says.
        before: Site id -> s as stored.

    Yields:
        One problem for each static layer whose scale follows from s before, or from no s, but not from s now.
    """
    entries, sites_read = policy.equalizations(), sites.site_by_consumer()
    for path, layer in policy.quantized().items():
        site, scale = sites_read.get(path), layer.activation_scale
        if site is None or scale is None or layer.activation != "static" or not (site in now or site in before):
            continue
        m = maxima[path]
        own = scale_after_equalization(m, entries.get(site), now.get(site))
        others = {closed_form_scale(float(m.max()), equalized=equalized) for equalized in (False, True)}
        if site in before:
            others.add(closed_form_scale(float((m.astype(np.float64) / before[site]).max()), equalized=False))
        if scale != own and scale in others:
            cause = f"is not the scale after this equalization of {site}, but an earlier one: set it to null"
            yield Problem(json_path_from_location(("layers", path, "activation_scale")), cause)


def outdated_code_problems(
    policy: Policy, sites: Sites, now: Mapping[str, NDArray[np.float32]], before: Mapping[str, NDArray[np.float32]]
) -> Iterator[Problem]:
    """List layers whose stored codes are to be kept though they belong to another equalization.

    Args:
        policy: As read from the file, without other problems.
        sites: Fold sites of the traced graph.
        now: Site id -> s as the table says.
        before: Site id -> s as stored.

    Yields:
        One problem for each `sequential` layer that reads or produces a site whose s is not the stored one.
    """
    for site in sites.fold_sites:
        if _same_scales(now.get(site.id), before.get(site.id)):
            continue
        for path in (*site.consumers, *filter(None, [site.producer_linear])):
            layer = policy.layers.get(path)
            if layer is not None and layer.sequential is not None:
                cause = f"its stored codes belong to another equalization of {site.id}; to quantize it anew, remove it"
                yield Problem(json_path_from_location(("layers", path, "sequential")), cause)


def _same_scales(now: NDArray[np.float32] | None, before: NDArray[np.float32] | None) -> bool:
    if now is None or before is None:
        return now is before
    return bool(np.allclose(now, before, rtol=_ROUNDINGS, atol=0.0))


def _problem(site_id: str, field: str, message: str) -> Problem:
    location = ("equalization", site_id, field) if field else ("equalization", site_id)
    return Problem(json_path_from_location(location), message)
