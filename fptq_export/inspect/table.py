"""Prints what `inspect` says of a file."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fptq_export.inspect.report import Inspection

__all__ = ["print_inspection"]


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Every table, then what is wrong."""
    for section in inspection.sections:
        table = Table(title=escape(section.title), title_justify="left")
        for index, column in enumerate(section.columns):
            numbers = all(isinstance(row[index], (int, float)) for row in section.rows)
            table.add_column(column, justify="right" if numbers else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
        console.print(table)
    for title, problems in (
        ("precision", inspection.precision_problems),
        ("files", inspection.file_problems),
    ):
        if problems:
            console.print(f"{title}: {len(problems)} problem{'s' if len(problems) != 1 else ''}", style="bold red")
            for problem in problems:
                console.print(f"  {problem}", markup=False, soft_wrap=True)
