"""Polygraphy's own command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["run_polygraphy"]

_SECONDS = 120
"""Finds what hangs; a comparison of tiny graphs takes a few."""


def run_polygraphy(*words: object, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    """`polygraphy ...` in a directory; it installs nothing."""
    command = [str(Path(sys.executable).with_name("polygraphy")), *map(str, words)]
    environment = {**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"}
    return subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, timeout=_SECONDS, env=environment
    )
