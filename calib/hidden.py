"""The hidden states between two blocks: in memory up to a limit, the rest in safetensors files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fptq_export.errors import UserError
from fptq_export.files import os_errors_from_safetensors

__all__ = ["HiddenStates"]

_NAME = "hidden"


class HiddenStates:
    """Hidden states of every batch, [windows, seq, hidden] in most models, on the CPU.

    With a folder, what each block hands on is also written, so that a calibration can go on from there.

    Args:
        folder: Gives the folder of the states after so many blocks; None keeps all in memory.
        max_bytes: Bytes of hidden states in memory; batches above it are read from their files. None: no limit.

    Raises:
        ValueError: There is a limit, and no folder for what exceeds it.
    """

    def __init__(self, folder: Callable[[int], Path] | None = None, max_bytes: int | None = None) -> None:
        if folder is None and max_bytes is not None:
            raise ValueError("a limit needs a folder")
        self._folder = folder
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._blocks = 0
        self._batches: list[torch.Tensor | None] = []

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, hidden: torch.Tensor) -> None:
        """Add the input of the first block for the next batch."""
        fits = self._max_bytes is None or self._used_bytes + hidden.nbytes <= self._max_bytes
        if fits:
            self._used_bytes += hidden.nbytes
        else:
            self._save(0, len(self._batches), hidden)
        self._batches.append(hidden if fits else None)

    def read(self, batch: int) -> torch.Tensor:
        """The hidden states of a batch, before the block that runs."""
        hidden = self._batches[batch]
        return self._load(batch) if hidden is None else hidden

    def write(self, batch: int, hidden: torch.Tensor) -> None:
        """Give what the block that runs makes of a batch; its input is not read again."""
        hidden = hidden.cpu()
        if self._folder is not None:
            self._save(self._blocks + 1, batch, hidden)
        if self._batches[batch] is not None:
            self._batches[batch] = hidden

    def finish_block(self) -> None:
        """Every batch has passed the block."""
        self._blocks += 1

    def restore(self, blocks: int) -> None:
        """Go on after so many blocks, with what an earlier process wrote.

        Raises:
            UserError: A file is damaged.
        """
        self._blocks = blocks
        for batch, hidden in enumerate(self._batches):
            if hidden is not None:
                self._batches[batch] = self._load(batch)

    def _save(self, blocks: int, batch: int, hidden: torch.Tensor) -> None:
        path = self._path(blocks, batch)
        path.parent.mkdir(parents=True, exist_ok=True)
        with os_errors_from_safetensors(path):
            save_file({_NAME: hidden.contiguous()}, path)

    def _load(self, batch: int) -> torch.Tensor:
        """A copy, not the memory map: sums depend on how a tensor is aligned, and results may not."""
        path = self._path(self._blocks, batch)
        try:
            return load_file(path)[_NAME].clone()
        except (OSError, SafetensorError, KeyError) as error:
            raise UserError(str(path), f"damaged ({error})", f"delete {path.parent.parent} and run again") from None

    def _path(self, blocks: int, batch: int) -> Path:
        assert self._folder is not None, "without a folder nothing is on disk"
        return self._folder(blocks) / f"{_NAME}-{batch}.safetensors"
