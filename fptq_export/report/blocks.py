"""What a report is made of, before it is HTML or Markdown. All text is plain: the writers escape it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Block", "Cell", "Code", "Column", "Missing", "Note", "Notes", "Plot", "Report", "Section", "Table", "Text"]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Missing:
    """A file that the run does not have, and the command that makes it."""

    text: str
    """One sentence."""
    command: str | None = None
    """None where no command makes it for this kind of model."""


@dataclass(frozen=True)
class Code:
    """Text that is shown as it is."""

    text: str


@dataclass(frozen=True)
class Note:
    """A remark of a careful colleague."""

    level: Literal["warning", "note"]
    text: str


@dataclass(frozen=True)
class Notes:
    """A list of remarks."""

    notes: tuple[Note, ...]


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    title: str
    numeric: bool = False
    """Aligned to the right, and sorted by value."""


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by."""

    text: str
    value: float | None = None
    """Of numeric columns; None sorts behind every number."""


@dataclass(frozen=True)
class Table:
    """A table; every table of the page can be sorted."""

    id: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @classmethod
    def of_texts(cls, table_id: str, caption: str, titles: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
        """A table of words."""
        cells = tuple(tuple(Cell(text) for text in row) for row in rows)
        return cls(table_id, caption, tuple(map(Column, titles)), cells)


@dataclass(frozen=True)
class Plot:
    """A picture."""

    id: str
    caption: str
    """What it shows, also for people who do not see it."""
    svg: str
    """A whole `<svg>` element, whose ids start with `id`; the one text here that is markup."""


Block = Text | Missing | Code | Notes | Table | Plot


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Report:
    """All of it."""

    title: str
    generator: str
    """Tool and version that wrote it."""
    sections: tuple[Section, ...]
