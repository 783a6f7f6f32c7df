"""Numbers as people read them, and cells of tables."""

from __future__ import annotations

from fptq_export.report.blocks import Cell

__all__ = ["MIB", "integer", "mib", "number", "plural", "text"]

MIB = 1 << 20


def number(value: float | None, digits: str = ".4g") -> Cell:
    """A number; nothing is a dash."""
    return Cell("–") if value is None else Cell(f"{value:{digits}}", value)


def integer(value: int) -> Cell:
    """A whole number."""
    return Cell(str(value), float(value))


def text(words: str | None) -> Cell:
    """Words; nothing is a dash."""
    return Cell(words or "–")


def mib(count: int) -> str:
    """Bytes in MiB, or in KiB where that is less than one."""
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / 1024:.1f} KiB"


def plural(count: int, noun: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
