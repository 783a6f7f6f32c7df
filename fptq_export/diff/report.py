"""`diff.json`: how far each candidate lies from the reference, and the gates that stand on it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from fptq_export.diff.options import Candidate, Thresholds
from fptq_export.errors import GateError
from fptq_export.verify.perplexity import PerplexityFigures
from fptq_export.verify.report import LogitFigures

__all__ = [
    "DIFF_SCHEMA_VERSION",
    "CandidateDiff",
    "DiffReport",
    "GreedyFigures",
    "PartFigures",
    "RunRecord",
    "gate_thresholds",
    "threshold_failures",
]

DIFF_SCHEMA_VERSION: Literal[1] = 1


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class RunRecord(_Model):
    """One way of running the model."""

    runs: str
    """What computed the logits: library, precision and file."""
    files: dict[str, str]
    """SHA-256 of the files that define it, by path."""
    seconds: float
    """From loading to the last figure."""
    peak_memory_bytes: int
    """Largest resident memory of the process meanwhile; what an earlier system left is included."""


class PartFigures(_Model):
    """Logits of a candidate against those of the reference after the same tokens."""

    reference_perplexity: PerplexityFigures
    candidate_perplexity: PerplexityFigures
    perplexity_increase: float
    """candidate perplexity / reference perplexity - 1."""
    logits: LogitFigures
    """Cosine, KL and top-1 agreement, token by token."""
    top5_agreement: float = Field(ge=0.0, le=1.0)
    """Share of tokens where the candidate has the reference's first token among its first five."""
    psnr_db: float
    """Polygraphy's 20 log10(max r) - 10 log10(mean (r - c)^2) of each window, in decibel; mean over windows."""


class GreedyFigures(_Model):
    """Each system continues the head of the first window with its own choices."""

    reference_tokens: tuple[NonNegativeInt, ...]
    candidate_tokens: tuple[NonNegativeInt, ...]
    first_divergence: NonNegativeInt | None
    """First token (0 is the one behind the head) that differs. Null when none does."""
    reference_text: str | None
    """The reference's tokens from the first divergence on; null without a divergence or a tokenizer."""
    candidate_text: str | None
    """The candidate's likewise."""


class CandidateDiff(_Model):
    """One candidate against the reference."""

    system: Candidate
    run: RunRecord
    prefill: PartFigures
    """Every token of every window, each window in one call."""
    decode: PartFigures
    """`decode_steps` calls of one token after the head of each window, with the KV cache carried. The tokens fed are
    those of the text."""
    greedy: GreedyFigures


class DiffReport(_Model):
    """`diff.json`. Written again after each candidate, so that an interrupted diff keeps what it measured."""

    schema_version: Literal[1] = DIFF_SCHEMA_VERSION
    tool_version: str
    command: str
    environment: dict[str, str]
    """Versions of Python and of the libraries that took part."""
    model: str
    text: str
    """Where the token ids come from."""
    text_sha256: str
    """Of the token ids: equal texts have equal hashes."""
    windows: PositiveInt
    window_tokens: PositiveInt
    head_tokens: PositiveInt
    """Tokens of a window in front of its decode steps."""
    decode_steps: PositiveInt
    thresholds: Thresholds
    reference: RunRecord
    candidates: tuple[CandidateDiff, ...]
    left_out: dict[Candidate, str]
    """Candidates that nobody asked for by name and that cannot be had here, with the reason."""


def threshold_failures(report: DiffReport) -> list[str]:
    """A sentence for each limit of each candidate that does not hold."""
    return [
        f"{candidate.system}: {failure}"
        for candidate in report.candidates
        for failure in _failures(candidate, report.thresholds)
    ]


def gate_thresholds(report: DiffReport) -> None:
    """Refuse candidates beyond a threshold.

    Raises:
        GateError: One is; says what `threshold_failures` says.
    """
    failures = threshold_failures(report)
    if failures:
        raise GateError("\n".join(failures) + "\n  -> look at diff.json, or keep more layers in float with --exclude")


def _failures(candidate: CandidateDiff, limits: Thresholds) -> list[str]:
    found = []
    increase = candidate.prefill.perplexity_increase
    if limits.max_ppl_increase is not None and increase > limits.max_ppl_increase:
        found.append(
            f"perplexity is {increase:+.3%} from the reference's; "
            f"--max-ppl-increase allows {limits.max_ppl_increase:+.3%}"
        )
    for name, part in (("prefill", candidate.prefill), ("decode", candidate.decode)):
        kl = part.logits.kl_mean
        if limits.max_kl is not None and kl > limits.max_kl:
            found.append(f"mean KL of {name} is {kl:.4g} nats; --max-kl allows {limits.max_kl:.4g}")
        for what, value, option, least in (
            ("mean cosine", part.logits.cosine_mean, "--min-cosine", limits.min_cosine),
            ("mean PSNR", part.psnr_db, "--min-psnr", limits.min_psnr),
            ("top-1 agreement", part.logits.top1_agreement, "--min-top1", limits.min_top1),
        ):
            if least is not None and value < least:
                found.append(f"{what} of {name} is {value:.6g}; {option} asks for {least:.6g}")
    return found
