"""What of the GPU bench can be tried without a GPU: its figures, its baseline's graph and engine, its refusal."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from rich.console import Console

from fptq_export import numerics
from fptq_export.build.targets import Target
from fptq_export.build.tensorrt import tensorrt_for_target
from tests.bench.bench_gpu_w4a8 import BASELINES, Timing, check_same_linear, main, table_from_timings
from tests.bench.int4_engine import int4_linear, plan_from_model
from tests.support.graphs import linear_numbers

NUMBERS = linear_numbers(in_features=256, out_features=64, group_size=128)
TIMING = Timing("7B", 1, 4096, 4096, ours=8.0, best=6.0, cublas_fp16=20.0, cublaslt_int8=None, tensorrt_int4=4.0)
EXACT = 1e-12
"""Relative: a few roundings of float64."""


def test_ratios_and_rates_are_their_formulas() -> None:
    """Above 1 is faster; what did not run has no ratio; GB/s counts codes and scales, TOPS two a multiply-add."""
    assert [TIMING.ratio(name) for name in BASELINES] == [2.5, None, 0.5]
    gigabytes = (4096 * 4096 / 2 + 4096 * 32 * 2) * 1e-9
    assert TIMING.weight_gigabytes_per_second == pytest.approx(gigabytes / 8e-6, rel=EXACT, abs=0.0)
    assert TIMING.tops == pytest.approx(2 * 4096 * 4096 * 1e-12 / 8e-6, rel=EXACT, abs=0.0)


def test_table_has_a_line_for_each_problem() -> None:
    """A missing baseline is a dash and not a zero."""
    console = Console(file=io.StringIO(), width=200)
    console.print(table_from_timings([TIMING, TIMING]))
    text = console.file.getvalue()  # type: ignore[attr-defined] # the StringIO above
    lines = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "7B" in line]
    assert lines == [["7B", "1", "4096", "4096", "8", "6", "1081", "4.194", "2.50", "-", "0.50"]] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: the bench would run")
def test_machine_without_a_gpu_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, a sentence with the next step, no traceback and no file."""
    assert main(["--json", str(tmp_path / "gpu.json")]) == 1
    text = capsys.readouterr().err
    assert text.startswith("error: bench_gpu_w4a8: torch sees no NVIDIA GPU here\n")
    assert "run it on a machine with a GPU" in text
    assert list(tmp_path.iterdir()) == []


def test_baseline_is_the_same_linear() -> None:
    """TensorRT's INT4 graph multiplies with the weight that ours is timed with."""
    model = int4_linear(np.ascontiguousarray(NUMBERS.codes.T), np.ascontiguousarray(NUMBERS.scales.T), 128)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float16)
    expected = x.astype(np.float64) @ numerics.dequantize_weight(NUMBERS.codes, NUMBERS.scales, 128).T
    check_same_linear(torch.from_numpy(session.run(None, {"x": x})[0]).double(), torch.from_numpy(expected))


def test_another_linear_is_not_timed() -> None:
    """Results that differ, or are NaN, stop the bench."""
    ones = torch.ones(4)
    for wrong in (2 * ones, torch.full((4,), torch.nan)):
        with pytest.raises(AssertionError, match="different linears"):
            check_same_linear(wrong, ones)


def test_baseline_becomes_an_engine() -> None:
    """TensorRT for RTX builds the INT4 linear, with its weight in 4 bits."""
    rng = np.random.default_rng(1)
    codes = rng.integers(-8, 8, (512, 2048), dtype=np.int8)
    model = int4_linear(codes, rng.uniform(0.001, 0.01, (4, 2048)).astype(np.float16), 128)
    plan = plan_from_model(tensorrt_for_target(Target.TENSORRT_RTX), model, 16, "SM80")
    assert codes.size // 2 < len(plan) < codes.size
