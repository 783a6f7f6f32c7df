"""Run an instrumented graph on calibration data and keep maxima over all batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.graph_io import load_graph
from fptq_export.observe.data import Batch, GraphData
from fptq_export.observe.instrument import WatchedTensor, instrument_graph
from fptq_export.progress import Progress, Task

__all__ = ["GramSink", "OpenGraph", "RunningGraph", "observe_graph"]

GramSink = Callable[[str, NDArray[np.float32]], None]
"""Takes the name of a tensor and mean x x^T over its rows, float32 [channels, channels], as soon as it is complete."""
_GRAM_BYTES = 1 << 30
"""Of the matrices in memory; more of them are several passes over the data."""


class RunningGraph(Protocol):
    """A graph that runs."""

    def run(self, outputs: Sequence[str], batch: Batch) -> list[NDArray[Any]]:
        """Arrays of these outputs. Raises UserError where the graph cannot run on the batch."""


OpenGraph = Callable[[Path, bytes], RunningGraph]
"""Opens a serialized graph whose weights lie beside a path."""


@dataclass
class _Sums:
    """What is known of a tensor so far."""

    absmax: NDArray[np.float32]
    gram: NDArray[np.float64] | None = None
    rows: int = 0


def observe_graph(
    path: Path,
    watched: Sequence[WatchedTensor],
    data: GraphData,
    open_graph: OpenGraph,
    progress: Progress,
    on_gram: GramSink | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Largest magnitudes of tensors, by channel where that is asked for.

    Args:
        path: A prepared graph.
        watched: Tensors of it, each once.
        data: Batches.
        open_graph: Opens the graphs that are run.
        progress: Reports batches.
        on_gram: Where mean x x^T goes, for the tensors that want it.

    Returns:
        Name -> float32 [channels], or [1] for tensors without channels.

    Raises:
        UserError: A tensor is NaN or infinite, or the graph cannot run on the data.
    """
    groups = list(_groups(watched))
    absmax: dict[str, NDArray[np.float32]] = {}
    with progress.task("calibrate", data.count * len(groups), unit="batches") as task:
        for group in groups:
            sums = _observe_group(path, group, data, open_graph, task)
            absmax.update({name: found.absmax for name, found in sums.items()})
            for name, found in sums.items():
                if found.gram is not None and on_gram is not None:
                    on_gram(name, (found.gram / max(found.rows, 1)).astype(np.float32))
    return absmax


def _groups(watched: Sequence[WatchedTensor]) -> Iterator[list[WatchedTensor]]:
    """Tensors that are watched in one pass: all of them, unless their matrices are too large together."""
    group: list[WatchedTensor] = []
    used = 0
    for tensor in watched:
        size = 8 * (tensor.channels or 0) ** 2 if tensor.gram else 0
        if group and used + size > _GRAM_BYTES:
            yield group
            group, used = [], 0
        group.append(tensor)
        used += size
    yield group


def _observe_group(
    path: Path, group: Sequence[WatchedTensor], data: GraphData, open_graph: OpenGraph, task: Task
) -> Mapping[str, _Sums]:
    model = load_graph(path)
    outputs = instrument_graph(model, group)
    graph = open_graph(path, ir.to_proto(model).SerializeToString())
    flat = [name for names in outputs for name in names]
    sums = {tensor.name: _Sums(np.zeros(tensor.channels or 1, np.float32)) for tensor in group}
    for number, batch in enumerate(data.batches()):
        arrays = dict(zip(flat, graph.run(flat, batch), strict=True))
        for tensor, names in zip(group, outputs, strict=True):
            _add(sums[tensor.name], tensor.name, [arrays[name] for name in names], f"{data.name}, batch {number}")
        task.advance()
    return sums


def _add(sums: _Sums, name: str, arrays: Sequence[NDArray[Any]], where: str) -> None:
    absmax, total, *gram = arrays
    if not np.isfinite(total):
        cause = f"tensor {name!r} is NaN or infinite"
        raise UserError(where, cause, "check the data; if it is fine, the model overflows on it: use other data")
    sums.absmax = np.maximum(sums.absmax, absmax)
    if gram:
        products, rows = gram
        sums.gram = products.astype(np.float64) if sums.gram is None else sums.gram + products
        sums.rows += int(rows[0])
