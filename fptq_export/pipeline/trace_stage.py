"""The stage that traces the model; of a language half, the embeddings that its graph reads are written beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptq_export.graph_io import data_path
from fptq_export.options import RunOptions
from fptq_export.pipeline.environment import library_versions
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.stages import Stage
from fptq_export.progress import Progress
from fptq_export.tasks import CAUSAL_LM, VLM_DECODER

if TYPE_CHECKING:
    from calib.load import Checkpoint

__all__ = ["trace_stage"]


def trace_stage(
    checkpoint: Checkpoint, weights: tuple[Path, ...], options: RunOptions, directory: RunDirectory, progress: Progress
) -> Stage:
    """Say what the graph of a run depends on and how it is made.

    Args:
        checkpoint: The model that is quantized.
        weights: Its files.
        options: Of the run.
        directory: Of the run.
        progress: Where tracing is reported.
    """
    reads_embeddings = checkpoint.task == VLM_DECODER

    def run() -> Mapping[str, Any]:
        from fptq_export.trace import trace

        sites = trace(
            checkpoint.config,
            {name: entry.stored for name, entry in checkpoint.tensors.items()},
            options.dtype,
            directory.model,
            directory.sites,
            progress,
            trust_remote_code=options.trust_remote_code,
            task=checkpoint.task,
        )
        if reads_embeddings:
            from calib.embeddings import write_embeddings

            with progress.task("Writing the embeddings", total=None):
                write_embeddings(checkpoint, options.dtype, directory.embeddings)
        return {"outside": sites.outside} if sites.outside else {}

    parts = {
        **options.model_dump(mode="json", include={"dtype"}),
        **({} if checkpoint.task == CAUSAL_LM else {"task": checkpoint.task}),
        "libraries": [library_versions()[name] for name in ("torch", "transformers")],
    }
    graph = (directory.model, data_path(directory.model), directory.sites)
    outputs = (*graph, directory.embeddings) if reads_embeddings else graph
    return Stage("trace", parts, weights, outputs, run)
