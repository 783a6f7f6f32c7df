"""The README's example runs as it stands there."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def test_example_runs(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a run directory called `run`, as the example says: the backend, a text, a streamed text, three texts."""
    section = README.read_text(encoding="utf-8").partition("## Running it from Python\n")[2]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert example is not None
    script = tmp_path / "example.py"
    script.write_text(example.group(1), encoding="utf-8")
    monkeypatch.chdir(finished_run)
    runpy.run_path(str(script))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(("onnxruntime", "tensorrt"))
    assert lines[-1].endswith("]")
