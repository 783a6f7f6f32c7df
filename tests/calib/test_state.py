"""A calibration that stops goes on where it was, with the bits it would have had; hidden states may lie on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from calib.batches import CalibrationOptions, token_batches
from calib.hessians import hessian_writer, owners_from_sites
from calib.hidden import HiddenStates
from calib.load import Checkpoint, model_from_checkpoint
from calib.observe import Execution, HessianSink, observe
from calib.state import CalibrationState
from calib.stats import Stats
from calib.stream import BlockStream
from fptq_export.errors import UserError
from fptq_export.sites import Sites
from tests.support.checkpoints import CountingProgress

WINDOWS, SEQ, BATCH, LAYERS, HIDDEN = 5, 16, 2, 2, 64
BATCH_BYTES = BATCH * SEQ * HIDDEN * 4
KEY = "key"


class StoppedError(Exception):
    """Stands in for SIGKILL: what follows a block does not happen."""


class Calibration:
    """A tiny calibration in a directory of its own."""

    def __init__(self, llama: Checkpoint, sites: Sites, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._llama = llama
        self._sites = sites
        self.directory = directory
        self.blocks: list[int] = []
        self.stop_in: int | None = None
        self.progress = CountingProgress()
        advance = BlockStream.advance

        def watched(stream: BlockStream, index: int, block: nn.Module) -> Iterator[int]:
            self.blocks.append(index)
            for tokens in advance(stream, index, block):
                yield tokens
                if index == self.stop_in:
                    raise StoppedError

        monkeypatch.setattr(BlockStream, "advance", watched)

    @property
    def state(self) -> Path:
        """Where its state lies."""
        return self.directory / "state"

    def run(self, key: str = KEY, max_memory: int | None = None, stop_in: int | None = None) -> tuple[Stats, bytes]:
        """Run it, or go on with it; returns statistics and the file of Hessians."""
        self.blocks.clear()
        self.stop_in = stop_in
        paths = [linear.path for linear in self._sites.linears if linear.path != "lm_head"]
        owners = owners_from_sites(self._sites, paths)
        sizes = {owner: self._sites.linear(owner).in_features for owner in owners.values()}
        batches = token_batches(CalibrationOptions(dataset="random", size=WINDOWS, seq=SEQ), None, 512)
        state = CalibrationState(self.state, key, hessians=True)
        written = set(sizes) & set(state.stats.channel_absmax if state.stats else ())
        file = self.directory / "hessians.safetensors"
        with hessian_writer(file, sizes, draft=state.hessians, written=written) as write:
            stats = observe(
                lambda: model_from_checkpoint(self._llama, torch.float32),
                batches,
                paths,
                self.progress,
                BATCH,
                HessianSink(owners, write),
                Execution(state=state, max_memory=max_memory),
            )
        state.remove()
        return stats, file.read_bytes()

    def stop(self, block: int, **options: Any) -> None:
        """Stop it in a block."""
        with pytest.raises(StoppedError):
            self.run(stop_in=block, **options)


@pytest.fixture
def calibration(llama: Checkpoint, sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """A calibration that has not begun."""
    return Calibration(llama, sites, tmp_path, monkeypatch)


@pytest.fixture
def unbroken(llama: Checkpoint, sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stats, bytes]:
    """What the same calibration gives in one go."""
    return Calibration(llama, sites, tmp_path / "unbroken", monkeypatch).run()


def same(first: tuple[Stats, bytes], second: tuple[Stats, bytes]) -> bool:
    absmax, other = first[0].channel_absmax, second[0].channel_absmax
    return (
        absmax.keys() == other.keys()
        and all(np.array_equal(absmax[path], other[path]) for path in absmax)
        and (first[0].tokens, first[0].description, first[1]) == (second[0].tokens, second[0].description, second[1])
    )


@pytest.mark.parametrize(("stop_in", "left"), [(0, [0, 1]), (1, [1])])
def test_a_stopped_calibration_goes_on(
    calibration: Calibration, unbroken: tuple[Stats, bytes], stop_in: int, left: list[int]
) -> None:
    """Finished blocks are not run again, the result is the same to the bit, the state is gone, the bar is full."""
    calibration.stop(stop_in)
    assert calibration.state.exists()
    assert same(calibration.run(), unbroken)
    assert calibration.blocks == left
    assert not calibration.state.exists()
    assert calibration.progress.done == calibration.progress.totals


def test_stopping_twice_loses_nothing(calibration: Calibration, unbroken: tuple[Stats, bytes]) -> None:
    """A second stop in the same block still finds the first one finished."""
    calibration.stop(1)
    calibration.stop(1)
    assert calibration.blocks == [1]
    assert same(calibration.run(), unbroken)


@pytest.mark.parametrize("damage", ["other key", "no hidden states", "cut hidden states", "no Hessians", "no JSON"])
def test_a_state_that_does_not_fit_is_not_used(
    calibration: Calibration, unbroken: tuple[Stats, bytes], damage: str
) -> None:
    """Another model, text or version, or a file that is not what was written: everything runs again."""
    calibration.stop(1)
    own = calibration.state / "rank-0-of-1"
    hidden = own / "after-1" / "hidden-1.safetensors"
    if damage == "no hidden states":
        hidden.unlink()
    elif damage == "cut hidden states":
        hidden.write_bytes(hidden.read_bytes()[:-1])
    elif damage == "no Hessians":
        (calibration.state / "hessians.safetensors").unlink()
    elif damage == "no JSON":
        (own / "state.json").write_text("{")
    assert same(calibration.run(key="other" if damage == "other key" else KEY), unbroken)
    assert calibration.blocks == [0, 1]


def test_state_of_another_number_of_processes_is_removed(calibration: Calibration) -> None:
    """Their shares are other windows; nothing of them piles up."""
    calibration.stop(1)
    own = calibration.state / "rank-0-of-1"
    own.rename(own.with_name("rank-0-of-2"))
    calibration.stop(1)
    assert calibration.blocks == [0, 1]
    assert [path.name for path in calibration.state.glob("rank-*")] == ["rank-0-of-1"]


def test_only_the_last_finished_block_is_kept(calibration: Calibration) -> None:
    """Disk space follows the hidden states, not the number of blocks."""
    calibration.stop(1)
    own = calibration.state / "rank-0-of-1"
    assert json.loads((own / "state.json").read_text())["blocks"] == 1
    assert sorted(path.name for path in own.iterdir()) == ["after-1", "after-2", "state.json"]
    CalibrationState(calibration.state, KEY, hessians=True)
    assert sorted(path.name for path in own.iterdir()) == ["after-1", "state.json"]


@pytest.mark.parametrize("limit", [0, BATCH_BYTES, 10 * BATCH_BYTES])
def test_hidden_states_on_disk_change_no_bit(
    calibration: Calibration, unbroken: tuple[Stats, bytes], limit: int
) -> None:
    """None, one or all batches in memory, also for a calibration that goes on."""
    calibration.stop(1, max_memory=limit)
    assert same(calibration.run(max_memory=limit), unbroken)
    assert same(calibration.run(max_memory=limit), unbroken)
    assert calibration.blocks == [0, 1]


@pytest.mark.parametrize(("limit", "in_memory"), [(0, 0), (BATCH_BYTES, 1), (BATCH_BYTES * 2 - 1, 1), (None, 3)])
def test_memory_holds_what_the_limit_allows(tmp_path: Path, limit: int | None, in_memory: int) -> None:
    """The first batches that fit stay, in every block; what does not fit is read from its file."""
    hidden = HiddenStates(lambda blocks: tmp_path / str(blocks), limit)
    for value in range(3):
        hidden.append(torch.full((BATCH, SEQ, HIDDEN), float(value)))
    for _ in range(2):
        assert [batch is not None for batch in hidden._batches] == [True] * in_memory + [False] * (3 - in_memory)
        for batch in range(3):
            hidden.write(batch, hidden.read(batch) + 1)
        hidden.finish_block()
    assert [float(hidden.read(batch).max()) for batch in range(3)] == [2.0, 3.0, 4.0]


def test_a_limit_without_a_folder_is_refused() -> None:
    """There is no place for what exceeds it."""
    with pytest.raises(ValueError, match="folder"):
        HiddenStates(max_bytes=1)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    """Of the right size, but no hidden states: the message says which file and what to delete."""
    hidden = HiddenStates(lambda blocks: tmp_path / str(blocks), 0)
    hidden.append(torch.zeros(1))
    (tmp_path / "0" / "hidden-0.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="delete") as error:
        hidden.read(0)
    assert error.value.where.endswith("hidden-0.safetensors")
