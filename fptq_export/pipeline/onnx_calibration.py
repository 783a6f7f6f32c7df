"""Statistics of a graph that the user gave: from what ONNX Runtime observes to the files of calibration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.hessians import hessian_writer, owners_from_sites
from calib.stats import Stats, write_stats
from fptq_export.observe.collect import GramSink, observe_graph
from fptq_export.observe.data import GraphData
from fptq_export.observe.instrument import WatchedTensor
from fptq_export.progress import Progress
from fptq_export.sites import Sites
from fptq_export.verify.graph_session import OnnxGraphSession

__all__ = ["calibrate_onnx"]


def calibrate_onnx(
    model: Path, sites: Sites, data: GraphData, stats: Path, hessians: Path | None, progress: Progress
) -> dict[str, Any]:
    """Measure what every layer that may be quantized reads.

    Args:
        model: The prepared graph.
        sites: Its layers.
        data: Batches.
        stats: Where the maxima go.
        hessians: Where mean x x^T of every distinct input goes; None where nobody needs it.
        progress: Where to report.

    Returns:
        Figures for the summary.

    Raises:
        UserError: The graph cannot run on the data, or a tensor is NaN or infinite.
    """
    linears = {linear.input: linear for linear in sites.linears}
    convolutions = {found.path: found.input for found in sites.convolutions if found.float_reason is None}
    watched = [WatchedTensor(name, linear.in_features, hessians is not None) for name, linear in linears.items()]
    watched += [WatchedTensor(name, None) for name in dict.fromkeys(convolutions.values()) if name not in linears]
    with _gram_sink(hessians, sites) as sink:
        absmax = observe_graph(model, watched, data, OnnxGraphSession, progress, sink)
    by_path = {linear.path: absmax[linear.input] for linear in sites.linears}
    by_path.update({path: absmax[name].max(keepdims=True) for path, name in convolutions.items()})
    write_stats(Stats(by_path, data.count, data.description), stats)
    return {"data": data.description, "batches": data.count}


@contextmanager
def _gram_sink(path: Path | None, sites: Sites) -> Iterator[GramSink | None]:
    """Writes the matrix of a tensor under the first linear that reads it."""
    if path is None:
        yield None
        return
    owners = owners_from_sites(sites, {linear.path for linear in sites.linears})
    owner_of = {linear.input: owners[linear.path] for linear in sites.linears}
    sizes = {owner_of[linear.input]: linear.in_features for linear in sites.linears}

    with hessian_writer(path, sizes) as write:

        def sink(name: str, gram: NDArray[np.float32]) -> None:
            write(owner_of[name], torch.from_numpy(gram))

        yield sink
