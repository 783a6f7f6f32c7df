"""`verify.json`: what was measured, and the gates that stand on it."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from fptq_export.errors import GateError, UserError
from fptq_export.verify.perplexity import PerplexityFigures

__all__ = [
    "LARGE_INCREASE",
    "VERIFY_SCHEMA_VERSION",
    "CacheFigures",
    "DecodeFigures",
    "LastTokenFigures",
    "LogitFigures",
    "PolygraphyFigures",
    "Rounding",
    "VerifyReport",
    "gate",
    "gate_cache",
    "gate_last_token",
    "ratio_from_option",
]

VERIFY_SCHEMA_VERSION: Literal[1] = 1
LARGE_INCREASE = 0.05
"""Relative increase of perplexity that is pointed out."""

Rounding = Literal["fp32", "fp16", "bf16", "int8"]
"""The coarsest rounding on the way through a graph; `int8` when activations are quantized."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class LogitFigures(_Model):
    """Logits r of the reference against c of the candidate, over every token of every window."""

    tokens: PositiveInt
    """Tokens compared: windows x window length."""
    cosine_mean: float
    """Mean over tokens of <r, c> / (|r| |c|)."""
    cosine_min: float
    """The same at the worst token."""
    kl_mean: float = Field(ge=0.0)
    """Mean over tokens of KL(p_r || p_c) = sum over the vocabulary of p_r (log p_r - log p_c), in nats."""
    top1_agreement: float = Field(ge=0.0, le=1.0)
    """Share of tokens where both put the same token first (the lower id, on a tie)."""


class DecodeFigures(_Model):
    """Greedy decoding with the KV cache carried; the candidate is fed the tokens the reference chose.

    Choice 0 is made by the prefill of the prompt, choice k by decode step k.
    """

    prompt_tokens: PositiveInt
    """Head of the first window that both start from."""
    steps: PositiveInt
    """Decode steps, one token each."""
    reference_tokens: tuple[NonNegativeInt, ...]
    """steps + 1 greedy choices of the reference."""
    candidate_tokens: tuple[NonNegativeInt, ...]
    """steps + 1 greedy choices of the candidate after the same tokens."""
    kl: tuple[float, ...]
    """KL(p_r || p_c) of each choice, in nats."""
    top1_agreement: float = Field(ge=0.0, le=1.0)
    """Share of equal choices."""
    first_divergence: NonNegativeInt | None
    """First choice that differs: from there on the candidate's own text is another one. Null when none differs."""


class CacheFigures(_Model):
    """Logits of decode steps against those of one prefill over the same text, by the same session."""

    steps: PositiveInt
    """Decode steps compared."""
    max_abs_diff: float = Field(ge=0.0)
    """Largest |decode logit - prefill logit| over steps and vocabulary."""
    rms_diff: float = Field(ge=0.0)
    """Root mean square of the same difference."""
    logit_absmax: float = Field(ge=0.0)
    """Largest |prefill logit| over the same positions."""
    rounding: Rounding
    """The coarsest rounding on the way; sets the step of the bound."""
    layers: PositiveInt
    """Layers with a cache; sets how many roundings add up."""
    bound: float = Field(ge=0.0)
    """2 sqrt(7 layers) x step x logit_absmax; derivation: `fptq_export.verify.decode.CacheBound`."""
    within_bound: bool
    """max_abs_diff <= bound."""


class LastTokenFigures(_Model):
    """Logits of a graph that gives those of the last token only, against its form that gives all of them.

    All other figures are measured on that form: it is the same file with one slice bypassed.
    """

    calls: PositiveInt
    """A prompt, and one call a token after it."""
    max_abs_diff: float = Field(ge=0.0)
    """Largest difference over calls and vocabulary."""
    logit_absmax: float = Field(ge=0.0)
    """Largest |logit| of the form that gives all."""
    rounding: Rounding
    """Of the graph's floating-point type."""
    bound: float = Field(ge=0.0)
    """2 sqrt(2) x step x logit_absmax; derivation: `fptq_export.verify.last_token.last_token_figures`."""
    within_bound: bool
    """max_abs_diff <= bound."""


class PolygraphyFigures(_Model):
    """What Polygraphy's comparison functions say of the two sessions' `logits` on one window."""

    version: str
    """Polygraphy's version."""
    tokens: PositiveInt
    """Tokens in the window."""
    cosine_similarity: float
    """<r, c> / (|r| |c|), both flattened over tokens and vocabulary."""
    psnr_db: float
    """20 log10(max r) - 10 log10(mean (r - c)^2), in decibel; infinite when r = c."""
    l2_norm: float = Field(ge=0.0)
    """|r - c|, flattened likewise."""


class VerifyReport(_Model):
    """A candidate model against its reference on the same text."""

    schema_version: Literal[1] = VERIFY_SCHEMA_VERSION
    reference: str
    """Name of the reference session."""
    candidate: str
    """Name of the candidate session."""
    windows: PositiveInt
    """Windows of text, without overlap."""
    window_tokens: PositiveInt
    """Tokens in a window."""
    vocabulary: PositiveInt
    """Logits a token."""
    reference_perplexity: PerplexityFigures
    candidate_perplexity: PerplexityFigures
    perplexity_increase: float
    """candidate perplexity / reference perplexity - 1; negative when the candidate is better."""
    logits: LogitFigures
    decode: DecodeFigures
    cache: CacheFigures
    """The candidate's."""
    last_token: LastTokenFigures | None = None
    """Null where the candidate gives the logits of every token itself."""
    polygraphy: PolygraphyFigures | None = None
    """Null when the diff was not run."""


def gate(report: VerifyReport, max_ppl_increase: float | None) -> None:
    """Refuse a candidate whose perplexity is above reference x (1 + limit).

    Args:
        report: What was measured.
        max_ppl_increase: Largest relative increase, e.g. 0.05 allows 1.05 x the reference; None allows any.

    Raises:
        GateError: It is above the limit; names both perplexities and the limit.
    """
    if max_ppl_increase is None:
        return
    reference, candidate = report.reference_perplexity.perplexity, report.candidate_perplexity.perplexity
    if candidate <= reference * (1.0 + max_ppl_increase):
        return
    raise GateError(
        f"{report.candidate}: perplexity {candidate:.6g} is {report.perplexity_increase:+.3%} from the "
        f"{reference:.6g} of {report.reference}; the limit is {max_ppl_increase:+.3%}"
        "\n  -> use --preset accurate, keep more layers in float with --exclude, or raise --max-ppl-increase"
    )


def gate_cache(report: VerifyReport) -> None:
    """Refuse a candidate whose decode steps do not continue its own prefill.

    Raises:
        GateError: The largest difference is above the bound; names both.
    """
    cache = report.cache
    if cache.within_bound:
        return
    raise GateError(
        f"{report.candidate}: {cache.steps} decode steps differ by up to {cache.max_abs_diff:.4g} from a prefill "
        f"over the same text; rounding ({cache.rounding}, {cache.layers} layers) explains at most {cache.bound:.4g}"
        f"\n  -> the KV cache of this graph is not carried correctly: export the model again"
    )


def gate_last_token(report: VerifyReport) -> None:
    """Refuse a graph whose last-token logits are not those of the form that was measured.

    Raises:
        GateError: The largest difference is above the bound; names both.
    """
    last = report.last_token
    if last is None or last.within_bound:
        return
    raise GateError(
        f"{report.candidate}: the logits of {last.calls} calls differ by up to {last.max_abs_diff:.4g} from those of "
        f"the form that gives every token; rounding ({last.rounding}) explains at most {last.bound:.4g}"
        f"\n  -> the head of this graph reads another token than the last: use --logits all"
    )


def ratio_from_option(text: str, option: str = "--max-ppl-increase") -> float:
    """`3%` -> 0.03 and `0.03` -> 0.03.

    Args:
        text: A number with a percent sign, or a ratio from 0 to 1.
        option: The option it was given to, for the error.

    Raises:
        UserError: It is neither, or it is negative. A bare number above 1 is refused: `3` could mean 3% or 300%.
    """
    number = text.strip()
    percent = number.endswith("%")
    try:
        value = Decimal(number.removesuffix("%").strip()) / (100 if percent else 1)
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or value.is_signed() or (not percent and value > 1):
        raise UserError(f"{option} {text}", "not a relative increase", "write 3% or 0.03 (300% for more than double)")
    ratio = float(value)
    if math.isinf(ratio):
        raise UserError(f"{option} {text}", "too large for a relative increase", "leave the option out to allow any")
    return ratio
