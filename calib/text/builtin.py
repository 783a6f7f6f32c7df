"""The two halves of the built-in text; the rule is in the package's docstring."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pydoc_data.topics import topics

__all__ = ["calibration_text", "held_out_text"]

_HELD_OUT_SHARE = 0.2
_BREAK = "\n\n"


@cache
def held_out_text() -> str:
    """Text for verification: up to a fifth of the whole."""
    return _BREAK.join(_unique_paragraphs(_held_out_topics()))


@cache
def calibration_text() -> str:
    """Text for calibration: the rest, without paragraphs of the held-out text."""
    held_out = _held_out_topics()
    taken = {_key(paragraph) for paragraph in _unique_paragraphs(held_out)}
    names = (name for name in sorted(topics) if name not in set(held_out))
    return _BREAK.join(paragraph for paragraph in _unique_paragraphs(names) if _key(paragraph) not in taken)


def _held_out_topics() -> list[str]:
    names: list[str] = []
    held_out = seen = 0
    for name in sorted(topics):
        length = len(topics[name])
        seen += length
        if held_out + length <= _HELD_OUT_SHARE * seen:
            names.append(name)
            held_out += length
    return names


def _unique_paragraphs(names: Iterable[str]) -> list[str]:
    # Some Python versions end topics with a line break, which would join into an empty paragraph.
    paragraphs = (paragraph.strip("\n") for name in names for paragraph in topics[name].split(_BREAK))
    return list({_key(paragraph): paragraph for paragraph in paragraphs if paragraph.strip()}.values())


def _key(paragraph: str) -> str:
    """Paragraphs that differ only in line breaks and indentation are the same text."""
    return " ".join(paragraph.split())
