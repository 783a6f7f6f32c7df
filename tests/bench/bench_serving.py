"""Time to the first token and tokens a second of the CPU variant, against transformers and onnxruntime-genai.

    python -m tests.bench.bench_serving RUN [RUN ...] --json serving.json

A bench, not a test: no assertion about a time. All contenders get the same prompt, write the same number of tokens,
greedily and one text at a time, on the same number of threads; they take turns in one process, in an order that is
turned round every time, so that other work on the machine slows them alike. Medians count. Peak memory is that of a
process that does nothing but open one contender and write one text. On a machine that is busy with other work,
`--clock cpu --threads 1` takes the CPU time of the process for the time: with one thread nothing waits for another.

Ours is a run directory in `fptq_export.runtime.Session`, with the CPU kernels and in stock operators; further runs, say
one with `--exclude ''`, whose head is W4A8 too, are further rows. transformers generates in FP32 from the run's
checkpoint; onnxruntime-genai runs what its own builder makes of the same checkpoint. Target: at least 0.9 of the better
of those two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fptq_export.cpu.build import operators_path
from fptq_export.cpu.extension import BUILD_COMMAND
from fptq_export.files import atomic_path
from tests.bench.serving_contenders import (
    GENAI_MISSING,
    Clock,
    Contender,
    Written,
    build_genai,
    genai,
    has_genai,
    ours,
    transformers,
)

TARGET = 0.9
"""Least ratio to the better peer."""
_CLOCKS: Mapping[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Row:
    """What is known of a contender."""

    name: str
    is_ours: bool
    first_seconds: float
    """Median, to the first token."""
    tokens_per_second: float
    """Median, of those after the first."""
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Spec:
    """A contender that can be opened, here or in a process of its own."""

    name: str
    is_ours: bool
    open: Callable[[], Contender]


def specs(runs: Sequence[Path], peers: Mapping[str, Path], checkpoint: Path, threads: int, clock: Clock) -> list[Spec]:
    """Ours for each run, transformers, and each model of onnxruntime-genai in `peers`."""
    found = []
    for run in runs:
        if operators_path().is_file():
            found.append(Spec(f"ours, {run.name}", True, partial(ours, run, threads, "cpu", clock)))
        found.append(Spec(f"ours, {run.name}, stock operators", True, partial(ours, run, threads, "stock", clock)))
    found.append(Spec("transformers FP32", False, partial(transformers, checkpoint, threads, clock)))
    found += [Spec(f"genai {name}", False, partial(genai, path, threads, clock)) for name, path in peers.items()]
    return found


def measure(
    contenders: Mapping[str, Contender], prompt: NDArray[np.int64], new: int, repeats: int
) -> dict[str, list[Written]]:
    """Let all write in turns; the order is turned round every time, and a first text of each is not counted."""
    for write in contenders.values():
        write(prompt, min(new, 4))
    written: dict[str, list[Written]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(repeats):
        for name in order:
            written[name].append(contenders[name](prompt, new))
        order.reverse()
    return written


def rows(found: Sequence[Spec], written: Mapping[str, Sequence[Written]], peaks: Mapping[str, int | None]) -> list[Row]:
    """Medians."""
    return [
        Row(
            spec.name,
            spec.is_ours,
            statistics.median(text.first for text in written[spec.name]),
            statistics.median(text.rate for text in written[spec.name]),
            peaks.get(spec.name),
        )
        for spec in found
    ]


def ratios(row: Row, all_rows: Sequence[Row]) -> tuple[float, float]:
    """(first token, tokens a second): how many times faster than the better peer; above 1 is faster."""
    peers = [peer for peer in all_rows if not peer.is_ours]
    first = min(peer.first_seconds for peer in peers) / row.first_seconds
    return first, row.tokens_per_second / max(peer.tokens_per_second for peer in peers)


def table(all_rows: Sequence[Row], title: str) -> Table:
    """As it is printed."""
    result = Table("", "first token ms", "tokens/s", "ratio first", "ratio tokens/s", "peak MB", title=title)
    for row in all_rows:
        shown = [f"{value:.2f}" for value in ratios(row, all_rows)] if row.is_ours else ["-", "-"]
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        result.add_row(row.name, f"{row.first_seconds * 1e3:.0f}", f"{row.tokens_per_second:.1f}", *shown, peak)
    return result


def prompt_tokens(run: Path, count: int) -> NDArray[np.int64]:
    """The first tokens of an English text.

    Raises:
        SystemExit: The text has fewer.
    """
    import pydoc_data.topics

    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(run / "tokenizer.json")).encode(pydoc_data.topics.topics["class"]).ids
    if len(ids) < count:
        raise SystemExit(f"the prompt has {len(ids)} tokens, not {count}")
    return np.array(ids[:count], np.int64)


def _peak_of(name: str, arguments: argparse.Namespace, peers: Mapping[str, Path]) -> int:
    """Peak resident bytes of a process that opens one contender and writes one text."""
    command = [sys.executable, "-m", "tests.bench.bench_serving", *map(str, arguments.runs), "--only", name]
    command += ["--checkpoint", str(arguments.checkpoint), "--threads", str(arguments.threads)]
    command += ["--prompt", str(arguments.prompt), "--new", str(arguments.new)]
    command += [word for peer, path in peers.items() for word in ("--genai", f"{peer}={path}")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _peers(arguments: argparse.Namespace, work: Path) -> dict[str, Path]:
    """Models of onnxruntime-genai: those given, or INT4 and FP32 as its builder makes them."""
    if arguments.genai:
        return {name: Path(path) for name, _, path in (text.partition("=") for text in arguments.genai)}
    if not has_genai():
        Console(stderr=True).print(f"left out: {GENAI_MISSING}", highlight=False)
        return {}
    return {
        "INT4": build_genai(arguments.checkpoint, work / "int4", "int4", ("int4_accuracy_level=4",)),
        "FP32": build_genai(arguments.checkpoint, work / "fp32", "fp32"),
    }


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories of one model")
    parser.add_argument("--checkpoint", type=Path, help="safetensors of that model [checkpoint/ of the first run]")
    parser.add_argument("--genai", action="append", metavar="NAME=DIR", help="a model for onnxruntime-genai [built]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to write")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--clock", choices=list(_CLOCKS), default="wall")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--only", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.checkpoint = arguments.checkpoint or arguments.runs[0] / "checkpoint"
    return arguments


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    arguments = parse(words)
    prompt = prompt_tokens(arguments.runs[0], arguments.prompt)
    with tempfile.TemporaryDirectory() as work:
        peers = _peers(arguments, Path(work))
        found = specs(arguments.runs, peers, arguments.checkpoint, arguments.threads, _CLOCKS[arguments.clock])
        if arguments.only:
            next(spec for spec in found if spec.name == arguments.only).open()(prompt, arguments.new)
            sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}\n")  # Linux counts KiB
            return
        if not operators_path().is_file():
            Console(stderr=True).print(f"without the CPU kernels: {BUILD_COMMAND} compiles them", highlight=False)
        peaks = {} if arguments.no_memory else {spec.name: _peak_of(spec.name, arguments, peers) for spec in found}
        written = measure({spec.name: spec.open() for spec in found}, prompt, arguments.new, arguments.repeats)
    result = rows(found, written, peaks)
    machine = platform.processor() or platform.machine()
    title = f"{machine}, {arguments.threads} threads, {arguments.clock} time, {arguments.prompt} tokens"
    Console().print(table(result, f"{title} + {arguments.new}, {arguments.repeats} times; target {TARGET}"))
    if arguments.json:
        with atomic_path(arguments.json) as unfinished:
            unfinished.write_text(json.dumps([asdict(row) for row in result], indent=2))


if __name__ == "__main__":
    main()
