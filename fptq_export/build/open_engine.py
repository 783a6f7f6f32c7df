"""Opens an engine with the TensorRT of this machine, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from fptq_export.build.engine import environment_of_worker
from fptq_export.build.loader_path import loader_environment
from fptq_export.build.opener import HOST_CODE
from fptq_export.build.targets import Target

__all__ = ["Opened", "open_engine"]

_OPENER = "fptq_export.build.opener"
_SHOWN_LINES = 5


@dataclass(frozen=True)
class Opened:
    """What came of it."""

    library_version: str | None
    """None where the library cannot be imported."""
    opened: bool
    """False also where no engine was given."""
    layers: str
    """The engine's layers, as the inspector prints them."""
    errors: tuple[str, ...]


def open_engine(
    target: Target, engine: Path | None = None, plugin: Path | None = None, *, host_code: bool = False
) -> Opened:
    """Import the library of a target and, where an engine is given, open it.

    Args:
        target: `tensorrt` or `tensorrt-rtx`.
        engine: The engine's file.
        plugin: Library of the plugins it needs.
        host_code: Whether code that the engine brings may run, as `deserialized_engine` says.
    """
    words = [str(path.absolute()) for path in (engine, plugin) if path is not None]
    words += [HOST_CODE] if host_code else []
    with ExitStack() as stack:
        loader = stack.enter_context(loader_environment(target)) if plugin is not None else {}
        done = subprocess.run(
            [sys.executable, "-m", _OPENER, str(target), *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**environment_of_worker(), **loader},
        )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-_SHOWN_LINES:]
        return Opened(None, False, "", (f"the process that opened it ended with code {done.returncode}", *said))
    answer = json.loads(done.stdout)
    return Opened(answer["version"], answer["opened"], answer["layers"], tuple(answer["errors"]))
