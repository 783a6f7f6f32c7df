"""Many mixed requests at once against a Triton text model: `python load_test.py models --model NAME`.

Each kind of request is first sent alone. Then all of them come at once, half over gRPC streams and half over HTTP, and
every answer must be the one that was given alone. The server is started here, on free ports of the loopback address,
and ended with SIGTERM; with `--http` and `--grpc` one that runs already is asked, and its memory is not looked at.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tritonclient.grpc as triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

SUBJECTS = (
    "Water",
    "The sea",
    "A protein",
    "An enzyme",
    "The library",
    "Music",
    "A compiler",
    "The moon",
    "Bread",
    "Iron",
)
ENDINGS = ("is", "is made of", "was first", "can be", "and")
SPECS = 25
SECONDS = 600.0
START_SECONDS = 300.0


@dataclass(frozen=True)
class Spec:
    """One kind of request."""

    prompt: str
    max_tokens: int
    seed: int | None
    """Sampled with this seed; greedy without one."""

    def body(self) -> dict[str, Any]:
        """Inputs of the text model."""
        sampled = {} if self.seed is None else {"temperature": 1.0, "top_p": 0.5, "seed": self.seed}
        return {"text_input": self.prompt, "max_tokens": self.max_tokens, **sampled}


@dataclass(frozen=True)
class Outcome:
    """What came of one request."""

    interface: str
    text: str
    tokens: int
    seconds: float
    arrivals: tuple[float, ...]
    """Seconds from the request to each token; empty over HTTP, where all come at once."""
    error: str = ""


@dataclass(frozen=True)
class Server:
    """Where it listens."""

    http: str
    grpc: str
    process: psutil.Process | None = None

    def memory(self) -> int:
        """Resident bytes of the server and its models; 0 for one that was not started here."""
        if self.process is None:
            return 0
        return sum(item.memory_info().rss for item in (self.process, *self.process.children(recursive=True)))


def specs() -> list[Spec]:
    """Mixed lengths, greedy and sampled."""
    found = []
    for number in range(SPECS):
        prompt = f"{SUBJECTS[number % len(SUBJECTS)]} {ENDINGS[number // 5]}"
        found.append(Spec(prompt, 4 + number % 13, number if number % 3 == 0 else None))
    return found


def over_http(server: Server, model: str, spec: Spec) -> Outcome:
    """One answer in one reply."""
    request = urllib.request.Request(
        f"http://{server.http}/v2/models/{model}/generate", json.dumps(spec.body()).encode()
    )
    started = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:
            found = json.load(reply)
    except urllib.error.HTTPError as error:
        return Outcome("http", "", 0, time.perf_counter() - started, (), error.read().decode())
    except OSError as error:
        return Outcome("http", "", 0, time.perf_counter() - started, (), str(error))
    ids = np.atleast_1d(found["token_ids"])
    return Outcome("http", found["text_output"], len(ids), time.perf_counter() - started, ())


def over_grpc(server: Server, model: str, spec: Spec) -> Outcome:
    """Token by token, over a stream of its own."""
    kinds = {"max_tokens": "INT32", "temperature": "FP32", "top_p": "FP32", "seed": "INT64", "stream": "BOOL"}
    types = {"INT32": np.int32, "FP32": np.float32, "INT64": np.int64, "BOOL": np.bool_}
    inputs = [triton.InferInput("text_input", [1], "BYTES")]
    inputs[0].set_data_from_numpy(np.array([spec.prompt.encode()], np.object_))
    for name, value in {**spec.body(), "stream": True}.items():
        if name in kinds:
            inputs.append(triton.InferInput(name, [1], kinds[name]))
            inputs[-1].set_data_from_numpy(np.array([value], types[kinds[name]]))
    responses: queue.Queue[tuple[Any, Any]] = queue.Queue()
    text, reason = "", ""
    arrivals: list[float] = []
    started = time.perf_counter()
    with triton.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: responses.put((result, error)), stream_timeout=SECONDS)
        client.async_stream_infer(model, inputs)
        while not reason:
            try:
                result, error = responses.get(timeout=SECONDS)
            except queue.Empty:
                result, error = None, f"nothing came for {SECONDS:.0f} s"
            if error is not None:
                return Outcome("grpc", text, len(arrivals), time.perf_counter() - started, (), str(error))
            arrivals.append(time.perf_counter() - started)
            text += result.as_numpy("text_output")[0].decode()
            reason = result.as_numpy("finish_reason")[0].decode()
        client.stop_stream()
    return Outcome("grpc", text, len(arrivals), arrivals[-1], tuple(arrivals))


def all_at_once(
    server: Server, model: str, kinds: list[Spec], requests: int, concurrency: int
) -> tuple[list[tuple[Spec, Outcome]], float]:
    """Send all requests, so many at a time; outcomes, and seconds."""
    gate = threading.Barrier(min(concurrency, requests))

    def one(number: int) -> tuple[Spec, Outcome]:
        spec = kinds[number % len(kinds)]
        if number < gate.parties:  # the first of each thread: they begin together
            gate.wait()
        ask = over_grpc if number // len(kinds) % 2 == 0 else over_http
        return spec, ask(server, model, spec)

    started = time.perf_counter()
    with ThreadPoolExecutor(gate.parties) as pool:
        outcomes = list(pool.map(one, range(requests)))
    return outcomes, time.perf_counter() - started


def percentiles(values: list[float]) -> dict[str, float]:
    """Milliseconds at 50, 90 and 99 %."""
    return {f"p{part}": float(np.percentile(values, part)) * 1000.0 for part in (50, 90, 99)} if values else {}


def figures(outcomes: list[tuple[Spec, Outcome]], alone: dict[Spec, str], seconds: float) -> dict[str, Any]:
    """What the table prints."""
    found = [outcome for _, outcome in outcomes]
    streams = [outcome for outcome in found if outcome.arrivals]
    gaps = [float(gap) for outcome in streams for gap in np.diff(outcome.arrivals)]
    return {
        "requests": len(found),
        "lost": sum(bool(outcome.error) for outcome in found),
        "wrong": sum(not outcome.error and outcome.text != alone[spec] for spec, outcome in outcomes),
        "errors": sorted({outcome.error for outcome in found if outcome.error})[:5],
        "seconds": seconds,
        "requests_per_second": len(found) / seconds,
        "tokens_per_second": sum(outcome.tokens for outcome in found) / seconds,
        "first_token_ms": percentiles([outcome.arrivals[0] for outcome in streams]),
        "inter_token_ms": percentiles(gaps),
        "request_ms": percentiles([outcome.seconds for outcome in found]),
    }


def print_figures(rounds: list[dict[str, Any]], console: Console) -> None:
    """A column for each round."""
    table = Table("", *(f"round {number}" for number, _ in enumerate(rounds, start=1)))
    for name in ("requests", "lost", "wrong"):
        table.add_row(name, *(str(one[name]) for one in rounds))
    for name in ("requests_per_second", "tokens_per_second"):
        table.add_row(name.replace("_", " "), *(f"{one[name]:.1f}" for one in rounds))
    for name in ("first_token_ms", "inter_token_ms", "request_ms"):
        for part in ("p50", "p90", "p99"):
            cells = (f"{one[name][part]:.1f}" if one[name] else "" for one in rounds)
            table.add_row(f"{name.removesuffix('_ms').replace('_', ' ')} {part}, ms", *cells)
    if rounds[0]["memory_bytes"]:
        table.add_row("server memory, MiB", *(f"{one['memory_bytes'] / 2**20:.0f}" for one in rounds))
    console.print(table)


@contextmanager
def started_server(repository: Path) -> Iterator[Server]:
    """`start.sh` of a repository, until it is ready; ended with SIGTERM."""
    ports = free_ports(3)
    words = [
        word for kind, port in zip(("http", "grpc", "metrics"), ports, strict=True) for word in words_of(kind, port)
    ]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with Path("server.log").open("wb") as log:
        command = [str(repository / "start.sh"), *words]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            server = Server(f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}", psutil.Process(process.pid))
            wait_until_ready(server, process)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(SECONDS)


def words_of(kind: str, port: int) -> list[str]:
    """Options of the server."""
    return [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]


def free_ports(count: int) -> list[int]:
    """Ports nobody listens at."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


def wait_until_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Poll its health."""
    end = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://{server.http}/v2/health/ready", timeout=SECONDS):
                return
        except OSError:
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit("the server does not start; server.log says why") from None
            time.sleep(0.2)


def measure(server: Server, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Each kind alone, then the rounds."""
    kinds = specs()
    alone: dict[Spec, str] = {}
    for spec in track(kinds, "alone", console=console, disable=not console.is_terminal):
        outcome = over_grpc(server, options.model, spec)
        if outcome.error:
            raise SystemExit(f"{spec.prompt!r}: {outcome.error}")
        alone[spec] = outcome.text
    rounds = []
    for number in range(options.rounds):
        console.print(f"round {number + 1}: {options.requests} requests, {options.concurrency} at a time ...")
        outcomes, seconds = all_at_once(server, options.model, kinds, options.requests, options.concurrency)
        rounds.append({**figures(outcomes, alone, seconds), "memory_bytes": server.memory()})
    return {"model": options.model, "concurrency": options.concurrency, "rounds": rounds}


def main(arguments: list[str]) -> int:
    """Run the test; 1 if a request was lost or answered otherwise than alone."""
    quick = bool(os.environ.get("FPTQ_SAMPLE_QUICK"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", nargs="?", help="model repository; its server is started")
    parser.add_argument("--model", required=True, help="name of the text model")
    parser.add_argument("--http", metavar="HOST:PORT", help="of a server that runs already")
    parser.add_argument("--grpc", metavar="HOST:PORT", help="of the same server")
    parser.add_argument("--requests", type=int, default=200, help="in a round [200]")
    parser.add_argument("--concurrency", type=int, default=200, help="at a time [200]")
    parser.add_argument("--rounds", type=int, default=2 if quick else 3, help="[3]")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    if options.http and options.grpc:
        report = measure(Server(options.http, options.grpc), options, console)
    elif options.repository:
        with started_server(Path(options.repository).absolute()) as server:
            report = measure(server, options, console)
    else:
        parser.error("give a repository, or --http and --grpc")
    Path("load_test.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_figures(report["rounds"], Console())
    return int(any(one["lost"] or one["wrong"] for one in report["rounds"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
