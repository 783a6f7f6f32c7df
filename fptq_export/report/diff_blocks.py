"""What `diff` measured: each way of running the quantized model against the float model."""

from __future__ import annotations

from collections.abc import Iterator

from fptq_export.diff.report import DiffReport, PartFigures
from fptq_export.report.blocks import Block, Cell, Column, Table, Text
from fptq_export.report.numbers import number

__all__ = ["diff_blocks"]


def diff_blocks(report: DiffReport) -> Iterator[Block]:
    """Prefill and decode of every candidate in a table, and where greedy text parts."""
    columns = (
        Column("system"),
        Column("part"),
        *(
            Column(title, numeric=True)
            for title in ("perplexity", "increase, %", "KL, nats", "cosine", "PSNR, dB", "top-1, %", "top-5, %")
        ),
    )
    rows = tuple(
        (Cell(found.system), Cell(name), *_cells(part))
        for found in report.candidates
        for name, part in (("prefill", found.prefill), ("decode", found.decode))
    )
    caption = f"Against {report.reference.runs}, {report.windows} x {report.window_tokens} tokens of {report.text}"
    yield Table("table-diff", caption, columns, rows)
    for found in report.candidates:
        first = found.greedy.first_divergence
        where = "nowhere" if first is None else f"at token {first}"
        yield Text(f"Greedy text of {found.system} parts from the reference's {where}.")
    for system, reason in report.left_out.items():
        yield Text(f"{system} was left out: {reason}")


def _cells(part: PartFigures) -> tuple[Cell, ...]:
    return (
        number(part.candidate_perplexity.perplexity),
        number(100 * part.perplexity_increase, "+.2f"),
        number(part.logits.kl_mean),
        number(part.logits.cosine_mean, ".4f"),
        number(part.psnr_db, ".1f"),
        number(100 * part.logits.top1_agreement, ".1f"),
        number(100 * part.top5_agreement, ".1f"),
    )
