"""`fptq-export report`: read a run directory, write `report.html` and `report.md`."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.files import write_text
from fptq_export.package.manifest import read_manifest
from fptq_export.progress import Progress
from fptq_export.report.blocks import Report
from fptq_export.tasks import HALF_DIRECTORIES, is_half

__all__ = ["HTML_FILE", "MARKDOWN_FILE", "ReportFiles", "check_libraries", "report_from_run", "run_report"]

HTML_FILE = "report.html"
MARKDOWN_FILE = "report.md"
_LIBRARIES = ("jinja2", "matplotlib")


@dataclass(frozen=True)
class ReportFiles:
    """What was written for one run."""

    run: Path
    html: Path
    markdown: Path


def check_libraries() -> None:
    """Raise UserError where a library of the extra `report` is not installed; names the pip command."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError("report", f"needs {' and '.join(missing)}", "pip install 'fptq-export[report]'")


def run_report(directory: Path, output: Path | None, cost_table: Path | None, progress: Progress) -> list[ReportFiles]:
    """Write the report of a run, or of both halves of an encoder-decoder.

    Args:
        directory: A run directory, or the one above both halves.
        output: Where the files go; None is the run directory. Halves go into folders of it.
        cost_table: Measured decode times.
        progress: Where long work reports.

    Raises:
        UserError: A library is missing, or a file of the run cannot be read; names it.
    """
    check_libraries()
    halves = [name for name in HALF_DIRECTORIES.values() if read_manifest(directory / name) is not None]
    if read_manifest(directory) is not None or not halves:
        return [_written(directory, output or directory, cost_table, progress)]
    return [_written(directory / name, (output or directory) / name, cost_table, progress) for name in halves]


def _written(directory: Path, output: Path, cost_table: Path | None, progress: Progress) -> ReportFiles:
    from fptq_export.report.html import html_from_report
    from fptq_export.report.markdown import markdown_from_report

    with progress.task(f"report of {directory}", None):
        report = report_from_run(directory, cost_table)
        files = ReportFiles(directory, output / HTML_FILE, output / MARKDOWN_FILE)
        write_text(html_from_report(report), files.html)
        write_text(markdown_from_report(report), files.markdown)
    return files


def report_from_run(directory: Path, cost_table: Path | None = None) -> Report:
    """Every section of the report of one run directory."""
    # Below, not above: the documents' schemas load what `--help` must not.
    from fptq_export.report.accuracy_section import accuracy_section
    from fptq_export.report.cost_sections import cost_section
    from fptq_export.report.documents import read_documents
    from fptq_export.report.layer_sections import error_section, policy_section, ranges_section
    from fptq_export.report.layers import layer_figures
    from fptq_export.report.remarks import remarks_section
    from fptq_export.report.run_sections import (
        calibration_section,
        command_section,
        environment_section,
        proof_section,
    )
    from fptq_export.report.summary_section import summary_section

    documents = read_documents(directory, cost_table)
    layers = layer_figures(documents)
    task = documents.manifest.options.task
    half = f", {task}" if is_half(task) else ""
    return Report(
        title=f"{documents.model_name}{half}: W4A8 by FPTQ",
        generator=f"fptq-export {__version__}",
        sections=(
            summary_section(documents),
            remarks_section(documents, layers),
            policy_section(documents, layers),
            ranges_section(documents, layers),
            error_section(documents, layers),
            cost_section(documents),
            accuracy_section(documents),
            proof_section(documents),
            calibration_section(documents),
            environment_section(documents),
            command_section(documents),
        ),
    )
