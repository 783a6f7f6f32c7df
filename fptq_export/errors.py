"""Every error the tool raises, and the exit code each one ends the command with.

A `UserError` is something the person at the keyboard can mend: it names the layer or file, the cause and the next
step, and the command line prints it without a traceback. Anything that is not an `FptqError` is a bug of ours and is
shown with its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "AnotherRankError",
    "ExitCode",
    "FptqError",
    "GateError",
    "PrecisionError",
    "Problem",
    "UserError",
    "UserErrors",
]


class ExitCode(IntEnum):
    """Exit codes of the command line."""

    OK = 0
    USER_ERROR = 1
    BUG = 2
    ACCURACY_GATE = 3
    PRECISION_PROOF = 4
    INTERRUPTED = 130


class FptqError(Exception):
    """Base of every error raised on purpose."""

    exit_code: ExitCode = ExitCode.BUG


class UserError(FptqError):
    """Something the user can mend.

    Args:
        where: The file, layer or option the error is about.
        cause: What is wrong with it.
        hint: The next step to take.
    """

    exit_code = ExitCode.USER_ERROR

    def __init__(self, where: str, cause: str, hint: str = "") -> None:
        self.where = where
        self.cause = cause
        self.hint = hint
        super().__init__(where, cause, hint)

    def __str__(self) -> str:
        """One sentence for the cause, one for the next step."""
        text = f"{self.where}: {self.cause}"
        return f"{text}\n  -> {self.hint}" if self.hint else text


@dataclass(frozen=True)
class Problem:
    """One thing wrong in a document, with the JSON path to it, e.g. `$.layers["lm_head"].group_size`."""

    path: str
    message: str

    def __str__(self) -> str:
        """The message, then the place."""
        return f"{self.message} @ {self.path}"


class UserErrors(UserError):  # noqa: N818  the plural says that it carries several
    """All problems of one document at once, so that one edit can mend them all."""

    def __init__(self, where: str, problems: Sequence[Problem], hint: str = "") -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        lines = "".join(f"\n  {problem}" for problem in self.problems)
        super().__init__(where, f"{count} problem{'s' if count != 1 else ''}{lines}", hint)


class GateError(FptqError):
    """The quantized model is less accurate than the user allowed; nothing is published."""

    exit_code = ExitCode.ACCURACY_GATE


class PrecisionError(FptqError):
    """A graph or an engine would run, or runs, another precision than its policy says."""

    exit_code = ExitCode.PRECISION_PROOF


class AnotherRankError(FptqError):
    """Another process of this run failed. It says why; this one ends with the same exit code and without a word."""

    def __init__(self, exit_code: ExitCode) -> None:
        self.exit_code = exit_code
        super().__init__(exit_code)
