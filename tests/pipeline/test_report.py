"""The report of a real run, from the command line."""

from __future__ import annotations

from pathlib import Path

from tests.pipeline.conftest import SMALL, Command

LINEARS = 14
"""Of two blocks of a LLaMA."""


def test_report_of_a_finished_run(command: Command, run_copy: Path) -> None:
    """The verb writes both files beside the run, names them on stdout, and shows the layers and the engine."""
    done = command("report", run_copy)
    assert done.code == 0, done.err
    assert done.out.splitlines() == [f"file: {run_copy / name}" for name in ("report.html", "report.md")]
    text = (run_copy / "report.md").read_text(encoding="utf-8")
    assert "The proof holds" in text
    assert "| model.layers.1.mlp.down_proj |" in text
    proof = text[text.index("**Every entry of the policy in the engine**") :].partition("## ")[0]
    rows = [line for line in proof.splitlines() if line.startswith("| model.layers.")]
    assert len(rows) == LINEARS
    assert [row for row in rows if "| proven |" not in row and "| partly |" not in row] == []


def test_run_ends_with_the_report(command: Command, tiny_llama_dir: Path, finished_run: Path, run_copy: Path) -> None:
    """`--report` writes it at the end of a run, also of one that is up to date; without it the summary says how."""
    words = (tiny_llama_dir, "-o", run_copy, "--engine", finished_run / "out.plan", *SMALL)
    done = command(*words)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"report: fptq-export report {run_copy}"
    assert not (run_copy / "report.html").exists()
    done = command(*words, "--report")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == f"report: {run_copy / 'report.html'}"
    assert (run_copy / "report.html").is_file()


def test_report_without_a_directory_is_refused(command: Command) -> None:
    """The error names what is missing."""
    done = command("report")
    assert done.code == 1
    assert "DIR: is missing" in done.err
