"""The README's server and client run as they stand there, and a signal ends the server without losing a text."""

from __future__ import annotations

import re
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from fptq_export.runtime import Sampling, Session
from tests.serve.serving import SECONDS

README = Path(__file__).parents[2] / "README.md"
ADDRESS = "http://127.0.0.1:8000/v1"
TOKENS = 200


def block(kind: str) -> str:
    """The only block of a kind under the heading."""
    section = (
        README.read_text(encoding="utf-8").partition("## Serve it with an OpenAI client\n")[2].partition("\n## ")[0]
    )
    (text,) = re.findall(rf"^```{kind}\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(text)


@pytest.fixture(scope="module")
def process(chat_run: Path) -> Iterator[subprocess.Popen[str]]:
    """The README's command, on a free port and with the directory that is here."""
    program, verb, *words = shlex.split(block("bash"))
    assert (program, verb, words[0], words[words.index("--port") + 1]) == ("fptq-export", "serve", "run", "8000")
    words[0], words[words.index("--port") + 1] = str(chat_run), "0"
    started = subprocess.Popen(
        [sys.executable, "-m", "fptq_export", verb, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with started:
        yield started
        started.kill()


@pytest.fixture(scope="module")
def session(chat_run: Path) -> Iterator[Session]:
    """What the command opens: the kernels where they are built."""
    with Session.open(chat_run) as opened:
        yield opened


@pytest.fixture(scope="module")
def address(process: subprocess.Popen[str]) -> str:
    """What it prints once it takes connections."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_example_runs(address: str, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The completion is the session's, and the chat streams."""
    source = block("python")
    assert ADDRESS in source
    script = tmp_path / "example.py"
    script.write_text(source.replace(ADDRESS, address), encoding="utf-8")
    runpy.run_path(str(script))
    printed = capsys.readouterr().out
    completion = session.generate("Water is", Sampling(max_tokens=8)).text + "\n"
    assert printed.startswith(completion)
    assert len(printed) > len(completion)


def test_signal_ends_the_server_and_no_text(address: str, process: subprocess.Popen[str], session: Session) -> None:
    """The stream that runs goes on to its end, the exit code is 0, and the last words say what happened."""
    body: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=SECONDS) as client:
        stream = iter(client.completions.create(model="smollm2", prompt="Water is", stream=True, **body))
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        chunks += stream
    own = session.generate("Water is", Sampling(max_tokens=TOKENS, ignore_eos=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == own.text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert process.wait(SECONDS) == 0
    assert process.stderr is not None
    assert "SIGTERM: running texts are finished" in process.stderr.read()
