"""`eval.json` and its table."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from fptq_export.errors import UserErrors
from fptq_export.evaluate.report import EvalReport, MetricFigures, MetricResult, SystemRecord, TaskResult, TextResult
from fptq_export.evaluate.table import print_report
from fptq_export.files import read_json_model, write_json_model
from fptq_export.verify.perplexity import PerplexityFigures


def perplexity(value: float) -> PerplexityFigures:
    return PerplexityFigures(nll_sum=1.0, tokens=1, perplexity=value)


REPORT = EvalReport(
    tool_version="0",
    command="fptq-export eval run/",
    environment={},
    model="tiny",
    max_length=16,
    seed=0,
    limit=None,
    systems=tuple(
        SystemRecord(system=name, runs="", files={}, seconds=1.5, peak_memory_bytes=1 << 30)
        for name in ("float", "onnx")
    ),
    texts=(
        TextResult(
            source="builtin",
            description="builtin: 1 x 8 tokens",
            sha256="0",
            windows=1,
            window_tokens=8,
            perplexity={"float": perplexity(10.0), "onnx": perplexity(12.5)},
        ),
    ),
    tasks=(
        TaskResult(
            task="choice",
            is_group=False,
            version="1.0",
            num_fewshot=2,
            documents=6,
            metrics=(
                MetricResult(
                    metric="acc",
                    filter="none",
                    higher_is_better=True,
                    figures={
                        "float": MetricFigures(value=0.5, stderr=0.125),
                        "onnx": MetricFigures(value=math.inf, stderr=None),
                    },
                ),
            ),
        ),
    ),
)


def test_report_survives_its_file(tmp_path: Path) -> None:
    """What is written is read back equal, infinite figures too."""
    write_json_model(REPORT, tmp_path / "eval.json")
    assert read_json_model(tmp_path / "eval.json", EvalReport) == REPORT


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ('"schema_version": 1', '"schema_version": 2', r"\$.schema_version"),
        ('"system": "onnx"', '"system": "tensorrt"', r"\$.systems\[1\].system"),
        ('"limit": null', '"limits": null', r"\$.limits"),
    ],
)
def test_report_of_another_version_is_refused(tmp_path: Path, old: str, new: str, where: str) -> None:
    """A newer schema, an unknown system and an unknown field are named, not ignored."""
    path = tmp_path / "eval.json"
    write_json_model(REPORT, path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(UserErrors, match=where):
        read_json_model(path, EvalReport)


def test_table_compares_with_the_first_system() -> None:
    """Each perplexity is a multiple of the first one, and a metric carries its error where it has one."""
    text = io.StringIO()
    print_report(REPORT, Console(file=text, width=200))
    lines = {line.split("│")[1].strip(): line for line in text.getvalue().splitlines() if "│" in line}
    assert "10.00" in lines["perplexity, builtin: 1 x 8 tokens"]
    assert "12.50 (1.250 x)" in lines["perplexity, builtin: 1 x 8 tokens"]
    assert "choice, 6 documents, 2-shot" in lines
    assert "0.5 ± 0.12" in lines["acc (higher is better)"]
    assert "inf │" in lines["acc (higher is better)"]
