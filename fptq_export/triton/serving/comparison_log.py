"""A line of JSON for each request of a router: who answered, how fast, and what the shadow said."""

from __future__ import annotations

import datetime
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from pydantic import BaseModel, ConfigDict

__all__ = ["Answer", "Comparison", "ComparisonLog", "utc_now"]

_FILE_BYTES, _OLD_FILES = 10_000_000, 4
"""The file and four older ones: 50 MB at most."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Answer(_Model):
    """What one model made of a request."""

    model: str
    outcome: str
    """`stop`, `length`, `cancelled` or `error`."""
    tokens: int
    first_token_seconds: float | None
    seconds: float
    error: str | None = None
    text: str | None = None
    """Only where texts are wanted."""


class Comparison(_Model):
    """A line of the log."""

    time: str
    """UTC, ISO 8601."""
    request_id: str
    reason: str
    """`asked` or `share`."""
    answer: Answer
    shadow: Answer | None = None
    common_tokens: int | None = None
    """Tokens until the answers differ."""
    same: bool | None = None
    """Whether they are the same to the last token."""
    prompt: str | None = None
    """Only where texts are wanted."""


class ComparisonLog:
    """A file of bounded size; threads may write at once.

    Args:
        path: Its directory is made.

    Raises:
        OSError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handler = RotatingFileHandler(path, maxBytes=_FILE_BYTES, backupCount=_OLD_FILES, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def write(self, line: Comparison) -> None:
        """Add a line."""
        text = line.model_dump_json(exclude_none=True)
        self._handler.handle(logging.LogRecord("comparison", logging.INFO, "", 0, text, None, None))

    def close(self) -> None:
        """Close the file."""
        self._handler.close()


def utc_now() -> str:
    """The time of a line."""
    return datetime.datetime.now(tz=datetime.timezone.utc).isoformat(timespec="milliseconds")
