"""Run the command line as several processes would, without torchrun: this module, run as a script, forks them.

Importing torch and transformers takes longer than what is tested. The script runs one command itself, after which all
is imported, and forks every process of every scenario. It has no thread that a fork would lose (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Scenario", "ScenarioResult", "run_scenarios"]

_SECONDS = 120
"""After which processes that still run are taken for hung."""


@dataclass(frozen=True)
class Scenario:
    """One launch."""

    name: str
    ranks: int
    words: tuple[str, ...]
    """The command line of each process."""
    mischief: str = ""
    """What the last rank does in the second block: `nan`, `bug`, `kill`, or nothing."""


@dataclass(frozen=True)
class ScenarioResult:
    """What its processes did, by rank."""

    codes: list[int]
    """Exit codes; negative: the signal that ended the process."""
    errors: list[str]
    """What each wrote to stderr."""
    blocks: list[list[int]]
    """Decoder blocks that each ran over its windows."""


def run_scenarios(directory: Path, first: Sequence[str], scenarios: Sequence[Scenario]) -> dict[str, ScenarioResult]:
    """Run a command in one process, then launches one after the other.

    Args:
        directory: A folder for each launch is made there.
        first: Words of the command.
        scenarios: The launches.

    Returns:
        The result of each launch, by name.
    """
    words = [[item.name, str(item.ranks), item.mischief, *item.words] for item in scenarios]
    (directory / "scenarios.json").write_text(json.dumps([list(first), *words]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", __name__, str(directory)], env=environment, check=True)
    return {item.name: _result(directory / item.name, item.ranks) for item in scenarios}


def _result(directory: Path, ranks: int) -> ScenarioResult:
    blocks = [_text(directory / f"blocks-{rank}").split() for rank in range(ranks)]
    return ScenarioResult(
        codes=json.loads((directory / "codes.json").read_text()),
        errors=[_text(directory / f"stderr-{rank}") for rank in range(ranks)],
        blocks=[[int(index) for index in indices] for indices in blocks],
    )


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _main(directory: Path) -> None:
    import calib.torch_ranks
    import fptq_export.pipeline.ranks
    from fptq_export.cli import main

    assert calib.torch_ranks, fptq_export.pipeline.ranks  # imported before the fork
    first, *scenarios = json.loads((directory / "scenarios.json").read_text())
    assert main(first) == 0
    for name, ranks, mischief, *words in scenarios:
        target = directory / name
        target.mkdir()
        port = _free_port()
        children = [_fork(target, rank, int(ranks), port, mischief, words) for rank in range(int(ranks))]
        (target / "codes.json").write_text(json.dumps(_exit_codes(children)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fork(directory: Path, rank: int, ranks: int, port: int, mischief: str, words: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo"
    )
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(directory / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT), descriptor)
    from fptq_export.cli import main

    _watch_blocks(directory / f"blocks-{rank}", mischief if rank == ranks - 1 else "")
    code = main(words)
    sys.stderr.flush()
    os._exit(code)


def _watch_blocks(path: Path, mischief: str) -> None:
    """Write down every block that runs; do something in the second."""
    from calib.stream import BlockStream

    advance = BlockStream.advance

    def watched(stream: BlockStream, index: int, block: Any) -> Iterator[int]:
        with path.open("a") as file:
            file.write(f"{index} ")
        if index == 1 and mischief == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 1 and mischief == "bug":
            raise RuntimeError("a planted bug")
        if index == 1 and mischief == "nan":
            next(block.parameters()).data.fill_(float("nan"))
        return advance(stream, index, block)

    BlockStream.advance = watched  # type: ignore[method-assign, assignment]


def _exit_codes(children: list[int]) -> list[int]:
    deadline = time.monotonic() + _SECONDS
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > deadline:
            for hung in set(children) - set(codes):
                os.kill(hung, signal.SIGKILL)
            deadline = float("inf")
        else:
            time.sleep(0.01)
    return [codes[child] for child in children]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
