"""The support table: what each test of a cell showed, and the Markdown made from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.families.registry import ROWS, Family

__all__ = ["BEGIN", "COLUMNS", "END", "Cell", "Record", "row_of", "rows_in", "table_from_rows"]

BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
"""The table stands between these lines of the README."""

COLUMNS: Mapping[str, str] = {
    "sites": "linears with a fold site",
    "folds": "folds",
    "policies": "inputs",
    "parity": "ONNX Runtime = torch",
    "engine": "engine",
    "kv": "KV cache",
}
"""Column -> its title. Each column of a family is one test, or several that all record it."""

_FAILED = "**fails**"


@dataclass
class Cell:
    """What a running test shows."""

    text: str = ""


@dataclass
class Record:
    """Cells by family and column, in the order in which their tests ran."""

    cells: dict[tuple[str, str], str] = field(default_factory=dict)

    @contextmanager
    def cell(self, family: Family, column: str) -> Iterator[Cell]:
        """Record a cell when the block ends; as failed when it ends with an error."""
        cell = Cell()
        self.cells[family.name, column] = _FAILED
        yield cell
        self.cells[family.name, column] = cell.text

    def row(self, family: Family) -> str | None:
        """The row of a family; None while one of its cells has not run."""
        cells = [self.cells.get((family.name, column)) for column in COLUMNS]
        return row_of(family.name, [cell for cell in cells if cell is not None]) if None not in cells else None

    def rows(self) -> dict[str, str]:
        """Rows of the families whose cells all ran, in the order of the table."""
        return {family.name: row for family in ROWS if (row := self.row(family)) is not None}


def row_of(name: str, cells: Sequence[str]) -> str:
    """One line of the table."""
    return f"| {' | '.join((name, *cells))} |"


def table_from_rows(rows: Mapping[str, str]) -> str:
    """The table, as it stands between the markers."""
    head = row_of("family", tuple(COLUMNS.values()))
    return "\n".join((head, "|---" * (len(COLUMNS) + 1) + "|", *rows.values()))


def rows_in(text: str) -> dict[str, str]:
    """Rows of the table in a document, by family; without the head."""
    table = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return {row.split("|")[1].strip(): row for row in table[2:]}
