"""What the kernel knows about this process's memory."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

__all__ = ["PeakAnonymous", "is_mapped"]

_INTERVAL_SECONDS = 0.002


def is_mapped(path: Path) -> bool:
    """Whether a file is mapped into this process: its pages then count as resident memory."""
    return str(path.resolve()) in Path("/proc/self/maps").read_text(encoding="utf-8")


class PeakAnonymous:
    """Samples RssAnon in a thread; `bytes` is the largest value seen."""

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakAnonymous:
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
        while not self._stop.wait(_INTERVAL_SECONDS):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            (anonymous,) = (int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
            self.bytes = max(self.bytes, anonymous * 1024)
