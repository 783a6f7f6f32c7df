"""A run directory, opened for a diagnosis: graph, policy, float model, text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calib.batches import TextOptions, TokenBatches, evaluation_batches
from calib.documents import needs_tokenizer
from calib.equalize import LinearScales, scales_from_sites
from calib.load import Checkpoint, tokenizer_from_checkpoint
from fptq_export.debug.graph_linears import GraphLinear, linears_of_graph
from fptq_export.debug.options import DebugOptions
from fptq_export.debug.segments import graph_of_run
from fptq_export.equalized_inputs import EqualizedInputs
from fptq_export.errors import UserError
from fptq_export.graph_io import data_path
from fptq_export.package.manifest import FileRecord, Manifest, manifest_of_run, record_from_file
from fptq_export.pipeline.models import RunModels
from fptq_export.pipeline.onnx_options import is_onnx_model
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.task_options import check_length
from fptq_export.policy import PolicyArrays, arrays_path, read_policy
from fptq_export.progress import Progress
from fptq_export.sites import Sites, read_sites
from fptq_export.tasks import CAUSAL_LM

__all__ = ["OpenedRun", "open_run"]


@dataclass(frozen=True)
class OpenedRun:
    """What is compared."""

    directory: RunDirectory
    changed_files: tuple[str, ...]
    """Files that are not what the manifest says."""
    checkpoint: Checkpoint
    """The float model that was quantized; rotated where the run rotates."""
    arrays: PolicyArrays
    sites: Sites
    inputs: EqualizedInputs
    """What calibration saw, in the scale of the graph."""
    graph: ir.Model
    """`model.w4a8.onnx`, in the form that gives the logits of every token."""
    linears: Mapping[str, GraphLinear]
    folded: Mapping[str, LinearScales]
    """How equalization changes linears; those that it does not are absent."""
    batches: TokenBatches

    def in_graph_scale(self, path: str, x: NDArray[np.float32]) -> NDArray[np.floating]:
        """The float model's input of a linear as the graph would hold it: divided by s, in the graph's type."""
        s = self.folded.get(path, LinearScales()).input
        with np.errstate(over="ignore"):
            return (x if s is None else x / s).astype(self.linears[path].dtype.numpy())


def open_run(options: DebugOptions, progress: Progress) -> OpenedRun:
    """Open everything and read no weight.

    Raises:
        UserError: It is no finished run of a causal language model, in a type that ONNX Runtime runs on a CPU.
    """
    manifest = _manifest(options)
    run = RunDirectory(options.source)
    policy, sites = read_policy(run.policy), read_sites(run.sites)
    check_length("--seq", options.seq, sites)
    graph = graph_of_run(run.w4a8)
    checkpoint = RunModels(manifest.options, run, progress).quantized
    if checkpoint.task != CAUSAL_LM:
        raise _unsupported(options, "is no causal language model")
    arrays = PolicyArrays(arrays_path(run.policy))
    equalization = {site: arrays.read(f"{site}.equalization") for site in policy.equalized_sites()}
    linears = linears_of_graph(graph, policy)
    if not linears:
        raise UserError(str(run.policy), "quantizes no layer", "there is nothing to find")
    tokenizer = tokenizer_from_checkpoint(checkpoint) if needs_tokenizer(options.text) else None
    text = TextOptions(options.text, options.windows, options.seq, manifest.options.seed)
    return OpenedRun(
        directory=run,
        changed_files=_changed_files(run, manifest),
        checkpoint=checkpoint,
        arrays=arrays,
        sites=sites,
        inputs=EqualizedInputs(policy, arrays, sites),
        graph=graph,
        linears=linears,
        folded=scales_from_sites(sites, policy.equalized_sites(), equalization),
        batches=evaluation_batches(text, tokenizer, checkpoint.config.get_text_config().vocab_size),
    )


def _manifest(options: DebugOptions) -> Manifest:
    manifest = manifest_of_run(options.source)
    if is_onnx_model(manifest.options):
        raise _unsupported(options, "is the run of an ONNX graph, which has no blocks")
    if manifest.options.dtype == "bf16":
        raise _unsupported(options, "is in BF16, for which ONNX Runtime has no kernels on a CPU")
    return manifest


def _unsupported(options: DebugOptions, cause: str) -> UserError:
    return UserError(str(options.source), cause, "fptq-export verify DIR compares what it can as a whole")


def _changed_files(run: RunDirectory, manifest: Manifest) -> tuple[str, ...]:
    records = {file.path: file for stage in manifest.stages.values() for file in stage.outputs}
    paths = (run.sites, run.policy, arrays_path(run.policy), run.w4a8, data_path(run.w4a8))
    return tuple(path.name for path in paths if _is_changed(path, run.path, records))


def _is_changed(path: Path, directory: Path, records: Mapping[str, FileRecord]) -> bool:
    known = records.get(path.name)
    return known is not None and record_from_file(path, directory).sha256 != known.sha256
