"""Peak memory and time of a whole run, weights to `model.w4a8.onnx`, of LLaMA-shaped models with more and more layers.

    python -m tests.bench.bench_streaming_memory --directory /tmp/streaming --layers 4 8 16 32

A bench, not a test: no assertion. For each number of layers it writes a random BF16 checkpoint, runs `fptq-export` on
it in a process of its own (no verification, target onnx, random tokens) and removes both. Defaults are the shapes of
LLaMA-7B; they take 34 GB of disk at 32 layers.

The process is watched from outside, in /proc/PID:

* resident: VmHWM, the peak that the kernel keeps, set back when a stage begins. It counts anonymous memory and pages of
  mapped files; the kernel can drop the latter at any time.
* anonymous: the largest RssAnon of the samples, one every 20 ms: what the process itself needs.

Stages are told apart by `manifest.json`, which gets a record when a stage ends; hashing of a stage's inputs counts as
part of it. Page cache is nobody's resident memory and in no figure.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fptq_export.package.manifest import MANIFEST_FILE, read_manifest
from tests.bench.random_llama import LlamaShape, write_random_llama

_INTERVAL_SECONDS = 0.02
_GIGABYTE = 1e9
_RESET_PEAK = "5"
"""Written to clear_refs, it sets VmHWM back to what is resident now (proc_pid_clear_refs(5))."""
STAGES = ("load", "trace", "calibrate", "policy", "rewrite", "package")
"""Stages of a run without verification and engine, in order."""


@dataclass
class StageFigures:
    """What one stage took."""

    seconds: float = 0.0
    resident: int = 0
    """Bytes, as the kernel keeps it."""
    anonymous: int = 0
    """Bytes, largest sample."""


@dataclass
class RunFigures:
    """What one run took."""

    shape: LlamaShape
    checkpoint_bytes: int = 0
    stages: dict[str, StageFigures] = field(default_factory=lambda: {name: StageFigures() for name in STAGES})

    @property
    def resident(self) -> int:
        """Bytes, peak of all stages."""
        return max(stage.resident for stage in self.stages.values())

    @property
    def anonymous(self) -> int:
        """Bytes, largest sample of all stages."""
        return max(stage.anonymous for stage in self.stages.values())

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(stage.seconds for stage in self.stages.values())


def memory_of(pid: int) -> dict[str, int]:
    """Field of /proc/PID/status -> bytes; empty once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = dict(line.split(":", 1) for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in fields.items()}


def watch(process: subprocess.Popen[bytes], run: Path, figures: RunFigures) -> None:
    """Sample a run until it ends."""
    manifest_file, stage, modified = run / MANIFEST_FILE, STAGES[0], 0
    last = time.monotonic()
    while process.poll() is None:
        memory = memory_of(process.pid)
        now = time.monotonic()
        entry = figures.stages[stage]
        entry.seconds += now - last
        last = now
        entry.resident = max(entry.resident, memory.get("VmHWM", 0))
        entry.anonymous = max(entry.anonymous, memory.get("RssAnon", 0))
        if manifest_file.exists() and manifest_file.stat().st_mtime_ns != modified:
            modified = manifest_file.stat().st_mtime_ns
            manifest = read_manifest(run)
            done = manifest.stages if manifest is not None else {}
            begun = next((name for name in STAGES if name not in done), STAGES[-1])
            if begun != stage:
                stage = begun
                Path(f"/proc/{process.pid}/clear_refs").write_text(_RESET_PEAK, encoding="ascii")
        time.sleep(_INTERVAL_SECONDS)


def measure(shape: LlamaShape, directory: Path, arguments: Sequence[str]) -> RunFigures:
    """Write a checkpoint, run `fptq-export` on it and remove both.

    Raises:
        RuntimeError: The run failed.
    """
    model, run = directory / "model", directory / "run"
    figures = RunFigures(shape)
    try:
        figures.checkpoint_bytes = write_random_llama(model, shape)
        command = [sys.executable, "-m", "fptq_export", str(model), "-o", str(run), "--target", "onnx", "--no-verify"]
        with subprocess.Popen([*command, "--calib-dataset", "random", *arguments]) as process:
            watch(process, run, figures)
        if process.returncode:
            raise RuntimeError(f"fptq-export ended with exit code {process.returncode}")
    finally:
        for path in (model, run):
            shutil.rmtree(path, ignore_errors=True)
    return figures


def tables_from_figures(runs: Sequence[RunFigures]) -> tuple[Table, Table]:
    """Memory and time, one row for each number of layers."""
    memory = Table("layers", "BF16 GB", "peak resident GB", "peak anonymous GB", *(f"{name}: GB" for name in STAGES))
    memory.title = "Memory; of each stage: peak resident / anonymous"
    seconds = Table("layers", *STAGES, "all", title="Seconds")
    for run in runs:
        sizes = (run.checkpoint_bytes, run.resident, run.anonymous)
        stages = [run.stages[name] for name in STAGES]
        memory.add_row(
            str(run.shape.layers),
            *(f"{size / _GIGABYTE:.2f}" for size in sizes),
            *(f"{stage.resident / _GIGABYTE:.2f} / {stage.anonymous / _GIGABYTE:.2f}" for stage in stages),
        )
        seconds.add_row(str(run.shape.layers), *(f"{stage.seconds:.0f}" for stage in stages), f"{run.seconds:.0f}")
    return memory, seconds


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="for checkpoints and runs; emptied of both")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument("--weight-method", default="rtn")
    parser.add_argument("--calib-size", type=int, default=4)
    parser.add_argument("--calib-seq", type=int, default=64)
    options = parser.parse_args()
    arguments = ["--dtype", options.dtype, "--weight-method", options.weight_method]
    arguments += ["--calib-size", str(options.calib_size), "--calib-seq", str(options.calib_seq)]
    console = Console(width=160)
    runs = []
    for layers in options.layers:
        shape = LlamaShape(layers, options.hidden, options.intermediate, options.heads, options.vocab)
        runs.append(measure(shape, options.directory, arguments))
        threads = os.environ.get("OMP_NUM_THREADS", "not set")
        title = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, OMP_NUM_THREADS {threads}"
        console.print(f"{title}; hidden {shape.hidden}, intermediate {shape.intermediate}, vocabulary {shape.vocab}")
        console.print(*tables_from_figures(runs), sep="\n")


if __name__ == "__main__":
    main()
