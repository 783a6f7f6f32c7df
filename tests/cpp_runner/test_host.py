"""The C++ side's own tests, under sanitizers."""

from __future__ import annotations

from pathlib import Path

from tests.cpp_runner.conftest import outcome_of


def test_unit_tests_have_no_finding(tests_program: Path) -> None:
    """Hashes, number formats, ownership of device memory, damaged arrays: no failure, leak or undefined behaviour."""
    done = outcome_of([str(tests_program)])
    assert done.code == 0, done.out + done.err[-4000:]
    assert "\n0 of " in done.out
    assert done.err == ""


def test_filter_that_runs_nothing_fails(tests_program: Path) -> None:
    """The harness is no decoration."""
    assert outcome_of([str(tests_program), "no such test"]).code == 1
