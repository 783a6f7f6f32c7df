"""The CPU image serves: its entry point, with the packages it installs, answers, is healthy and stops in order."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.request import Request, urlopen

import pytest

from fptq_export.runtime import Sampling, Session
from tests.containers.steps import Stage

PROMPT = "The licence of a program"
TOKENS = 4
SECONDS_TO_STOP = 60
"""Finds what hangs: nothing runs when it is told to stop."""


@dataclass(frozen=True)
class Server:
    """A server that the image's entry point started."""

    process: subprocess.Popen[str]
    url: str
    """`http://127.0.0.1:PORT`."""
    environment: Mapping[str, str]


@pytest.fixture(scope="module")
def server(
    images: Mapping[str, Stage], base_image: Mapping[str, str], installed: Path, finished_run: Path
) -> Iterator[Server]:
    """Entry point and arguments of the image, with this machine's run directory, loopback and a free port."""
    stage = images["cpu"]
    program, *words = [*stage.command("ENTRYPOINT"), *stage.command("CMD")]
    here = {"/run-dir": str(finished_run / "run"), "0.0.0.0": "127.0.0.1", "8000": "0"}
    found = shutil.which(program, path=stage.variables["PATH"])
    assert found is not None
    environment = {**base_image, **stage.variables, "PYTHONPATH": str(installed)}
    command = [found, *(here.get(word, word) for word in words)]
    with subprocess.Popen(
        command, env=environment, cwd=stage.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().strip()
        try:
            assert address.endswith("/v1"), process.stderr.read()
            yield Server(process, address.removesuffix("/v1"), environment)
        finally:
            process.kill()


def test_server_completes_as_the_session_does(server: Server, finished_run: Path) -> None:
    """A text over HTTP is the one that this environment, a full install, writes."""
    body = {"model": model_name(server), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    request = Request(f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        answer = json.load(response)
    with Session.open(finished_run / "run", backend="onnxruntime", threads=1) as session:
        expected = session.generate(PROMPT, Sampling(max_tokens=TOKENS))
    assert answer["choices"][0]["text"] == expected.text


def model_name(server: Server) -> str:
    """What the server calls its model."""
    with urlopen(f"{server.url}/v1/models", timeout=60) as response:
        name: str = json.load(response)["data"][0]["id"]
    return name


def health_check(server: Server, images: Mapping[str, Stage]) -> int:
    """The exit code of the image's health check, asked at the server's own port."""
    words = json.loads(images["cpu"].recorded["HEALTHCHECK"].partition("CMD")[2])
    command = [word.replace("127.0.0.1:8000", server.url.removeprefix("http://")) for word in words]
    assert command != words, shlex.join(words)
    done = subprocess.run(command, env=dict(server.environment), capture_output=True, timeout=60, check=False)
    return done.returncode


def test_health_check_passes_while_the_server_runs_and_fails_after(server: Server, images: Mapping[str, Stage]) -> None:
    """SIGTERM, which `docker stop` sends, ends the server with code 0; the check then says that nobody answers."""
    assert health_check(server, images) == 0
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(SECONDS_TO_STOP) == 0
    assert health_check(server, images) != 0
