"""Kill the command line right before a file gets its final name: this module, run as a script, forks each such run.

As `forked_ranks`: importing and tracing take longer than what is tested, so both are done once, before the forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["KilledRun", "kill_before_renames"]

KilledRun = tuple[int, bool]
"""How a run ended (the signal, negative, or its exit code), and whether the file had its final name then."""


def kill_before_renames(model: Path, files: Sequence[Path], words: Sequence[str]) -> list[KilledRun]:
    """Run one command again and again; each run ends with SIGKILL before one of the files appears.

    Args:
        model: What the command exports, for the trace.
        files: In the order in which the command writes them.
        words: The command line.
    """
    job = json.dumps([str(model), [str(file) for file in files], list(words)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", __name__, job]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [(code, exists) for code, exists in json.loads(done.stdout.splitlines()[-1])]


def _main(model: str, files: list[str], words: list[str]) -> None:
    import onnxruntime
    from transformers import AutoConfig

    import fptq_export.pipeline.road
    from fptq_export.pipeline.environment import library_versions
    from fptq_export.trace import from_hf
    from tests.support.trace_once import remembered

    assert onnxruntime, fptq_export.pipeline.road  # imported before the fork
    library_versions()
    from_hf.traced_from_config = remembered(from_hf.traced_from_config)
    from_hf.traced_from_config(AutoConfig.from_pretrained(model), "fp16")
    results = []
    for file in files:
        child = os.fork()
        if child == 0:
            _run_until(Path(file), words)
        results.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), Path(file).exists()))
    sys.stdout.write(json.dumps(results))


def _run_until(file: Path, words: list[str]) -> None:
    from fptq_export.cli import main

    replace = os.replace

    def killing_replace(source: str | Path, destination: str | Path) -> None:
        if Path(destination).name == file.name:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, destination)

    os.replace = killing_replace  # type: ignore[assignment]  # the options of the original are not used
    os.dup2(2, 1)
    os._exit(main(words))


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
