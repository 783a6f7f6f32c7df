"""The real Triton server, on free ports of the loopback address."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Reply", "TritonServer", "free_ports"]

_HOST = "127.0.0.1"
_SHARED_MEMORY = Path("/dev/shm")
_START_SECONDS = 120
_STOP_SECONDS = 30
_REQUEST_SECONDS = 60


@dataclass(frozen=True)
class Reply:
    """What came back over HTTP."""

    status: int
    text: str

    @property
    def document(self) -> Any:
        """The body, as JSON."""
        return json.loads(self.text)

    @property
    def events(self) -> list[Any]:
        """The documents of a stream of server-sent events."""
        return [json.loads(line[len("data: ") :]) for line in self.text.splitlines() if line.startswith("data: ")]


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody has."""
    sockets = [socket.socket() for _ in range(count)]
    for item in sockets:
        item.bind((_HOST, 0))
    ports = [item.getsockname()[1] for item in sockets]
    for item in sockets:
        item.close()
    return ports


@dataclass
class TritonServer:
    """A server on a repository.

    Args:
        command: What starts it; options go behind.
        environment: Of the process.
        log: Where its output goes.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def _shared_memory(self) -> str:
        """What the names of its regions begin with."""
        return f"triton-test-{self.http_port}-"

    @property
    def grpc_address(self) -> str:
        """For tritonclient."""
        return f"{_HOST}:{self.grpc_port}"

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        options = [
            *(f"--{kind}-address={_HOST}" for kind in ("http", "grpc", "metrics")),
            *(f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}", f"--metrics-port={self.metrics_port}"),
            "--exit-timeout-secs=5",
            f"--backend-config=python,shm-region-prefix-name={self._shared_memory}",
        ]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command, *options],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its models' processes end with it
            )
        end = time.monotonic() + _START_SECONDS
        while not self.is_ready():
            assert self._process.poll() is None, f"the server ended:\n{self.log_text()[-4000:]}"
            assert time.monotonic() < end, f"the server is not ready:\n{self.log_text()[-4000:]}"
            time.sleep(0.05)

    def stop(self) -> int:
        """Ask it to end, and wait; its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return code

    def kill(self) -> None:
        """End it and its models' processes at once, and remove the shared memory that they could not."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(_STOP_SECONDS)
        for region in _SHARED_MEMORY.glob(f"{self._shared_memory}*"):
            region.unlink()

    def log_text(self) -> str:
        """What it has said."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def is_ready(self) -> bool:
        """Whether it answers, and every model it was to load is loaded."""
        return self._is_healthy("ready")

    def is_live(self) -> bool:
        """Whether it answers."""
        return self._is_healthy("live")

    def _is_healthy(self, how: str) -> bool:
        try:
            return self.get(f"/v2/health/{how}").status == 200
        except OSError:
            return False

    def get(self, path: str) -> Reply:
        """A GET request."""
        return self._sent(urllib.request.Request(self._url(path)))

    def post(self, path: str, body: bytes | Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Reply:
        """A POST request of bytes or of JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self._sent(urllib.request.Request(self._url(path), data, dict(headers or {})))

    def load(self, name: str) -> Reply:
        """Load a model, or load it again."""
        return self.post(f"/v2/repository/models/{name}/load", {})

    def unload(self, name: str) -> Reply:
        """Unload a model."""
        return self.post(f"/v2/repository/models/{name}/unload", {})

    def _url(self, path: str) -> str:
        return f"http://{_HOST}:{self.http_port}{path}"

    def _sent(self, request: urllib.request.Request) -> Reply:
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as reply:
                return Reply(reply.status, reply.read().decode())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, error.read().decode())
