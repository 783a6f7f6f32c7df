"""The README's way from a run to streamed tokens works as it stands there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.triton_server import free_ports

README = Path(__file__).parents[2] / "README.md"
SECONDS = 300
ANSWER = re.compile(r'\{"finish_reason":.*?"token_ids":(?:\[[0-9,]*\]|[0-9]+)\}')


def test_commands_run(finished_run: Path, triton_wheel: None, tmp_path: Path) -> None:
    """On a run directory called `run`; the ports are free ones, and of the loopback address alone."""
    if shutil.which("curl") is None:
        pytest.skip("the README's commands need curl")
    section = README.read_text(encoding="utf-8").partition("## Serve it with Triton\n")[2].partition("\n## ")[0]
    (script,) = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    for port, free in zip(("8000", "8001", "8002"), free_ports(3), strict=True):
        assert port in script
        script = script.replace(port, str(free))
    loopback = " ".join(f"--{kind}-address 127.0.0.1" for kind in ("http", "grpc", "metrics"))
    script = script.replace("start.sh", f"start.sh {loopback}").replace("localhost", "127.0.0.1")
    shutil.copytree(finished_run / "run", tmp_path / "run")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    answers = [json.loads(answer) for answer in ANSWER.findall(done.stdout)]
    assert [answer["finish_reason"] for answer in answers] == ["length", *[""] * 7, "length"]
    assert "".join(answer["text_output"] for answer in answers[1:]) == answers[0]["text_output"]
    assert (tmp_path / "models" / "smollm2" / "2" / "model.py").is_file()
