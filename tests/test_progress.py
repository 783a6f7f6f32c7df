from __future__ import annotations

import io

import pytest
from rich.console import Console

from fptq_export.progress import ConsoleProgress, NoProgress


def test_nothing_is_reported_where_nobody_asked() -> None:
    """The silent progress takes every call."""
    with NoProgress().task("work", total=3, unit="tokens") as task:
        task.advance()
        task.update(2, total=5)


def test_a_log_gets_two_lines() -> None:
    """Away from a terminal a task is a line when it starts and one with its time when it ends: no control codes."""
    text = io.StringIO()
    with ConsoleProgress(Console(file=text, force_terminal=False)).task("Tracing [bold]", total=None) as task:
        task.advance()
        task.update(1, total=2)
    first, second = text.getvalue().splitlines()
    assert first == "Tracing [bold] ..."
    assert second.startswith("Tracing [bold]: ")
    assert "\x1b" not in text.getvalue()


def test_a_terminal_gets_a_bar_with_a_rate() -> None:
    """On a terminal the bar shows how many there are, and units a second."""
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160)
    with ConsoleProgress(console).task("Calibrating", total=200, unit="tokens") as task:
        task.advance(100)
        task.update(200)
    assert "Calibrating" in text.getvalue()
    assert "200/200" in text.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_errors_pass_through(terminal: bool) -> None:
    """A task that fails ends its bar and raises what it raised."""
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with pytest.raises(ZeroDivisionError), ConsoleProgress(console).task("work", total=1):
        raise ZeroDivisionError
