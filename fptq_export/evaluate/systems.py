"""The systems that can be evaluated: where their files are, and how each is opened."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from calib.fake_quant import apply_policy
from calib.load import Checkpoint, checkpoint_from_model, model_from_checkpoint
from calib.session import TorchCausalSession
from fptq_export.errors import UserError
from fptq_export.evaluate.models import LogitsModel, SessionModel
from fptq_export.evaluate.options import SYSTEMS, System
from fptq_export.graph_io import data_path
from fptq_export.package.manifest import FileRecord, Manifest, read_manifest, record_from_file
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.policy import arrays_path, read_policy
from fptq_export.progress import Progress
from fptq_export.sites import read_sites
from fptq_export.tasks import ENCODER, VLM_DECODER, is_half
from fptq_export.verify.embedding_session import OnnxEmbeddingSession
from fptq_export.verify.sessions import CausalSession, OnnxCausalSession

__all__ = ["RUNS", "Source", "chosen_systems", "graph_session", "opened_session", "opened_system", "source_from_option"]

RUNS: Mapping[System, str] = {
    "float": "torch, FP32",
    "fake-quant": "torch, FP32, with the policy's INT4 weights and INT8 activations (policy.json)",
    "onnx": "ONNX Runtime on the CPU (model.w4a8.onnx)",
}
_MISSING_HINTS: Mapping[System, str] = {
    "float": "",
    "fake-quant": "fptq-export MODEL -o DIR writes them",
    "onnx": "fptq-export rewrite DIR writes it",
}


@dataclass(frozen=True)
class Source:
    """A model, and the run directory that quantized it where there is one."""

    checkpoint: Checkpoint
    vocab_size: int
    """Rows of the embedding."""
    directory: RunDirectory | None
    manifest: Manifest | None

    def files(self, system: System) -> tuple[Path, ...]:
        """The files of the run directory that define a system."""
        if self.directory is None:
            return ()
        run = self.directory
        embeddings = (run.embeddings,) if self.checkpoint.task == VLM_DECODER else ()
        return {
            "float": (),
            "fake-quant": (run.policy, arrays_path(run.policy), run.sites),
            "onnx": (run.w4a8, data_path(run.w4a8), *embeddings),
        }[system]

    def problem(self, system: System) -> str | None:
        """Why a system cannot be had from here, or None."""
        if system == "float":
            return None
        if self.directory is None:
            return "a model has one system only; give the run directory that quantized it"
        missing = [path.name for path in self.files(system) if not path.is_file()]
        if missing:
            return f"{self.directory.path} has no {', '.join(missing)}; {_MISSING_HINTS[system]}"
        return None

    def hashes(self, system: System) -> dict[str, str]:
        """SHA-256 of the files behind a system, with the model's own weights, by the name the manifest gives them.

        Raises:
            UserError: One is not what the run wrote or read: figures would be those of a mixture.
        """
        if self.directory is None or self.manifest is None:
            return {}
        stages, known = self.manifest.stages, _records(self.manifest)
        if system == "onnx" and "rewrite" in stages:
            _check_graph_is_of_these_files(self.directory.w4a8, stages["rewrite"].inputs, known)
        weights = stages["trace"].inputs if system != "onnx" and "trace" in stages else ()
        names = sorted({path.name for path in self.files(system)} | {file.path for file in weights})
        return {name: _checked_hash(known.get(name), name, self.directory.path) for name in names}


def source_from_option(source: str, workdir: Path, trust_remote_code: bool, progress: Progress) -> Source:
    """Open a run directory or a model.

    Args:
        source: The directory of a run; else a model as the road takes it.
        workdir: Below it a GGUF file is dequantized, where `source` is no run directory.
        trust_remote_code: Whether code that comes with the model may run; a run that allowed it did so for good.
        progress: Where long work reports.

    Raises:
        UserError: It cannot be opened, or predicts no next token.
    """
    directory = Path(source)
    manifest = read_manifest(directory)
    remote = trust_remote_code or (manifest is not None and manifest.options.trust_remote_code)
    if manifest is not None and is_half(manifest.options.task):
        cause = "is a half of an encoder-decoder, and perplexity of text is measured of language models"
        raise UserError(source, cause, "fptq-export verify DIR compares it with the FP32 model")
    checkpoint = checkpoint_from_model(
        source if manifest is None else _model_of_run(manifest, directory),
        workdir=workdir if manifest is None else directory,
        trust_remote_code=remote,
        progress=progress,
    )
    if checkpoint.task == ENCODER:
        cause = "is an encoder, which predicts no next token"
        raise UserError(source, cause, "fptq-export verify DIR compares encoders")
    run = None if manifest is None else RunDirectory(directory)
    return Source(checkpoint, checkpoint.config.get_text_config().vocab_size, run, manifest)


def _model_of_run(manifest: Manifest, directory: Path) -> str:
    """The float model that a run quantized: with its adapter, where it has one."""
    return manifest.options.model if manifest.options.adapter is None else str(RunDirectory(directory).merged)


def _records(manifest: Manifest) -> dict[str, FileRecord]:
    """What the stages read, then what they wrote: an output's record is the newer one."""
    stages = manifest.stages.values()
    read = {file.path: file for stage in stages for file in stage.inputs}
    return read | {file.path: file for stage in stages for file in stage.outputs}


def _check_graph_is_of_these_files(graph: Path, inputs: Sequence[FileRecord], known: Mapping[str, FileRecord]) -> None:
    for file in inputs:
        if known[file.path].sha256 != file.sha256:
            cause = f"was made from an earlier {file.path} than the one beside it"
            raise UserError(str(graph), cause, "fptq-export rewrite DIR makes it anew")


def _checked_hash(record: FileRecord | None, name: str, directory: Path) -> str:
    path = directory / name
    if record is None:
        raise UserError(str(path), "manifest.json does not know it", "run fptq-export MODEL -o there again")
    if not path.is_file():
        raise UserError(str(path), "was there when the run was made, and is missing", "restore it, or run again")
    if record_from_file(path, directory, record).sha256 != record.sha256:
        cause = "was changed since the run was made, and the run's other files belong to what it was"
        raise UserError(str(path), cause, "run fptq-export again; an edited policy goes in with --policy")
    return record.sha256


def chosen_systems(source: Source, wanted: tuple[System, ...] | None) -> tuple[tuple[System, ...], dict[System, str]]:
    """The systems to run, in order, and for those that nobody asked for and that cannot be had, why.

    Raises:
        UserError: One that was asked for cannot be had.
    """
    problems = {system: problem for system in SYSTEMS if (problem := source.problem(system)) is not None}
    if wanted is None:
        return tuple(system for system in SYSTEMS if system not in problems), problems
    for system in wanted:
        if system in problems:
            raise UserError(f"--systems {system}", problems[system], "or leave it out")
    return tuple(system for system in SYSTEMS if system in wanted), {}


@contextmanager
def opened_system(source: Source, system: System) -> Iterator[LogitsModel]:
    """Load one system; its memory is free again after the block, if nobody keeps the model."""
    with opened_session(source, system) as session:
        yield SessionModel(session, source.vocab_size)
        # The context below ends with the last reference to the session, so that its memory is free.
        del session


@contextmanager
def opened_session(source: Source, system: System, dtype: torch.dtype = torch.float32) -> Iterator[CausalSession]:
    """Load one system with its cache; its memory is free again after the block, if nobody keeps the session.

    Args:
        source: The model and its run.
        system: What to open.
        dtype: Of a torch model.
    """
    try:
        if system == "onnx":
            yield graph_session(source, system)
        else:
            yield TorchCausalSession(_torch_model(source, system, dtype), system)
    finally:
        gc.collect()


def graph_session(source: Source, name: str, *, all_logits: bool = True) -> OnnxCausalSession:
    """`model.w4a8.onnx` of a run in ONNX Runtime; it reads tokens, also where the graph reads their embeddings.

    Args:
        source: Of a run.
        name: What reports call it.
        all_logits: Run the form that gives the logits of every token.
    """
    graph, _, *embeddings = source.files("onnx")
    open_graph = partial(OnnxEmbeddingSession, graph, *embeddings) if embeddings else partial(OnnxCausalSession, graph)
    return open_graph(threads=None, name=name, all_logits=all_logits)


def _torch_model(source: Source, system: System, dtype: torch.dtype) -> PreTrainedModel:
    model = model_from_checkpoint(source.checkpoint, dtype)
    if system == "fake-quant":
        policy, arrays, sites = source.files(system)
        apply_policy(model, read_policy(policy), load_file(arrays), read_sites(sites))
    return model
