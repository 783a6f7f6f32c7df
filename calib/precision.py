"""Which linear runs which precision: the patterns of `--exclude` and `--precision`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from fptq_export.errors import UserError
from fptq_export.policy import Precision

__all__ = [
    "DEFAULT_EXCLUDE",
    "Choice",
    "chosen_precisions",
    "excluded_paths",
    "float_paths",
    "patterns_of_part",
    "precision_from_option",
]

DEFAULT_EXCLUDE = ("lm_head", "^proj_out$")
"""The head stays float: it is a large part of the accuracy and a small part of the work. Whisper calls it otherwise."""


@dataclass(frozen=True)
class Choice:
    """What a pattern says of a linear."""

    precision: Precision
    pattern: str
    """The option's value, as it was given."""
    excluded: bool = False
    """Whether it was `--exclude` that said it."""

    @property
    def float_reason(self) -> str:
        """Why the linear keeps the float precision, where it does."""
        by = f"excluded by {self.pattern!r}" if self.excluded else f"float by {self.pattern!r}"
        return f"{by}: keeps the float precision"


def excluded_paths(paths: Sequence[str], patterns: Sequence[str]) -> dict[str, str]:
    """Path -> the pattern of `--exclude` that excludes it; the first one where there are several.

    Raises:
        UserError: A pattern is not a regular expression, or matches no path (unless it is a default).
    """
    excluded: dict[str, str] = {}
    for pattern in patterns:
        matches = _matches(f"--exclude {pattern!r}", pattern, paths, required=pattern not in DEFAULT_EXCLUDE)
        excluded.update({path: pattern for path in matches if path not in excluded})
    return excluded


def chosen_precisions(paths: Sequence[str], exclude: Sequence[str], precision: Sequence[str]) -> dict[str, Choice]:
    """What the patterns choose; linears that no pattern matches are absent.

    Args:
        paths: Torch paths of the linears.
        exclude: Regular expressions, each of them `float`. They come first.
        precision: `REGEX=NAME`; later ones win, also over `exclude`.

    Raises:
        UserError: A pattern is malformed or matches no path (unless it is excluded by default).
    """
    choices = {
        path: Choice("float", pattern, excluded=True) for path, pattern in excluded_paths(paths, exclude).items()
    }
    for text in precision:
        pattern, name = precision_from_option(text)
        for path in _matches(f"--precision {text!r}", pattern, paths, required=True):
            choices[path] = Choice(name, text)
    return choices


def float_paths(paths: Sequence[str], exclude: Sequence[str], precision: Sequence[str]) -> tuple[str, ...]:
    """The linears that stay float by choice, so that their inputs need not be measured; in the order of `paths`."""
    choices = chosen_precisions(paths, exclude, precision)
    return tuple(path for path in paths if path in choices and choices[path].precision == "float")


def patterns_of_part(patterns: Sequence[str], part: Sequence[str], whole: Sequence[str]) -> list[str]:
    """The patterns without those that concern other parts of a model only; one that matches nothing at all stays.

    Args:
        patterns: Regular expressions.
        part: Torch paths of the linears of the part.
        whole: Those of all linears of the model.

    Raises:
        UserError: A pattern is not a regular expression.
    """
    found = []
    for pattern in patterns:
        matches = set(_matches(repr(pattern), pattern, whole, required=False))
        if not matches or matches.intersection(part):
            found.append(pattern)
    return found


def precision_from_option(text: str) -> tuple[str, Precision]:
    """`REGEX=NAME` -> regular expression and precision; the last `=` counts.

    Raises:
        UserError: It is not of that form, or not a regular expression.
    """
    pattern, _, name = text.rpartition("=")
    _compiled(f"--precision {text!r}", pattern)
    known = {str(precision): precision for precision in get_args(Precision)}
    if not pattern or name not in known:
        hint = f"write REGEX=NAME with {', '.join(known)}; the type of what is not quantized is --dtype"
        raise UserError(f"--precision {text!r}", "is not a pattern and a precision", hint)
    return pattern, known[name]


def _matches(where: str, pattern: str, paths: Sequence[str], *, required: bool) -> list[str]:
    matcher = _compiled(where, pattern)
    matches = [path for path in paths if matcher.search(path)]
    if required and not matches:
        hint = f"the paths look like {paths[0]}" if paths else ""
        raise UserError(where, "matches no linear of the model", hint)
    return matches


def _compiled(where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(where, f"not a regular expression ({error})", "mend the pattern") from None
