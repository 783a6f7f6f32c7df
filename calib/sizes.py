"""How large a model is, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader

from calib.halves import paths_of_task
from calib.hub import directory_from_model
from calib.interchange import quantization_from_directory
from calib.linears import linears_from_model
from calib.load import checkpoint_from_directory, skeleton_from_checkpoint
from calib.precision import chosen_precisions
from fptq_export.errors import UserError
from fptq_export.policy import Precision
from fptq_export.progress import Progress
from fptq_export.tasks import Task

__all__ = ["ModelSizes", "sizes_from_model"]

_GGUF_FLOAT_TENSORS = ("token_embd.", "output.")
"""Embedding and head: matrices of a GGUF file that are not quantized by default."""

_STORED: Mapping[Precision, str] = {"w4a8": "int4", "w4a16": "int4", "w8a8": "int8", "float": "float"}


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of weights."""

    parameters: int
    """All of the graph's; tied ones count once."""
    quantized: int
    """Those in linears that will be INT4."""
    int8: int = 0
    """Those in linears that will be INT8."""


def sizes_from_model(
    model: str,
    exclude: Sequence[str],
    precision: Sequence[str],
    progress: Progress,
    *,
    trust_remote_code: bool,
    task: Task | None = None,
) -> ModelSizes:
    """Count the weights of a directory, a hub id or a GGUF file without reading or converting any.

    A GGUF file is counted as if there were no patterns: its names are not those of the model.

    Raises:
        UserError: The model cannot be opened, or a pattern matches nothing.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        return _sizes_from_gguf(path)
    directory = directory_from_model(model, trust_remote_code=trust_remote_code, progress=progress)
    checkpoint = checkpoint_from_directory(
        directory,
        path.name,
        trust_remote_code=trust_remote_code,
        quantized=quantization_from_directory(directory) is not None,
        task=task,
    )
    skeleton = skeleton_from_checkpoint(checkpoint)
    linears = paths_of_task(checkpoint, linears_from_model(skeleton))
    choices = chosen_precisions(linears, exclude, precision)
    named = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    counts = {name: named[name] for name in paths_of_task(checkpoint, named)}
    bits = {"int4": 0, "int8": 0, "float": 0}
    for linear in linears:
        chosen = choices[linear].precision if linear in choices else "w4a8"
        bits[_STORED[chosen]] += counts.get(f"{linear}.weight", 0)
    return ModelSizes(sum(counts.values()), bits["int4"], bits["int8"])


def _sizes_from_gguf(path: Path) -> ModelSizes:
    try:
        tensors = GGUFReader(path).tensors
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(str(path), f"not a readable GGUF file ({error})", "download it again") from error
    counts = {tensor.name: int(tensor.n_elements) for tensor in tensors}
    matrices = {tensor.name for tensor in tensors if len(tensor.shape) > 1}
    quantized = (
        count for name, count in counts.items() if name in matrices and not name.startswith(_GGUF_FLOAT_TENSORS)
    )
    return ModelSizes(sum(counts.values()), sum(quantized))
