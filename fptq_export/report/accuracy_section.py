"""The section about accuracy: what `verify`, `eval` and `diff` measured."""

from __future__ import annotations

from collections.abc import Iterator

from fptq_export.evaluate.options import System
from fptq_export.evaluate.report import EvalReport, MetricFigures
from fptq_export.pipeline.summary import accuracy_rows
from fptq_export.report.blocks import Block, Cell, Column, Missing, Section, Table, Text
from fptq_export.report.diff_blocks import diff_blocks
from fptq_export.report.documents import RunDocuments
from fptq_export.report.numbers import number
from fptq_export.report.summary_section import accuracy_words
from fptq_export.verify.report import VerifyReport

__all__ = ["accuracy_section"]


def accuracy_section(documents: RunDocuments) -> Section:
    """Everything that was measured of the quantized model."""
    blocks = [*_verify_blocks(documents), *_diff_blocks(documents), *_eval_blocks(documents)]
    return Section("accuracy", "Accuracy", tuple(blocks))


def _verify_blocks(documents: RunDocuments) -> Iterator[Block]:
    report = documents.verified
    if report is None:
        yield Missing("The quantized graph was not compared with the float model.", documents.command("verify"))
        return
    yield Text(accuracy_words(documents))
    caption = f"{report.candidate} against {report.reference}"
    yield Table.of_texts("table-verify", caption, ("what", "value"), accuracy_rows(report))
    if isinstance(report, VerifyReport):
        cache = report.cache
        verdict = "explains that" if cache.within_bound else "does NOT explain that: the cache is not carried"
        yield Text(
            f"Decoding against prefill: {cache.steps} steps differ from it by at most {cache.max_abs_diff:.4g}, and"
            f" rounding, which may reach {cache.bound:.4g}, {verdict}."
        )


def _diff_blocks(documents: RunDocuments) -> Iterator[Block]:
    if documents.diffed is not None:
        yield from diff_blocks(documents.diffed)
    elif documents.predicts_text:
        text = "The ways of running the quantized model were not compared step by step."
        yield Missing(text, documents.command("diff"))


def _eval_blocks(documents: RunDocuments) -> Iterator[Block]:
    report = documents.evaluated
    if report is None:
        if not documents.predicts_text:
            yield Missing("Tasks and texts are evaluated for language models alone; this is none.")
        else:
            yield Missing("No other text and no task was evaluated.", documents.command("eval"))
        return
    systems = [record.system for record in report.systems]
    columns = (Column("text or task"), *(Column(system, numeric=True) for system in systems))
    rows = (*_text_rows(report, systems), *_task_rows(report, systems))
    limited = f"; tasks cut to {report.limit} documents" if report.limit else ""
    yield Table("table-eval", f"Evaluated by {report.command}{limited}", columns, rows)


def _text_rows(report: EvalReport, systems: list[System]) -> Iterator[tuple[Cell, ...]]:
    for text in report.texts:
        yield (
            Cell(f"perplexity, {text.description}"),
            *(number(text.perplexity[system].perplexity) for system in systems),
        )


def _task_rows(report: EvalReport, systems: list[System]) -> Iterator[tuple[Cell, ...]]:
    for task in report.tasks:
        for metric in task.metrics:
            direction = {True: ", higher is better", False: ", lower is better", None: ""}[metric.higher_is_better]
            name = f"{task.task}, {metric.metric}{direction}, {task.documents} documents"
            yield Cell(name), *(_metric(metric.figures[system]) for system in systems)


def _metric(figures: MetricFigures) -> Cell:
    error = "" if figures.stderr is None else f" ± {figures.stderr:.2g}"
    return Cell(f"{figures.value:.4g}{error}", figures.value)
