"""Sentences of the held-out text, for models that turn a text into one vector."""

from __future__ import annotations

import re
from functools import cache

from calib.text.builtin import calibration_text, held_out_text

__all__ = ["held_out_sentences"]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_MIN_WORDS, _MAX_WORDS = 6, 40
_PROSE_SHARE = 0.9
"""Letters, spaces and ordinary punctuation, by share of characters: below it a sentence is mostly code."""
_PROSE = re.compile(r"[A-Za-z ,.;:'()-]")


@cache
def held_out_sentences() -> tuple[str, ...]:
    """Distinct English sentences of 6 to 40 words, in the order of the text, that calibration does not see either.

    Grammar rules and code are left out.
    """
    seen = " ".join(calibration_text().split())
    paragraphs = (" ".join(paragraph.split()) for paragraph in held_out_text().split("\n\n"))
    sentences = (sentence for paragraph in paragraphs for sentence in _SENTENCE_END.split(paragraph))
    return tuple(dict.fromkeys(sentence for sentence in sentences if _is_prose(sentence) and sentence not in seen))


def _is_prose(sentence: str) -> bool:
    whole = sentence[:1].isupper() and sentence[-1:] in ".!?"
    prose = len(_PROSE.findall(sentence)) >= _PROSE_SHARE * len(sentence)
    return whole and prose and _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS
