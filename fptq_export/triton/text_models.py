"""The text model that needs no GPU: ONNX Runtime on the portable graph."""

from __future__ import annotations

from pathlib import Path

from fptq_export.errors import UserError
from fptq_export.graph_io import data_path
from fptq_export.package.manifest import MANIFEST_FILE, Manifest
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.pipeline.tokenizer_files import tokenizer_files
from fptq_export.runtime.source import source_from_path
from fptq_export.triton.models import MODEL_FILE, Models, model_file, model_name
from fptq_export.triton.options import TritonOptions
from fptq_export.triton.repository import ModelVersion, next_version
from fptq_export.triton.text_config import text_config

__all__ = ["NEEDS_PACKAGE", "cpu_models", "tokenizer_copies"]

NEEDS_PACKAGE = "the Python backend, and fptq-export in its Python"


def cpu_models(options: TritonOptions, manifest: Manifest) -> Models:
    """The text model that runs `model.w4a8.onnx`, or `model.onnx`.

    Raises:
        UserError: The run is not of a causal language model, has no graph or no tokenizer.
    """
    source = source_from_path(options.source)
    run = RunDirectory(options.source)
    graph, verb = (run.w4a8, "rewrite") if options.graph == "w4a8" else (run.model, "trace")
    if not graph.is_file():
        raise UserError(str(graph), "no such file", f"fptq-export {verb} {options.source}")
    name = model_name(options)
    files = [graph, *(path for path in (data_path(graph),) if path.is_file()), source.directory / MANIFEST_FILE]
    version = ModelVersion(
        name=name,
        config=text_config(name, options),
        version=next_version([options.repository / name], options.version),
        copies={path.name: path for path in files} | tokenizer_copies(options.source),
        texts={MODEL_FILE: model_file("fptq_export.triton.serving.cpu_model")},
    )
    return Models((version,), needs=(NEEDS_PACKAGE,))


def tokenizer_copies(directory: Path) -> dict[str, Path]:
    """Name -> tokenizer file of a run.

    Raises:
        UserError: It has no tokenizer.
    """
    files = {path.name: path for path in tokenizer_files(directory)}
    if "tokenizer.json" not in files:
        hint = "copy the model's tokenizer files into the run directory"
        raise UserError(str(directory), "has no tokenizer.json, and a text model needs one", hint)
    return files
