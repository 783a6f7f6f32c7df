"""Progress bars: one small interface for every stage, drawn by rich on a terminal, one line a task elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.progress import Task as RichTask
from rich.text import Text

__all__ = ["ConsoleProgress", "NoProgress", "Progress", "Task"]


class Task(Protocol):
    """A running task."""

    def advance(self, amount: float = 1.0) -> None:
        """Add to what is done."""

    def update(self, completed: float, total: float | None = None) -> None:
        """Set what is done, and what there is to do once that is known."""


class Progress(Protocol):
    """Where stages report how far they are."""

    def task(self, description: str, total: float | None, unit: str = "") -> AbstractContextManager[Task]:
        """Open a task; `total` None means unknown, `unit` names what is counted (`tokens`)."""


class _SilentTask:
    def advance(self, amount: float = 1.0) -> None:
        """Ignore."""

    def update(self, completed: float, total: float | None = None) -> None:
        """Ignore."""


class NoProgress:
    """Reports nothing."""

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Task]:
        """Open a task that nobody sees."""
        yield _SilentTask()


class _RateColumn(ProgressColumn):
    """How many units a second."""

    def render(self, task: RichTask) -> Text:
        unit = task.fields.get("unit", "")
        if not unit or task.speed is None:
            return Text("")
        return Text(f"{task.speed:,.0f} {unit}/s")


class _BarTask:
    def __init__(self, bars: RichProgress, description: str, total: float | None, unit: str) -> None:
        self._bars = bars
        self._id = bars.add_task(description, total=total, unit=unit)

    def advance(self, amount: float = 1.0) -> None:
        self._bars.advance(self._id, amount)

    def update(self, completed: float, total: float | None = None) -> None:
        self._bars.update(self._id, completed=completed, total=total)


class ConsoleProgress:
    """Bars with rate and remaining time on a terminal; a start and an end line for each task elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Task]:
        """Draw a bar until the block ends."""
        started = time.monotonic()
        if not self._console.is_terminal:
            self._console.print(f"{description} ...", markup=False, highlight=False)
            yield _SilentTask()
            self._console.print(f"{description}: {time.monotonic() - started:.1f} s", markup=False, highlight=False)
            return
        bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        with bars:
            yield _BarTask(bars, description, total, unit)
