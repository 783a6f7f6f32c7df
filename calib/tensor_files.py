"""Which tensors a checkpoint directory holds: headers of its safetensors files, no data read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fptq_export.errors import Problem, UserError, UserErrors
from fptq_export.stored_tensor import Rows, StoredTensor

__all__ = [
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "TensorEntry",
    "tensor_entries_from_directory",
    "tensor_entries_from_files",
]

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor is stored."""

    file: Path
    key: str
    """Name inside the file."""
    dtype: str
    """As safetensors spells it: F32, F16, BF16."""
    shape: tuple[int, ...]
    rows: Rows | None = None
    """The part of the stored tensor that this is; None for all of it."""

    @property
    def stored(self) -> StoredTensor:
        """Where it lies, without its type and shape."""
        return StoredTensor(self.file, self.key, self.rows)

    def read_from(self, tensors: Any) -> torch.Tensor:
        """A memory map of it, from its opened file."""
        tensor: torch.Tensor = tensors.get_tensor(self.key)
        if self.rows is None:
            return tensor
        return (tensor if self.rows.matrix is None else tensor[self.rows.matrix])[self.rows.start : self.rows.stop]


def tensor_entries_from_directory(directory: Path) -> dict[str, TensorEntry]:
    """List every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    Raises:
        UserError: There are no safetensors weights, the index is not readable, or a file is damaged.
        UserErrors: The index leaves the directory, or names files or tensors that are not there (all of them at once).
    """
    if (directory / WEIGHTS_FILE).is_file():
        return tensor_entries_from_files([directory / WEIGHTS_FILE])
    if (directory / INDEX_FILE).is_file():
        return _entries_from_index(directory / INDEX_FILE)
    if any(next(directory.glob(pattern), None) for pattern in _PICKLE_PATTERNS):
        raise UserError(
            str(directory),
            "the weights are pickled (.bin, .pt), and opening a pickle runs code from it",
            "convert them: load the model in transformers and call save_pretrained, which writes safetensors",
        )
    raise UserError(
        str(directory),
        f"has neither {WEIGHTS_FILE} nor {INDEX_FILE}",
        "give a directory written by save_pretrained, a hub id or a .gguf file",
    )


def _entries_from_index(index: Path) -> dict[str, TensorEntry]:
    weight_map = _read_weight_map(index)
    problems = [
        Problem(f'$.weight_map["{name}"]', f"{file!r} is not a file name inside the checkpoint directory")
        for name, file in weight_map.items()
        if not _is_inside(file)
    ]
    if problems:
        raise UserErrors(str(index), problems, "download the checkpoint again")
    shards = [index.parent / file for file in dict.fromkeys(weight_map.values())]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise UserErrors(
            str(index),
            [Problem("$.weight_map", f"shard {name} is missing") for name in missing],
            "download the checkpoint again; every shard is needed",
        )
    entries = tensor_entries_from_files(shards)
    absent = [
        Problem(f'$.weight_map["{name}"]', f"{file} does not hold this tensor")
        for name, file in weight_map.items()
        if name not in entries
    ]
    if absent:
        raise UserErrors(str(index), absent, "download the checkpoint again")
    return entries


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(str(index), f"not a safetensors index ({error!r})", "download the checkpoint again") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(str(index), "weight_map does not map tensor names to files", "download the checkpoint again")
    return weight_map


def _is_inside(file: str) -> bool:
    """Whether a name stays in its directory. Links are followed: the hub's cache is made of them."""
    path = PurePosixPath(file)
    return bool(file) and not path.is_absolute() and ".." not in path.parts and "\\" not in file


def tensor_entries_from_files(files: Iterable[Path]) -> dict[str, TensorEntry]:
    """List every tensor of some safetensors files.

    Raises:
        UserError: A file is damaged, or none of them holds a tensor.
    """
    entries: dict[str, TensorEntry] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (not a dict)
                    part = tensors.get_slice(key)
                    entries[key] = TensorEntry(file, key, str(part.get_dtype()), tuple(part.get_shape()))
        except (SafetensorError, OSError) as error:
            raise UserError(str(file), f"damaged or cut off ({error})", "download or copy the file again") from None
    if not entries:
        raise UserError(", ".join(str(file) for file in files), "holds no tensor", "download the checkpoint again")
    return entries
