from __future__ import annotations

import pytest

from fptq_export.errors import ExitCode, FptqError, GateError, PrecisionError, Problem, UserError, UserErrors


def test_user_error_names_place_cause_and_next_step() -> None:
    """Two lines: what is wrong where, and what to do."""
    assert str(UserError("config.json", "is missing", "fetch it")) == "config.json: is missing\n  -> fetch it"
    assert str(UserError("config.json", "is missing")) == "config.json: is missing"


def test_user_errors_list_every_problem() -> None:
    """One line a problem, counted, each with its path."""
    error = UserErrors("policy.json", [Problem("$.a", "wrong"), Problem("$.b", "missing")], "mend both")
    assert str(error) == "policy.json: 2 problems\n  wrong @ $.a\n  missing @ $.b\n  -> mend both"
    assert str(UserErrors("p", [Problem("$", "wrong")])) == "p: 1 problem\n  wrong @ $"


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (UserError("a", "b"), ExitCode.USER_ERROR),
        (UserErrors("a", []), ExitCode.USER_ERROR),
        (GateError("a"), ExitCode.ACCURACY_GATE),
        (PrecisionError("a"), ExitCode.PRECISION_PROOF),
        (FptqError("a"), ExitCode.BUG),
    ],
)
def test_exit_codes(kind: FptqError, code: ExitCode) -> None:
    """Scripts tell a user's mistake (1) from a bug (2), the accuracy gate (3) and the precision proof (4)."""
    assert kind.exit_code == code


def test_exit_codes_are_documented_numbers() -> None:
    """The numbers are an interface."""
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "USER_ERROR": 1,
        "BUG": 2,
        "ACCURACY_GATE": 3,
        "PRECISION_PROOF": 4,
        "INTERRUPTED": 130,
    }
