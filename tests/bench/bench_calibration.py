"""Calibration and INT4 weights against NVIDIA Model Optimizer's INT4 AWQ: time and peak memory, as ratios.

    python -m tests.bench.bench_calibration MODEL [--rounds 1] [--json FILE]

A bench, not a test. What counts goes from a float checkpoint on disk to quantized weights: calibration and policy for
us (both files of each written), loading and `mtq.quantize` for ModelOpt (W4A16; scales stay in memory). All run on the
same tokens with the same number of threads, each in a process of its own, one after the other; of several rounds the
best time and the least memory count. The fold sites are found once before, and imports are timed apart.

Wall time suffers from other work on the machine, CPU time (user + system, all threads) hardly does. Memory is
ru_maxrss of the process. Linux lets a new process inherit that figure from the one that started it, so this one loads
nothing large. Targets: ours / ModelOpt 0.25 in time and 0.5 in memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fptq_export.errors import ExitCode, UserError
from fptq_export.files import write_text
from tests.bench.calibration_contenders import CONTENDERS, Figures, argument_parser

OURS = [name for name in CONTENDERS if name.startswith("ours")]
PEERS = [name for name in CONTENDERS if name.startswith("ModelOpt")]
TARGETS = {"time": 0.25, "memory": 0.5}
"""Largest ours / ModelOpt."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[argument_parser()]
    )
    parser.add_argument("model", help="Hugging Face directory, hub id or .gguf file")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each contender, in turns (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    try:
        run(parser.parse_args(arguments), Console())
    except UserError as error:
        Console(stderr=True, highlight=False).print(f"error: {error}", soft_wrap=True, markup=False)
        return int(error.exit_code)
    return int(ExitCode.OK)


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure every contender and print the table.

    Raises:
        UserError: ModelOpt is not installed, or a contender failed.
    """
    if importlib.util.find_spec("modelopt") is None:
        raise UserError("bench_calibration", "ModelOpt, its baseline, is not installed", "pip install nvidia-modelopt")
    figures_of("prepare", options)
    figures: dict[str, Figures] = {}
    for _ in range(options.rounds):
        for name in OURS + PEERS:
            now = figures_of(name, options)
            figures[name] = best(figures.get(name, now), now)
            console.print(f"{name}: {now.wall_seconds:.1f} s, {now.peak_bytes / 1e6:.0f} MB", highlight=False)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("nvidia-modelopt", "torch", "transformers"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads"
    console.print(f"{machine}; {versions}", highlight=False)
    console.print(table_from_figures(figures, f"{options.calib_size} x {options.calib_seq} tokens"))
    if options.json is not None:
        result = {name: asdict(item) for name, item in figures.items()}
        write_text(json.dumps(result, indent=2) + "\n", options.json)


def figures_of(name: str, options: argparse.Namespace) -> Figures:
    """Run a contender in a process of its own.

    Raises:
        UserError: It failed; says how it ended.
    """
    handed_on = ("workdir", "calib_dataset", "calib_size", "calib_seq", "group_size", "threads", "model")
    words = [f"--{option.replace('_', '-')}={getattr(options, option)}" for option in handed_on]
    # Threads that wait for work would count as busy.
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "tests.bench.calibration_contenders", name, *words, f"--json={result}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not result.is_file():
            raise UserError(f"contender {name!r}", f"ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return Figures(**json.loads(result.read_text(encoding="utf-8")))


def best(first: Figures, second: Figures) -> Figures:
    """The smaller of each figure."""
    return Figures(
        **{field.name: min(getattr(first, field.name), getattr(second, field.name)) for field in fields(Figures)}
    )


def table_from_figures(figures: Mapping[str, Figures], tokens: str) -> Table:
    """One line a contender: figures, then ours / theirs with the better of the peer's runs for each figure."""
    peers = [figures[name] for name in PEERS if name in figures]
    table = Table(title=f"checkpoint to INT4 weights, {tokens}", caption=f"targets: {TARGETS}")
    table.add_column("contender", no_wrap=True)
    for column in ("import s", "wall s", "CPU s", "MB", "wall ratio", "CPU ratio", "MB ratio"):
        table.add_column(column, justify="right")
    for name, item in figures.items():
        cells = [f"{item.import_seconds:.1f}", f"{item.wall_seconds:.1f}", f"{item.cpu_seconds:.1f}"]
        cells.append(f"{item.peak_bytes / 1e6:.0f}")
        for figure in ("wall_seconds", "cpu_seconds", "peak_bytes"):
            baseline = min(getattr(peer, figure) for peer in peers)
            cells.append(f"{getattr(item, figure) / baseline:.3f}")
        table.add_row(name, *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
