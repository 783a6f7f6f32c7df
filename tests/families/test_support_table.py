"""The support table of the README is what the tests of this folder showed: it is written by them, never by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.families.registry import ROWS
from tests.families.support_table import BEGIN, COLUMNS, END, Record, row_of, rows_in, table_from_rows

README = Path(__file__).parents[2] / "README.md"
UPDATE = "FPTQ_UPDATE_SUPPORT_TABLE"
"""Environment variable: set to 1, the rows of the families that ran are written into the README."""


def test_table_in_the_readme_is_what_was_shown(record: Record, pytestconfig: pytest.Config) -> None:
    """Rows of the families whose cells all ran here are those of the README; nothing is said of the others."""
    shown = record.rows()
    text = README.read_text(encoding="utf-8")
    if os.environ.get(UPDATE) == "1":
        rows = {**rows_in(text), **shown}
        ordered = {family.name: rows[family.name] for family in ROWS if family.name in rows}
        text = f"{text.partition(BEGIN)[0]}{BEGIN}\n{table_from_rows(ordered)}\n{text[text.index(END) :]}"
        README.write_text(text, encoding="utf-8")
    if not shown:
        pytest.skip("no family ran all its cells in this session: select whole families, e.g. -k llama-3")
    rows = rows_in(text)
    assert {name: rows.get(name) for name in shown} == shown, f"run {UPDATE}=1 pytest tests/families tests/halves"
    if len(shown) == len(ROWS):
        assert table_from_rows(rows) == table_from_rows(shown)
        return
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    assert reporter is not None
    reporter.write_line(f"support table: compared {', '.join(shown)}; the other families did not run all their cells")


def test_failed_cell_is_recorded_as_failed() -> None:
    """A test that ends with an error leaves no success behind, and one that did not run leaves no row."""
    record, family = Record(), ROWS[0]

    def failing_test() -> None:
        with record.cell(family, "folds") as cell:
            cell.text = "exact"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_test()
    assert record.cells == {(family.name, "folds"): "**fails**"}
    assert record.rows() == {}


def test_rows_come_back_from_a_document() -> None:
    """What is written between the markers is read again; text around them is no row."""
    rows = {name: row_of(name, [f"{name} {column}" for column in COLUMNS]) for name in ("A", "B 2")}
    document = f"# Title\n| no | row |\n{BEGIN}\n{table_from_rows(rows)}\n{END}\n| neither | this |\n"
    assert rows_in(document) == rows
    assert rows_in(f"{BEGIN}\n{END}") == {}


def test_every_family_has_a_name_of_its_own() -> None:
    """Rows and test ids are told apart by name."""
    assert len({family.key for family in ROWS}) == len({family.name for family in ROWS}) == len(ROWS)
