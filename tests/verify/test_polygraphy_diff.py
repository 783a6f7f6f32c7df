from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.verify.polygraphy_diff import diff_sessions
from fptq_export.verify.sessions import OnnxCausalSession
from tests.support.polygraphy import run_polygraphy

FLOAT32_TOLERANCE = 3072 * 2.0**-23
"""Relative: Polygraphy adds 24 x 128 squares in float32."""


def test_figures_equal_their_formulas(make_toy: Any, windows: NDArray[np.int64]) -> None:
    """Polygraphy's cosine, PSNR and L2 are those of the two sessions' logits, in this order."""
    reference, candidate = make_toy("r", seed=0), make_toy("c", seed=1)
    figures = diff_sessions(reference, candidate, windows[0])
    r, c = (session.prefill(windows[:1])[0].astype(np.float64) for session in (reference, candidate))
    expected = {
        "cosine_similarity": (r * c).sum() / np.linalg.norm(r) / np.linalg.norm(c),
        "psnr_db": 20 * np.log10(r.max()) - 10 * np.log10(np.square(r - c).mean()),
        "l2_norm": np.linalg.norm(r - c),
    }
    measured = figures.model_dump(exclude={"version", "tokens"})
    assert measured == pytest.approx(expected, rel=FLOAT32_TOLERANCE, abs=FLOAT32_TOLERANCE)
    assert figures.tokens == 20


def test_identical_sessions_have_no_difference(toy: Any, windows: NDArray[np.int64]) -> None:
    """The same session twice: L2 0, PSNR infinite; equal names do not confuse the two."""
    figures = diff_sessions(toy, toy, windows[0])
    assert (figures.l2_norm, figures.psnr_db) == (0.0, np.inf)
    assert figures.cosine_similarity == pytest.approx(1.0, rel=FLOAT32_TOLERANCE, abs=0.0)


def test_nothing_is_printed(make_toy: Any, windows: NDArray[np.int64], capfd: pytest.CaptureFixture[str]) -> None:
    """Polygraphy's log, its verdict with thresholds of its own included, stays out of our output."""
    diff_sessions(make_toy("r", seed=0), make_toy("c", seed=1), windows[0])
    assert capfd.readouterr() == ("", "")


def test_other_vocabulary_is_refused(make_toy: Any, windows: NDArray[np.int64]) -> None:
    """Logits of other shapes are an error with both shapes and not a failed comparison."""
    with pytest.raises(UserError, match=r"\(1, 20, 16\) and \(1, 20, 18\)"):
        diff_sessions(make_toy("r"), make_toy("c", vocabulary=18), windows[0])


def test_nan_is_refused(make_toy: Any, windows: NDArray[np.int64]) -> None:
    """NaN logits never become a figure."""
    broken = make_toy("c")
    broken.own[windows[0, 3], 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        diff_sessions(make_toy("r"), broken, windows[0])


def test_bfloat16_feed_is_refused_before_running(toy: Any, windows: NDArray[np.int64], tmp_path: Path) -> None:
    """Polygraphy's files cannot hold BF16: said before anything runs or is written."""
    feed = {"input_ids": windows[:1], "past": np.zeros((1, 0), ml_dtypes.bfloat16)}
    with pytest.raises(UserError, match="cannot hold bfloat16"):
        diff_sessions(toy, toy, windows[0], feed=feed, save_inputs_path=tmp_path / "inputs.json")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tiny_llama: Any, tmp_path: Path) -> tuple[Path, Path]:
    """Inputs and FP32 outputs of a window, as files for the command line."""
    reference = OnnxCausalSession(tiny_llama.fp32, threads=1)
    candidate = OnnxCausalSession(tiny_llama.fp16, threads=1)
    inputs, outputs = tmp_path / "inputs.json", tmp_path / "outputs.json"
    diff_sessions(
        reference,
        candidate,
        tiny_llama.ids[0],
        feed=candidate.prefill_feed(tiny_llama.ids[:1]),
        save_inputs_path=inputs,
        save_outputs_path=outputs,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inputs.json", "outputs.json"]
    return inputs, outputs


_COMPARE = ("--compare", "cosine_similarity", "psnr", "l2", "--l2-threshold", "10")


def test_command_line_accepts_the_same_model(tiny_llama: Any, saved: tuple[Path, Path]) -> None:
    """`polygraphy run` on the FP16 graph with our files compares its logits with the FP32 ones, and passes."""
    inputs, outputs = saved
    done = run_polygraphy(
        "run", tiny_llama.fp16, "--onnxrt", "--load-inputs", inputs, "--load-outputs", outputs, *_COMPARE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "logits" in done.stdout
    assert "PASSED" in done.stdout


def test_command_line_refuses_other_outputs(tiny_llama: Any, saved: tuple[Path, Path], tmp_path: Path) -> None:
    """The same command fails when the outputs are those of another text: it does compare."""
    inputs, _ = saved
    reference = OnnxCausalSession(tiny_llama.fp32, threads=1)
    others = tmp_path / "others.json"
    diff_sessions(reference, reference, tiny_llama.ids[1], save_outputs_path=others)
    done = run_polygraphy(
        "run", tiny_llama.fp16, "--onnxrt", "--load-inputs", inputs, "--load-outputs", others, *_COMPARE
    )
    assert done.returncode != 0
    assert "FAILED" in done.stdout


def test_command_line_inspects_the_graph(tiny_llama: Any) -> None:
    """`polygraphy inspect model` reads the graph with its external weights."""
    done = run_polygraphy("inspect", "model", tiny_llama.fp16, "--show", "layers", "weights")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "past_key_values.1.value" in done.stdout
    assert "MatMul" in done.stdout
