"""Global and shared memory of a launch, and the copies between them that are under way; each access is checked.

Global: bounds, alignment, read-only buffers. Shared: bounds, alignment, words never written, words that a cp.async
writes meanwhile, and races: between two barriers no thread may touch a word that another one writes. Threads of one
warp are no exception, for since compute capability 7.0 they need not run together. Races are looked for in words of
4 bytes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.plugins.ptx.ptx_parser import SHARED_SYMBOL_ADDRESS, PtxError

Integers = NDArray[np.int64]
WORD = 4
WINDOW_ALIGNMENT = 256
ASYNC_POISON = 0xCD
"""What a word holds from the start of its cp.async to the wait."""
MANY = -2
"""In place of a lane: several lanes."""
NEVER = -1


@dataclass(frozen=True)
class Buffer:
    """Host memory that kernels may touch."""

    start: int
    size: int
    name: str
    writable: bool


class GlobalMemory:
    """The buffers of a call, seen through one window of this process's memory, from the lowest to the highest."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = sorted(buffers, key=lambda buffer: buffer.start)
        self.starts = np.array([buffer.start for buffer in self.buffers], dtype=np.int64)
        self.ends = np.array([buffer.start + buffer.size for buffer in self.buffers], dtype=np.int64)
        self.writable = np.array([buffer.writable for buffer in self.buffers])
        self.low = int(self.starts[0]) // WINDOW_ALIGNMENT * WINDOW_ALIGNMENT
        span = -(-(int(self.ends[-1]) - self.low) // WINDOW_ALIGNMENT) * WINDOW_ALIGNMENT
        window = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(self.low))
        self.views = {size: window.view(f"u{size}") for size in (1, 2, 4, 8)}

    def check(self, addresses: Integers, size: int, *, write: bool) -> None:
        """Raises PtxError unless `size` bytes at each address are aligned and inside of one buffer."""
        if (addresses % size).any():
            raise PtxError(f"global address {int(addresses[addresses % size != 0][0]):#x} is not a multiple of {size}")
        number = np.searchsorted(self.starts, addresses, side="right") - 1
        bad = (number < 0) | (addresses + size > self.ends[number])
        if bad.any():
            raise PtxError(f"out of bounds of global memory: {self._nearest(int(addresses[bad][0]))}, {size} bytes")
        if write and not self.writable[number].all():
            name = self.buffers[int(number[~self.writable[number]][0])].name
            raise PtxError(f"writes to {name}, which is only read")

    def _nearest(self, address: int) -> str:
        below = [buffer for buffer in self.buffers if buffer.start <= address]
        last = below[-1] if below else self.buffers[0]
        return f"byte {address - last.start} of {last.name} ({last.size} bytes)"

    def load(self, addresses: Integers, size: int, count: int) -> NDArray[Any]:
        """[lanes, count] elements of `size` bytes; the whole vector must be aligned."""
        self.check(addresses, size * count, write=False)
        first = (addresses - self.low) // size
        elements: NDArray[Any] = self.views[size][first[:, None] + np.arange(count)]
        return elements

    def store(self, addresses: Integers, values: NDArray[Any]) -> None:
        """Writes [lanes, count] elements."""
        size, count = values.dtype.itemsize, values.shape[1]
        self.check(addresses, size * count, write=True)
        self.views[size][((addresses - self.low) // size)[:, None] + np.arange(count)] = values


@dataclass
class Copies:
    """What one cp.async instruction started."""

    lanes: Integers
    ctas: Integers
    addresses: Integers
    data: NDArray[np.uint32]  # [lanes, words]
    group: Integers  # of each lane: how many groups it had committed before

    def part(self, chosen: NDArray[np.bool_]) -> Copies:
        """Those of some lanes."""
        lanes, ctas, addresses = self.lanes[chosen], self.ctas[chosen], self.addresses[chosen]
        return Copies(lanes, ctas, addresses, self.data[chosen], self.group[chosen])


class SharedMemory:
    """Shared memory of all blocks, with what is known of each word."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.words_per_block = -(-size // 8) * 2
        words = max(2, blocks * self.words_per_block)
        self.bytes = np.zeros(words * WORD, dtype=np.uint8)
        self.views = {size: self.bytes.view(f"u{size}") for size in (1, 2, 4, 8)}
        self.epoch = np.zeros(blocks, dtype=np.int64)  # barriers that each block has passed
        self.valid = np.zeros(words, dtype=np.bool_)
        self.pending = np.zeros(words, dtype=np.bool_)
        self.write_epoch, self.read_epoch = (np.full(words, NEVER, dtype=np.int64) for _ in range(2))
        self.writer, self.reader = (np.full(words, NEVER, dtype=np.int64) for _ in range(2))
        self.copies: list[Copies] = []
        self.committed = np.zeros(0, dtype=np.int64)  # of each lane

    def offsets(self, ctas: Integers, addresses: Integers, size: int) -> Integers:
        """Byte offsets into `bytes`. Raises PtxError for an address outside of the block's memory, or misaligned."""
        relative = addresses - SHARED_SYMBOL_ADDRESS
        if (relative % size).any():
            raise PtxError(f"shared offset {int(relative[relative % size != 0][0])} is not a multiple of {size}")
        bad = (relative < 0) | (relative + size > self.size)
        if bad.any():
            raise PtxError(f"out of bounds of shared memory: byte {int(relative[bad][0])} of {self.size}, {size} bytes")
        return ctas * (self.words_per_block * WORD) + relative

    def load(self, lanes: Integers, ctas: Integers, addresses: Integers, size: int, count: int) -> NDArray[Any]:
        """[lanes, count] elements of `size` bytes."""
        offsets = self.offsets(ctas, addresses, size * count)
        self.note_read(lanes, ctas, offsets, size * count)
        elements: NDArray[Any] = self.views[size][(offsets // size)[:, None] + np.arange(count)]
        return elements

    def store(self, lanes: Integers, ctas: Integers, addresses: Integers, values: NDArray[Any]) -> None:
        """Writes [lanes, count] elements."""
        size, count = values.dtype.itemsize, values.shape[1]
        offsets = self.offsets(ctas, addresses, size * count)
        self.note_write(lanes, ctas, offsets, size * count)
        self.views[size][(offsets // size)[:, None] + np.arange(count)] = values

    def _words(self, owners: Integers, ctas: Integers, offsets: Integers, size: int) -> tuple[Integers, ...]:
        """Words touched, with the lane and the block of each."""
        each = np.arange(max(1, size // WORD))
        words = (offsets // WORD)[:, None] + each
        return words.ravel(), np.repeat(owners, len(each)), np.repeat(ctas, len(each))

    def note_read(self, owners: Integers, ctas: Integers, offsets: Integers, size: int) -> None:
        """Checks a read by each of `owners` (lanes, or MANY)."""
        words, lanes, blocks = self._words(owners, ctas, offsets, size)
        epoch = self.epoch[blocks]
        self._refuse(self.pending[words], words, "is read while a cp.async still writes it")
        self._refuse(~self.valid[words], words, "is read and was never written")
        other = (self.write_epoch[words] == epoch) & (self.writer[words] != lanes)
        self._refuse(other, words, "is read after another thread wrote it, with no barrier between")
        shared = (self.read_epoch[words] == epoch) & (self.reader[words] != lanes)
        self.reader[words] = np.where(shared, MANY, lanes)
        same_time = self.reader[words] != np.where(shared, MANY, lanes)
        self.reader[words[same_time]] = MANY
        self.read_epoch[words] = epoch

    def note_write(self, owners: Integers, ctas: Integers, offsets: Integers, size: int) -> None:
        """Checks a write by each of `owners`."""
        words, lanes, blocks = self._words(owners, ctas, offsets, size)
        epoch = self.epoch[blocks]
        self._refuse(self.pending[words], words, "is written while a cp.async still writes it")
        written = (self.write_epoch[words] == epoch) & (self.writer[words] != lanes)
        self._refuse(written, words, "is written by two threads with no barrier between")
        read = (self.read_epoch[words] == epoch) & (self.reader[words] != lanes)
        self._refuse(read, words, "is written after another thread read it, with no barrier between")
        self.writer[words] = lanes
        self._refuse(self.writer[words] != lanes, words, "is written by two threads at once")
        self.write_epoch[words] = epoch
        self.valid[words] = True

    def _refuse(self, bad: NDArray[np.bool_], words: Integers, what: str) -> None:
        if bad.any():
            word = int(words[np.flatnonzero(bad)[0]])
            block, within = divmod(word, self.words_per_block)
            raise PtxError(f"shared byte {within * WORD} of block {block} {what}")

    def start_copies(self, copies: Copies) -> None:
        """The target is poisoned at once, and filled when its thread waits: as late as the rules allow."""
        size = copies.data.shape[1] * WORD
        offsets = self.offsets(copies.ctas, copies.addresses, size)
        self.note_write(copies.lanes, copies.ctas, offsets, size)
        words = (offsets // WORD)[:, None] + np.arange(copies.data.shape[1])
        self.bytes.reshape(-1, WORD)[words] = ASYNC_POISON
        self.pending[words] = True
        self.copies.append(copies)

    def finish_copies(self, lanes: Integers, open_groups: int) -> None:
        """Fills the targets of all but the last `open_groups` committed groups of these lanes."""
        waits = np.zeros(len(self.committed), dtype=np.bool_)
        waits[lanes] = True
        remaining = []
        for copies in self.copies:
            done = waits[copies.lanes] & (copies.group < self.committed[copies.lanes] - open_groups)
            if done.any():
                self._land(copies, done)
            if not done.all():
                remaining.append(copies.part(~done))
        self.copies = remaining

    def _land(self, copies: Copies, done: NDArray[np.bool_]) -> None:
        size = copies.data.shape[1] * WORD
        offsets = self.offsets(copies.ctas[done], copies.addresses[done], size)
        words = (offsets // WORD)[:, None] + np.arange(copies.data.shape[1])
        self.pending[words] = False
        self.note_write(copies.lanes[done], copies.ctas[done], offsets, size)
        self.views[WORD][words] = copies.data[done]
