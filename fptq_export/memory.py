"""Resident memory of this process and its children, while a block runs."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil

__all__ = ["PeakMemory"]

_INTERVAL_SECONDS = 0.02


class PeakMemory:
    """Samples resident memory in a thread; `bytes` is the largest sum seen.

    A sample counts pages shared between processes once for each, and misses peaks shorter than the interval; the
    figure is for people who plan a machine, within a few per cent of what the kernel accounts.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        """Start sampling."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop sampling."""
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        process = psutil.Process()
        while True:
            self.bytes = max(self.bytes, _resident_bytes(process))
            if self._stop.wait(_INTERVAL_SECONDS):
                return


def _resident_bytes(process: psutil.Process) -> int:
    total: int = process.memory_info().rss
    for child in process.children(recursive=True):
        try:
            total += child.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total
