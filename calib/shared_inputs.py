"""Statistics of tensors that experts read: each expert saw the tokens that chose it, the tensor has all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import reduce

import numpy as np

from calib.histograms import Histogram
from calib.stats import Stats
from fptq_export.sites import Linear, Sites

__all__ = ["stats_of_tensors", "was_reached"]


def stats_of_tensors(stats: Stats, sites: Sites) -> Stats:
    """Let linears that read one tensor know what all of them saw, so that one INT8 scale and one equalization fit all.

    Only tensors that experts read change: other linears see all tokens anyway. A linear of an expert that no token
    chose keeps its zeros: that nothing is known of it must not be lost. A second call changes nothing.
    """
    maxima, histograms = dict(stats.channel_absmax), dict(stats.histograms)
    for readers in _read_by_experts(sites):
        known = [linear for linear in readers if was_reached(linear, stats)]
        if not known:
            continue
        absmax = np.maximum.reduce([stats.channel_absmax[linear.path] for linear in known])
        maxima.update({linear.path: absmax for linear in known})
        if all(linear.path in histograms for linear in known):
            counted = reduce(Histogram.merge, (stats.histograms[path] for path in _one_for_each_expert(known)))
            histograms.update({linear.path: counted for linear in known})
    return replace(stats, channel_absmax=maxima, histograms=histograms)


def was_reached(linear: Linear, stats: Stats) -> bool:
    """Whether a token reached a linear that was measured. A linear of no expert is reached by all."""
    absmax = stats.channel_absmax.get(linear.path)
    return absmax is not None and (linear.expert is None or bool(absmax.any()))


def _read_by_experts(sites: Sites) -> Iterable[list[Linear]]:
    readers: dict[str, list[Linear]] = {}
    for linear in sites.linears:
        readers.setdefault(linear.input, []).append(linear)
    return [group for group in readers.values() if len({linear.expert for linear in group}) > 1]


def _one_for_each_expert(linears: Iterable[Linear]) -> Iterable[str]:
    return {linear.expert: linear.path for linear in linears}.values()
