"""How large a model is, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFReader

from calib.hub import directory_from_hub
from calib.interchange import quantization_from_directory
from calib.linears import linears_from_model
from calib.load import checkpoint_from_directory, skeleton_from_checkpoint
from calib.precision import excluded_paths
from fptq_export.errors import UserError
from fptq_export.progress import Progress

__all__ = ["ModelSizes", "sizes_from_model"]

_GGUF_FLOAT_TENSORS = ("token_embd.", "output.")
"""Embedding and head: matrices of a GGUF file that are not quantized by default."""


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of weights."""

    parameters: int
    """All of them; tied ones count once."""
    quantized: int
    """Those in linears that will be INT4."""


def sizes_from_model(model: str, exclude: Sequence[str], progress: Progress, *, trust_remote_code: bool) -> ModelSizes:
    """Count the weights of a directory, a hub id or a GGUF file without reading or converting any.

    Raises:
        UserError: The model cannot be opened.
    """
    path = Path(model)
    if path.suffix == ".gguf":
        return _sizes_from_gguf(path)
    directory = (
        path if path.is_dir() else directory_from_hub(model, trust_remote_code=trust_remote_code, progress=progress)
    )
    checkpoint = checkpoint_from_directory(
        directory,
        path.name,
        trust_remote_code=trust_remote_code,
        quantized=quantization_from_directory(directory) is not None,
    )
    skeleton = skeleton_from_checkpoint(checkpoint)
    linears = linears_from_model(skeleton)
    excluded = excluded_paths(list(linears), exclude)
    names = {f"{linear}.weight" for linear in linears if linear not in excluded}
    counts = {name: parameter.numel() for name, parameter in skeleton.named_parameters()}
    return ModelSizes(sum(counts.values()), sum(count for name, count in counts.items() if name in names))


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
