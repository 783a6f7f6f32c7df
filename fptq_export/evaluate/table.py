"""The table of an evaluation: a row a figure, a column a system."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fptq_export.evaluate.options import System
from fptq_export.evaluate.report import EvalReport, MetricFigures, MetricResult, TextResult

__all__ = ["print_report"]

_GIB = 1 << 30


def print_report(report: EvalReport, console: Console) -> None:
    """Print perplexities, metrics with their standard errors, time and memory."""
    systems = [record.system for record in report.systems]
    table = Table(title=report.model, title_justify="left")
    table.add_column("what")
    for system in systems:
        table.add_column(system, justify="right")
    for text in report.texts:
        table.add_row(f"perplexity, {text.description}", *_perplexities(text, systems))
    for task in report.tasks:
        table.add_section()
        shots = f", {task.num_fewshot}-shot" if task.num_fewshot else ""
        table.add_row(f"{task.task}, {task.documents} documents{shots}")
        for metric in task.metrics:
            table.add_row(f"  {_name(metric)}", *(_value(metric.figures[system]) for system in systems))
    table.add_section()
    table.add_row("seconds", *(f"{record.seconds:.1f}" for record in report.systems))
    table.add_row("peak GiB", *(f"{record.peak_memory_bytes / _GIB:.2f}" for record in report.systems))
    console.print(table)


def _perplexities(text: TextResult, systems: list[System]) -> list[str]:
    """Each perplexity, and how many times the first system's it is."""
    first = text.perplexity[systems[0]].perplexity
    cells = [f"{first:.2f}"]
    for system in systems[1:]:
        value = text.perplexity[system].perplexity
        cells.append(f"{value:.2f} ({value / first:.3f} x)")
    return cells


def _name(metric: MetricResult) -> str:
    direction = {True: " (higher is better)", False: " (lower is better)", None: ""}[metric.higher_is_better]
    return metric.metric + ("" if metric.filter == "none" else f", {metric.filter}") + direction


def _value(figures: MetricFigures) -> str:
    if figures.stderr is None:
        return f"{figures.value:.4g}"
    return f"{figures.value:.4g} ± {figures.stderr:.2g}"
