"""The table of a diff: a row a figure, a column a candidate."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fptq_export.diff.report import CandidateDiff, DiffReport, PartFigures

__all__ = ["print_report"]

_GIB = 1 << 30
_NONE = "-"

_Row = tuple[str, Callable[[CandidateDiff], str]]


def print_report(report: DiffReport, console: Console) -> None:
    """Print figures of prefill and decode steps, the first divergence, time and memory; then what was left out."""
    table = Table(title=f"{report.model} against {report.reference.runs}", title_justify="left")
    table.add_column("what")
    for candidate in report.candidates:
        table.add_column(candidate.system, justify="right")
    if report.candidates:
        for title, rows in _sections(report):
            table.add_section()
            table.add_row(f"[bold]{title}[/bold]")
            for name, value in rows:
                table.add_row(f"  {name}", *(value(candidate) for candidate in report.candidates))
    console.print(table)
    for candidate in report.candidates:
        _print_divergence(candidate, console)
    for system, reason in report.left_out.items():
        console.print(f"{system}: left out, {reason}", markup=False, soft_wrap=True)


def _sections(report: DiffReport) -> list[tuple[str, list[_Row]]]:
    prefill = f"prefill, {report.windows} x {report.window_tokens} tokens"
    decode = f"decode, {report.windows} x {report.decode_steps} steps behind {report.head_tokens} tokens"
    return [
        (prefill, _part_rows(lambda candidate: candidate.prefill)),
        (decode, _part_rows(lambda candidate: candidate.decode)),
        (
            f"greedy, {report.decode_steps} steps",
            [("first diverging token", lambda candidate: _position(candidate.greedy.first_divergence))],
        ),
        (
            "cost",
            [
                ("seconds", lambda candidate: f"{candidate.run.seconds:.1f}"),
                ("peak GiB", lambda candidate: f"{candidate.run.peak_memory_bytes / _GIB:.2f}"),
            ],
        ),
    ]


def _part_rows(part: Callable[[CandidateDiff], PartFigures]) -> list[_Row]:
    return [
        ("perplexity", lambda candidate: _perplexity(part(candidate))),
        ("KL, nats", lambda candidate: f"{part(candidate).logits.kl_mean:.4f}"),
        (
            "cosine, mean (least)",
            lambda candidate: f"{part(candidate).logits.cosine_mean:.4f} ({part(candidate).logits.cosine_min:.4f})",
        ),
        ("PSNR, dB", lambda candidate: f"{part(candidate).psnr_db:.2f}"),
        ("top-1 agreement", lambda candidate: f"{part(candidate).logits.top1_agreement:.1%}"),
        ("top-5 agreement", lambda candidate: f"{part(candidate).top5_agreement:.1%}"),
    ]


def _perplexity(part: PartFigures) -> str:
    candidate, reference = part.candidate_perplexity.perplexity, part.reference_perplexity.perplexity
    return f"{candidate:.2f} ({reference:.2f} {part.perplexity_increase:+.1%})"


def _position(position: int | None) -> str:
    return _NONE if position is None else str(position)


def _print_divergence(candidate: CandidateDiff, console: Console) -> None:
    greedy = candidate.greedy
    if greedy.first_divergence is None or greedy.reference_text is None or greedy.candidate_text is None:
        return
    console.print(f"{candidate.system}, from token {greedy.first_divergence} on:")
    console.print(f"  reference  {escape(repr(greedy.reference_text))}", soft_wrap=True)
    console.print(f"  candidate  {escape(repr(greedy.candidate_text))}", soft_wrap=True)
