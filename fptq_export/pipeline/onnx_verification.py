"""Accuracy of a graph's run: the file that the user gave against the quantized graph, both in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from fptq_export.observe.data import GraphData
from fptq_export.progress import Progress
from fptq_export.verify.compare_graphs import compare_graphs
from fptq_export.verify.graph_report import GraphReport
from fptq_export.verify.graph_session import OnnxGraphSession, session_of_user_graph

__all__ = ["verify_onnx"]


def verify_onnx(source: Path, w4a8: Path, data: GraphData, progress: Progress, *, held_out: bool) -> GraphReport:
    """Compare every output on every batch.

    Args:
        source: The user's file, as it was given: upgrading and folding are proven with it.
        w4a8: The quantized graph.
        data: Batches.
        progress: Where to report.
        held_out: Whether calibration did not see the data.
    """
    reference, candidate = session_of_user_graph(source), OnnxGraphSession(w4a8)
    with progress.task("Comparing outputs", total=data.count, unit="batches") as task:
        outputs = compare_graphs(reference, candidate, reference.outputs, data.batches(), task)
    return GraphReport(
        reference=reference.name,
        candidate=candidate.name,
        data=data.description,
        held_out=held_out,
        batches=data.count,
        outputs=outputs,
    )
