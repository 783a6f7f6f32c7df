"""A report as Markdown, for a repository or a pull request: all of the page but its pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fptq_export.report.blocks import Block, Code, Missing, Notes, Plot, Report, Table, Text

__all__ = ["markdown_from_report"]

_SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")


def markdown_from_report(report: Report) -> str:
    """The report in GitHub's Markdown; every text is escaped."""
    lines = [f"# {_escaped(report.title)}", ""]
    for section in report.sections:
        lines += [f"## {_escaped(section.title)}", ""]
        for block in section.blocks:
            lines += [*_lines(block), ""]
    lines += [f"Written by {_escaped(report.generator)}. The pictures are in `report.html`."]
    return "\n".join(lines) + "\n"


def _lines(block: Block) -> Iterator[str]:
    if isinstance(block, Text):
        yield _escaped(block.text)
    elif isinstance(block, Missing):
        yield _escaped(block.text) + (f" Next: {_code(block.command)}" if block.command else "")
    elif isinstance(block, Code):
        fence = _fence(block.text, least=3)
        yield from (fence, block.text, fence)
    elif isinstance(block, Notes):
        yield from (f"- **{note.level}** {_escaped(note.text)}" for note in block.notes)
    elif isinstance(block, Plot):
        yield f"*Picture, in report.html: {_escaped(block.caption)}*"
    else:
        yield from _table_lines(block)


def _table_lines(table: Table) -> Iterator[str]:
    yield f"**{_escaped(table.caption)}**"
    yield ""
    yield _row([_escaped(column.title) for column in table.columns])
    yield _row(["---:" if column.numeric else "---" for column in table.columns])
    for row in table.rows:
        yield _row([_escaped(cell.text) for cell in row])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """Text that shows as it is: no markup, no HTML, one line."""
    words = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(lambda found: "\\" + found[0], words)


def _code(text: str) -> str:
    """A code span that may hold backticks."""
    line = " ".join(text.split())
    fence = _fence(line, least=1)
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def _fence(text: str, least: int) -> str:
    """More backticks than stand in a row in the text."""
    return "`" * max(least, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
