"""What a calibration has finished, on disk, so that one that was killed goes on at its last finished block.

    DIRECTORY/hessians.safetensors          those of finished blocks, until the file is complete and gets its place
    DIRECTORY/rank-0-of-1/state.json        how many blocks are finished, for which key
    DIRECTORY/rank-0-of-1/after-7/          statistics and hidden states after 7 blocks

Each rank keeps its own share. `state.json` is replaced in one step when everything it names is written. What came
before is removed when all ranks have replaced theirs, so the last block that all have finished can always be found. The
state survives the end of a process, not a loss of power: nothing waits for the disk.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt

from calib.ranks import ALONE, Ranks
from calib.stats import Stats, read_stats, write_stats
from fptq_export.errors import UserError
from fptq_export.files import read_json_model, write_json_model

__all__ = ["CalibrationState"]

_STATS = "measured.safetensors"
_HESSIANS = "hessians.safetensors"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    key: str
    """Tells calibrations apart: model, text, seed, options and version."""
    blocks: NonNegativeInt
    files: dict[str, NonNegativeInt]
    """Path in the directory -> bytes."""


class CalibrationState:
    """The state of one rank. Every rank opens it, and what is not that of `key` is removed.

    Args:
        directory: Belongs to the state alone; all ranks name the same one.
        key: Tells calibrations apart.
        ranks: This rank among all.
        hessians: Whether Hessians are measured too.
    """

    def __init__(self, directory: Path, key: str, ranks: Ranks = ALONE, *, hessians: bool = False) -> None:
        self._directory = directory
        self._key = key
        self._ranks = ranks
        self._own = directory / f"rank-{ranks.rank}-of-{ranks.size}"
        self.hessians = directory / _HESSIANS if hessians and ranks.rank == 0 else None
        """Where rank 0 collects Hessians."""
        with ranks.together():
            finished = torch.tensor([self._finished_blocks()])
        ranks.min_(finished)
        self.blocks = int(finished)
        """Blocks that every rank has finished."""
        with ranks.together():
            self._tidy()
            self.stats: Stats | None = read_stats(self.folder(self.blocks) / _STATS) if self.blocks else None
            """Statistics of the finished blocks."""

    def folder(self, blocks: int) -> Path:
        """Where the hidden states after so many blocks lie."""
        return self._own / f"after-{blocks}"

    def finish_block(self, blocks: int, stats: Stats) -> None:
        """Record that so many blocks are finished; their hidden states and Hessians are written."""
        folder = self.folder(blocks)
        with self._ranks.together():
            write_stats(stats, folder / _STATS)
            written = [*folder.iterdir(), *([self.hessians] if self.hessians is not None else [])]
            files = {str(path.relative_to(self._directory)): path.stat().st_size for path in written}
            write_json_model(_Record(key=self._key, blocks=blocks, files=files), self._own / "state.json")
        self.blocks = blocks
        with self._ranks.together():
            self._tidy()

    def remove(self) -> None:
        """The calibration is finished: nothing of it is needed."""
        with self._ranks.together():
            shutil.rmtree(self._own, ignore_errors=True)
        if self._ranks.rank == 0:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _finished_blocks(self) -> int:
        try:
            record = read_json_model(self._own / "state.json", _Record)
        except UserError:
            return 0
        intact = all(_has_size(self._directory / name, size) for name, size in record.files.items())
        return record.blocks if record.key == self._key and intact else 0

    def _tidy(self) -> None:
        """Remove what is not needed to go on from `self.blocks`."""
        for path in self._own.glob("after-*"):
            if not self.blocks or path != self.folder(self.blocks):
                shutil.rmtree(path)
        if self._ranks.rank == 0:
            for path in self._directory.glob("rank-*"):
                if not path.name.endswith(f"-of-{self._ranks.size}"):
                    shutil.rmtree(path)
        if self.blocks == 0 and self.hessians is not None:
            self.hessians.unlink(missing_ok=True)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
