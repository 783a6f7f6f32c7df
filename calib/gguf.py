"""Turn a GGUF file into a Hugging Face directory, once: dequantized FP32 safetensors, config and tokenizer."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from calib.quiet import quiet_transformers
from calib.tensor_files import WEIGHTS_FILE
from fptq_export.errors import UserError
from fptq_export.files import (
    PARTIAL_SUFFIX,
    os_errors_from_safetensors,
    read_json_model,
    sha256_from_file,
    write_json_model,
)
from fptq_export.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FINGERPRINT_FILE", "directory_from_gguf"]

FINGERPRINT_FILE = "gguf_source.json"
_MAGIC = b"GGUF"
_READ_ERRORS = (ValueError, KeyError, IndexError, OSError, NotImplementedError, struct.error)
"""What transformers and gguf raise for a file that is cut off, or of an architecture they do not know."""


class _Fingerprint(BaseModel):
    """Which file a directory was made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    size: int
    sha256: str


def directory_from_gguf(gguf: Path, directory: Path, *, progress: Progress) -> Path:
    """Dequantize a GGUF file into `directory`, or reuse what an earlier run made from the same bytes.

    The directory is built under a temporary name beside its own and renamed, so it is never half-written.

    Args:
        gguf: The file.
        directory: Where the Hugging Face files go: 4 bytes a weight.
        progress: Where the two steps are reported.

    Returns:
        `directory`.

    Raises:
        UserError: The file is missing, is not GGUF, is cut off, or its architecture is unknown to transformers.
    """
    fingerprint = _fingerprint_from_gguf(gguf)
    marker = directory / FINGERPRINT_FILE
    if marker.is_file() and read_json_model(marker, _Fingerprint) == fingerprint:
        return directory
    partial = directory.with_name(f".{directory.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with progress.task(f"dequantize {gguf.name}", None), quiet_transformers():
            _write_directory(gguf, partial)
        write_json_model(fingerprint, partial / FINGERPRINT_FILE)
        if directory.exists():
            shutil.rmtree(directory)
        partial.rename(directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def _fingerprint_from_gguf(gguf: Path) -> _Fingerprint:
    if not gguf.is_file():
        raise UserError(str(gguf), "no such file", "check the path")
    with gguf.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise UserError(str(gguf), "not a GGUF file (its first bytes are not 'GGUF')", "download the file again")
    return _Fingerprint(size=gguf.stat().st_size, sha256=sha256_from_file(gguf))


def _write_directory(gguf: Path, directory: Path) -> None:
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            **source, local_files_only=True, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except _READ_ERRORS as error:
        raise UserError(
            str(gguf),
            f"cannot be read as a GGUF model ({type(error).__name__}: {error})",
            "download the file again; if it is complete, its architecture may be one that transformers cannot read",
        ) from error
    tokenizer.save_pretrained(directory)
    _write_config(model, directory)
    # save_pretrained refuses a model that came from a GGUF file, so the tensors are written here.
    with os_errors_from_safetensors(directory / WEIGHTS_FILE):
        save_file(_untied_tensors(model), directory / WEIGHTS_FILE, metadata={"format": "pt"})


def _write_config(model: PreTrainedModel, directory: Path) -> None:
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config.update(architectures=[type(model).__name__], dtype="float32")
    config.pop("_name_or_path", None)
    (directory / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _untied_tensors(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """The state dict without the second names of shared tensors (a head tied to the embedding)."""
    tied = model.get_expanded_tied_weights_keys(all_submodels=True)
    return {name: tensor.numpy() for name, tensor in model.state_dict().items() if name not in tied}
