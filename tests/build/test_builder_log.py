from __future__ import annotations

from pathlib import Path

import pytest

from fptq_export.build.builder_log import last_lines_from_log, messages_from_log, text_from_message

LOG = (
    "Internal Error: printed by C++\n"
    + text_from_message(3, "ready")
    + text_from_message(1, "first\n  LHS: 2\n  RHS: 1")
    + text_from_message(2, "take care")
    + text_from_message(1, "second")
    + text_from_message(1, "second")
    + text_from_message(4, "the end")
    + "Traceback: printed by Python\n"
)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "build.log"
    path.write_text(LOG, encoding="utf-8")
    return path


def test_messages_keep_their_lines_and_come_once(log: Path) -> None:
    """A message of several lines is whole, and one that is said twice comes once."""
    assert list(messages_from_log(log, "E")) == ["first\n  LHS: 2\n  RHS: 1", "second"]


def test_other_severities_are_left_out(log: Path) -> None:
    """Warnings are not errors, and text printed before the first message belongs to no severity."""
    assert list(messages_from_log(log, "W")) == ["take care"]
    assert "Internal" not in "".join(messages_from_log(log, "FEWIV"))


def test_last_lines_skip_empty_ones(log: Path) -> None:
    """The tail of a crash is text, not blank lines."""
    log.write_text(LOG + "\n\n", encoding="utf-8")
    assert last_lines_from_log(log, 2) == ["[V] the end", "Traceback: printed by Python"]


def test_undecodable_bytes_do_not_hide_the_rest(log: Path) -> None:
    """A name in another encoding in the log must not turn a build error into a decoding error."""
    log.write_bytes(b"[E] bad \xff name\n[E] next\n")
    assert list(messages_from_log(log, "E"))[1] == "next"
