"""The builder's log: `[E] text`, `[W] text`, `[I] text`, `[V] text`; a message may run over several lines."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

__all__ = ["SEVERITY_MARKS", "last_lines_from_log", "messages_from_log", "text_from_message"]

SEVERITY_MARKS = ("F", "E", "W", "I", "V")
"""Mark of each severity, in the order of TensorRT's `ILogger.Severity` (0 is an internal error)."""

_START = re.compile(r"\[([FEWIV])\] (.*)", re.DOTALL)


def text_from_message(severity: int, message: str) -> str:
    """A message as it stands in the log."""
    return f"[{SEVERITY_MARKS[severity]}] {message}\n"


def messages_from_log(path: Path, marks: str) -> Iterator[str]:
    """Messages of the given severities, each once, in order of first appearance."""
    seen: dict[str, None] = {}
    wanted = False
    text = ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            start = _START.match(line)
            if start is None:
                text += line if wanted else ""
                continue
            if wanted:
                seen.setdefault(text.strip())
            wanted = start[1] in marks
            text = start[2] if wanted else ""
    if wanted:
        seen.setdefault(text.strip())
    yield from seen


def last_lines_from_log(path: Path, count: int) -> list[str]:
    """The last lines with anything in them; at most the final 64 KiB of the file are read."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read().decode("utf-8", errors="replace")
    return [line for line in tail.splitlines() if line.strip()][-count:]
