"""Greedy decoding with the KV cache carried, and the proof that the cache is carried correctly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.progress import NoProgress, Task
from fptq_export.verify.perplexity import log_softmax
from fptq_export.verify.report import CacheFigures, DecodeFigures, Rounding
from fptq_export.verify.sessions import CausalSession

__all__ = [
    "ROUNDING_STEPS",
    "CacheBound",
    "checked_logits",
    "compare_decode",
    "forced",
    "greedy",
    "kl_from_log_probs",
    "prove_cache",
    "same_vocabulary",
]

ROUNDING_STEPS: Mapping[Rounding, float] = MappingProxyType(
    {
        "fp32": 2.0**-16,  # 2^-23, times sqrt(2^14) for sums over up to 16384 channels in another order
        "fp16": 2.0**-10,
        "bf16": 2.0**-7,
        "int8": 1.0 / 127.0,  # of the largest magnitude, by the numeric contract
    }
)
"""Distance of neighbouring values, relative to the largest magnitude in the tensor that is rounded."""
_LINEARS_PER_LAYER = 7
"""q, k, v, o, gate, up, down: each reads a tensor rounded on its way there."""
_RUNS = 2
"""Decode and prefill are two runs, each off the exact value."""


@dataclass(frozen=True)
class CacheBound:
    """How far the logits of decode steps may lie from those of one prefill over the same text.

    In exact arithmetic they are equal. In a machine the matrix shapes differ, so sums are taken in another order, and
    a value next to a rounding boundary falls on its other side: it moves by one step. A tensor so moved is off by at
    most `step` of its largest magnitude, and passes that on to the logits in proportion. Roundings of different
    tensors are independent, so n = 7 x layers of them add up to sqrt(n) steps; two runs give twice that:

        bound = 2 sqrt(7 layers) x step x max |logit|

    On SmolLM2-135M (30 layers, max |logit| 38) that is 1.1 for FP16, where a correct cache was seen to differ by 0.03
    and wrong positions by 1.5 to 4; and 8.7 for INT8 activations, where a correct cache differed by up to 3.7 and a
    lost one by 18 to 45. So with INT8 this finds a lost cache, but not a subtly wrong one: rounding alone is that
    large. Prove the FP16 graph it came from as well.

    Args:
        rounding: The coarsest rounding on the way through the graph.
        layers: Layers with a cache.
    """

    rounding: Rounding
    layers: int

    @property
    def relative(self) -> float:
        """The bound over max |logit|."""
        return _RUNS * math.sqrt(_LINEARS_PER_LAYER * self.layers) * ROUNDING_STEPS[self.rounding]


def checked_logits(session: CausalSession, place: str, logits: NDArray[np.float32], tokens: int) -> NDArray[np.float32]:
    """Logits of one sequence, [1, tokens, V] -> [tokens, V], after a look at them.

    Raises:
        UserError: The shape is another one, or a value is NaN or infinite; names the session, the place, the token.
    """
    where = f"{session.name}, {place}"
    if logits.ndim != 3 or logits.shape[:2] != (1, tokens):
        raise UserError(where, f"logits have shape {logits.shape}, not (1, {tokens}, vocabulary)", "export it again")
    finite = np.isfinite(logits[0]).all(axis=-1)
    if not finite.all():
        count, first = tokens - int(finite.sum()), int(finite.argmin())
        cause = f"logits are NaN or infinite at {count} of {tokens} tokens, first at token {first}"
        raise UserError(where, cause, "an FP16 overflow is the usual cause: export with --dtype fp32")
    return np.asarray(logits[0])


def compare_decode(
    reference: CausalSession,
    candidate: CausalSession,
    prompt: NDArray[np.int64],
    steps: int,
    cache_bound: CacheBound,
    task: Task | None = None,
) -> tuple[DecodeFigures, CacheFigures]:
    """Decode greedily with the reference, and feed its tokens to the candidate.

    Args:
        reference: Chooses the tokens.
        candidate: Fed the same tokens; its choices and its cache are judged.
        prompt: int64 [P], P >= 1.
        steps: Decode steps, at least 1.
        cache_bound: For the candidate.
        task: Advanced by one for each step of each session.

    Raises:
        UserError: A session gives logits of another shape, or not finite.
    """
    task = _silent() if task is None else task
    tokens, expected = greedy(reference, prompt, steps, task)
    actual = forced(candidate, prompt, tokens, task)
    same_vocabulary(reference, candidate, expected.shape[-1], actual.shape[-1])
    log_r, log_c = log_softmax(expected), log_softmax(actual)
    chosen_r, chosen_c = expected.argmax(axis=-1), actual.argmax(axis=-1)
    equal = chosen_r == chosen_c
    decode = DecodeFigures(
        prompt_tokens=len(prompt),
        steps=steps,
        reference_tokens=tuple(chosen_r.tolist()),
        candidate_tokens=tuple(chosen_c.tolist()),
        kl=tuple(kl_from_log_probs(log_r, log_c).tolist()),
        top1_agreement=float(equal.mean()),
        first_divergence=None if equal.all() else int(equal.argmin()),
    )
    return decode, _cache_figures(candidate, prompt, tokens, actual[1:], cache_bound)


def prove_cache(
    session: CausalSession, prompt: NDArray[np.int64], tokens: Sequence[int], cache_bound: CacheBound
) -> CacheFigures:
    """Compare a session's decode steps over `tokens`, after `prompt` [P], with its own prefill over both.

    Raises:
        UserError: The session gives logits of another shape, or not finite.
    """
    decoded = forced(session, prompt, tokens, _silent())[1:]
    return _cache_figures(session, prompt, tokens, decoded, cache_bound)


def kl_from_log_probs(log_r: NDArray[np.float64], log_c: NDArray[np.float64]) -> NDArray[np.float64]:
    """KL(p_r || p_c) of each token in nats, [T, V] and [T, V] -> [T]; cut at 0, below which only rounding takes it."""
    return np.asarray(np.maximum((np.exp(log_r) * (log_r - log_c)).sum(axis=-1), 0.0))


def same_vocabulary(reference: CausalSession, candidate: CausalSession, size_r: int, size_c: int) -> None:
    """Raise UserError when two sessions do not have the same number of logits a token."""
    if size_r != size_c:
        raise UserError(
            f"{reference.name}, {candidate.name}",
            f"vocabularies of {size_r} and {size_c} tokens cannot be compared",
            "compare a model with its own export",
        )


def greedy(
    session: CausalSession, prompt: NDArray[np.int64], steps: int, task: Task
) -> tuple[list[int], NDArray[np.float32]]:
    """Decode a prompt [P]: the `steps` tokens that were fed back, and the logits [steps + 1, V] behind each choice."""
    logits, cache = session.prefill(prompt[None])
    rows = [checked_logits(session, "decode prompt", logits, len(prompt))[-1].copy()]
    tokens: list[int] = []
    for step in range(1, steps + 1):
        tokens.append(int(rows[-1].argmax()))
        logits, cache = session.decode(np.array([[tokens[-1]]], np.int64), cache)
        rows.append(checked_logits(session, f"decode step {step}", logits, 1)[0])
        task.advance()
    return tokens, np.stack(rows)


def forced(session: CausalSession, prompt: NDArray[np.int64], tokens: Sequence[int], task: Task) -> NDArray[np.float32]:
    """Feed a text with the cache carried: logits [len(tokens) + 1, V] after the prompt [P], and after each token."""
    logits, cache = session.prefill(prompt[None])
    rows = [checked_logits(session, "decode prompt", logits, len(prompt))[-1].copy()]
    for step, token in enumerate(tokens, start=1):
        logits, cache = session.decode(np.array([[token]], np.int64), cache)
        rows.append(checked_logits(session, f"decode step {step}", logits, 1)[0])
        task.advance()
    return np.stack(rows)


def _cache_figures(
    session: CausalSession,
    prompt: NDArray[np.int64],
    tokens: Sequence[int],
    decoded: NDArray[np.float32],
    cache_bound: CacheBound,
) -> CacheFigures:
    text = np.concatenate([prompt, np.asarray(tokens, np.int64)])
    logits = checked_logits(session, "prefill over the decoded text", session.prefill(text[None])[0], len(text))
    whole = logits[len(prompt) :].astype(np.float64)
    difference = decoded.astype(np.float64) - whole
    max_abs_diff, absmax = float(np.abs(difference).max()), float(np.abs(whole).max())
    bound = cache_bound.relative * absmax
    return CacheFigures(
        steps=len(tokens),
        max_abs_diff=max_abs_diff,
        rms_diff=float(np.sqrt(np.square(difference).mean())),
        logit_absmax=absmax,
        rounding=cache_bound.rounding,
        layers=cache_bound.layers,
        bound=bound,
        within_bound=max_abs_diff <= bound,
    )


def _silent() -> Task:
    with NoProgress().task("", total=None) as task:
        return task
