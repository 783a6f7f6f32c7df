"""The first section: what was made, how accurate and how big it is, and whether the proof holds, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator

from fptq_export.policy import Policy
from fptq_export.report.blocks import Missing, Section, Text
from fptq_export.report.documents import RunDocuments
from fptq_export.report.numbers import mib, plural
from fptq_export.report.sizes import sizes_from_run
from fptq_export.verify.encoder_report import EncoderReport
from fptq_export.verify.report import VerifyReport

__all__ = ["accuracy_words", "summary_section"]

_WORDS = ((0.01, "practically unchanged"), (0.05, "a little higher"), (0.2, "noticeably higher"))
"""Largest relative increase of perplexity -> how it reads."""


def summary_section(documents: RunDocuments) -> Section:
    """Four sentences for people who do not quantize models."""
    return Section("summary", "Summary", tuple(_blocks(documents)))


def _blocks(documents: RunDocuments) -> Iterator[Text | Missing]:
    if documents.policy is None:
        text = "Nothing is quantized yet: the run has no policy."
        yield Missing(text, documents.command_from_model("run"))
    else:
        yield Text(_what(documents, documents.policy))
    yield Text(_size(documents))
    if documents.verified is None:
        yield Missing("How accurate it is was not measured.", documents.command("verify"))
    else:
        yield Text(accuracy_words(documents))
    yield _proof(documents)


def _what(documents: RunDocuments, policy: Policy) -> str:
    total = len(policy.layers) + len(policy.convolutions)
    quantized = len(policy.quantized()) + len(policy.quantized_convolutions())
    words = (
        f"{documents.model_name} was quantized: {quantized} of its {plural(total, 'layer')} keep their weights as small"
        " integers instead of 16- or 32-bit numbers"
    )
    integers = [layer for layer in policy.layers.values() if layer.precision == "w4a8"]
    if integers:
        words += f". Of these, {len(integers)} run W4A8: 4-bit weights times 8-bit inputs"
    if total > quantized:
        rest = total - quantized
        words += f". {'One stays as it was' if rest == 1 else f'{rest} stay as they were'}; the policy below says why"
    return words + "."


def _size(documents: RunDocuments) -> str:
    sizes = sizes_from_run(documents)
    if sizes.model is None or not (sizes.quantized or sizes.engine):
        return "How much smaller it became is not recorded: the run did not get that far."
    parts = []
    if sizes.quantized:
        parts.append(f"the quantized graph takes {mib(sizes.quantized)} ({sizes.quantized / sizes.model:.0%})")
    if sizes.engine:
        parts.append(f"the engine takes {mib(sizes.engine)} ({sizes.engine / sizes.model:.0%})")
    return f"The traced model takes {mib(sizes.model)}; {' and '.join(parts)}."


def accuracy_words(documents: RunDocuments) -> str:
    """What verification found, in two sentences."""
    report = documents.verified
    if isinstance(report, VerifyReport):
        increase = report.perplexity_increase
        word = next((word for limit, word in _WORDS if increase <= limit), "much higher")
        word = "lower" if increase < -_WORDS[0][0] else word
        return (
            f"Perplexity says how surprised the model is by text it has not seen; lower is better. It is {word}: "
            f"{report.candidate_perplexity.perplexity:.2f} after {report.reference_perplexity.perplexity:.2f} "
            f"({increase:+.1%}) on {report.reference_perplexity.tokens} tokens. "
            f"Both models put the same next token first in {report.logits.top1_agreement:.0%} of all places."
        )
    if isinstance(report, EncoderReport):
        return (
            f"The vectors that it gives for {report.embeddings.vectors} texts point where those of the original model"
            f" do: their mean cosine is {report.embeddings.mean:.4f}, where 1 is the same direction. "
            f"{report.retrieval.top1_agreement:.0%} of the texts find the same nearest other text."
        )
    if report is None:
        return ""
    cosines = [found.cosine for found in report.outputs if found.cosine is not None]
    if not cosines:
        return f"Its {plural(len(report.outputs), 'output')} are whole numbers; the table below says how many agree."
    held_out = "data that calibration did not see" if report.held_out else "the data it was calibrated on"
    return (
        f"Its outputs point where those of the original graph do: the least cosine of {plural(len(cosines), 'output')} "
        f"is {min(cosines):.4f}, where 1 is the same direction, on {held_out}."
    )


def _proof(documents: RunDocuments) -> Text | Missing:
    build = documents.manifest.stages.get("build")
    if build is None:
        return Missing(
            "No engine was built, so there is nothing to prove about one.",
            documents.command("build", "--engine", "out.plan"),
        )
    if documents.proof is not None and documents.proof.problems:
        return Text(f"The proof does not hold: {'; '.join(documents.proof.problems)}.")
    kinds = (
        ("quantized_linears", "linear", "4-bit weights"),
        ("int8_linears", "linear", "8-bit weights"),
        ("int8_convolutions", "convolution", "8-bit weights"),
    )
    counted = [(build.summary.get(name) or 0, noun, what) for name, noun, what in kinds]
    found = " and ".join(f"{plural(count, noun)} with {what}" for count, noun, what in counted if count)
    return Text(
        f"The proof holds: the engine's own layer list shows {found or 'nothing quantized'}, as the policy asks for. A"
        " layer that is missing or has other weights would have stopped the build."
    )
