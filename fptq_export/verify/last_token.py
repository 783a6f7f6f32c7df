"""Proof that a graph which gives the logits of the last token gives those of its form that gives all."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fptq_export.verify.decode import ROUNDING_STEPS, checked_logits
from fptq_export.verify.report import LastTokenFigures, Rounding
from fptq_export.verify.sessions import CausalSession

__all__ = ["last_token_figures", "last_token_rows"]

_ROUNDINGS = 2
"""Of the head's input and of the logits: a runtime that fuses other nodes may keep either in FP32."""
_RUNS = 2


def last_token_rows(session: CausalSession, text: NDArray[np.int64], prompt_tokens: int) -> NDArray[np.float32]:
    """The last row of each call of a session: a prompt, then the tokens behind it one by one.

    Args:
        session: Gives logits for every token of a call, or for the last one.
        text: int64 [T].
        prompt_tokens: Length P of the prompt, 1 <= P <= T.

    Returns:
        Logits float32 [T - P + 1, V].

    Raises:
        UserError: Logits have another shape, or are NaN or infinite.
    """
    logits, cache = session.prefill(text[None, :prompt_tokens])
    rows = [checked_logits(session, "prompt", logits, logits.shape[1])[-1].copy()]
    for token in text[prompt_tokens:]:
        logits, cache = session.decode(np.array([[token]], np.int64), cache)
        rows.append(checked_logits(session, f"token {token}", logits, 1)[0])
    return np.stack(rows)


def last_token_figures(last: NDArray[np.float32], every: NDArray[np.float32], rounding: Rounding) -> LastTokenFigures:
    """Compare the rows [n, V] of the two forms of one graph.

    The forms have the same nodes up to the head's input, so the same numbers enter it. The head sums the same products,
    perhaps in another order, and rounds once; its input may be rounded once more. Each rounding moves a tensor by at
    most `step` of its largest magnitude, and passes that on to the logits in proportion:

        bound = 2 sqrt(2) x step x max |logit|

    Args:
        last: Of the file.
        every: Of its form that gives the logits of every token.
        rounding: Of the graph's floating-point type.
    """
    difference = np.abs(last.astype(np.float64) - every.astype(np.float64))
    absmax = float(np.abs(every).max())
    bound = _RUNS * math.sqrt(_ROUNDINGS) * ROUNDING_STEPS[rounding] * absmax
    return LastTokenFigures(
        calls=len(last),
        max_abs_diff=float(difference.max()),
        logit_absmax=absmax,
        rounding=rounding,
        bound=bound,
        within_bound=float(difference.max()) <= bound,
    )
