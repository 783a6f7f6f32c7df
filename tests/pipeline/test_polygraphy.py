"""Polygraphy's own command line runs on our files."""

from __future__ import annotations

from pathlib import Path

from tests.support.polygraphy import run_polygraphy

SHAPES = (
    "input_ids:[1,8]",
    "attention_mask:[1,8]",
    "position_ids:[1,8]",
    *(f"past_key_values.{layer}.{part}:[1,2,0,16]" for layer in range(2) for part in ("key", "value")),
)
LEAST_COSINE = "0.999"
"""Both forms hold the same codes and scales; FP16 rounding (2^-11) and the INT8 codes it flips are all that differs."""


def polygraphy(*words: object, directory: Path) -> str:
    """Run the command, which must succeed, and return its output."""
    done = run_polygraphy(*words, directory=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_polygraphy_compares_the_two_forms(finished_run: Path, tmp_path: Path) -> None:
    """`polygraphy run` runs both files in stock ONNX Runtime and finds equal logits."""
    run = finished_run / "run"
    common = ("--onnxrt", "--input-shapes", *SHAPES, "--val-range", "input_ids:[0,511]", "attention_mask:[1,1]")
    polygraphy(
        "run",
        str(run / "model.qdq.onnx"),
        *common,
        "--save-inputs",
        "in.json",
        "--save-outputs",
        "ref.json",
        directory=tmp_path,
    )
    output = polygraphy(
        "run", str(run / "model.w4a8.onnx"), "--onnxrt", "--load-inputs", "in.json", "--load-outputs", "ref.json",
        "--compare", "cosine_similarity", "--cosine-similarity-threshold", f"logits:{LEAST_COSINE}",
        directory=tmp_path,
    )  # fmt: skip
    assert "PASSED" in output
    assert "logits" in output


def test_polygraphy_inspects_the_graph(finished_run: Path, tmp_path: Path) -> None:
    """`polygraphy inspect model` shows the fused nodes and their INT4 weights."""
    output = polygraphy(
        "inspect", "model", str(finished_run / "run" / "model.w4a8.onnx"), "--show", "layers", "weights",
        directory=tmp_path,
    )  # fmt: skip
    assert "FptqW4A8GemmStatic" in output
    assert "int4" in output.lower()
