from __future__ import annotations

import subprocess
import sys
import threading
import time

import numpy as np

from fptq_export.memory import PeakMemory

MEGABYTE = 1 << 20


def _peak_of(megabytes: int) -> int:
    with PeakMemory() as memory:
        block = np.ones(megabytes * MEGABYTE, np.uint8)
        time.sleep(0.1)  # several samples
        del block
    return memory.bytes


def test_peak_sees_a_block_that_is_gone_again() -> None:
    """The figure is the largest, not the last: 200 MB held for a moment are in it."""
    with PeakMemory() as idle:
        pass
    assert _peak_of(200) > idle.bytes + 100 * MEGABYTE


def test_peak_counts_children() -> None:
    """Engines are built in a subprocess: its memory is part of the run."""
    with PeakMemory() as idle:
        pass
    code = f"import time; block = b'x' * (200 * {MEGABYTE}); time.sleep(0.3)"
    with PeakMemory() as memory:
        subprocess.run([sys.executable, "-c", code], check=True)
    assert memory.bytes > idle.bytes + 100 * MEGABYTE


def test_sampling_ends_with_the_block() -> None:
    """No thread is left behind, also when the block fails."""
    before = threading.active_count()
    try:
        with PeakMemory():
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert threading.active_count() == before
