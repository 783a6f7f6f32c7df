"""What of the calibration bench can be tried without ModelOpt: our contenders, the ratios, the refusals."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fptq_export.errors import UserError
from fptq_export.policy import PolicyArrays, arrays_path, read_policy
from tests.bench import calibration_contenders
from tests.bench.bench_calibration import PEERS, best, figures_of, main, table_from_figures
from tests.bench.calibration_contenders import Figures
from tests.support.traced import Traced

SLOW = Figures(import_seconds=1.0, wall_seconds=40.0, cpu_seconds=60.0, import_peak_bytes=1, peak_bytes=2_000_000_000)
LARGE = Figures(import_seconds=2.0, wall_seconds=20.0, cpu_seconds=80.0, import_peak_bytes=1, peak_bytes=4_000_000_000)
OURS = Figures(import_seconds=0.5, wall_seconds=10.0, cpu_seconds=15.0, import_peak_bytes=1, peak_bytes=500_000_000)


@pytest.mark.parametrize(("name", "method"), [("ours rtn", "rtn"), ("ours gptq, signed scales", "gptq")])
def test_our_contender_leaves_a_whole_policy(llama_fp32: Traced, tmp_path: Path, name: str, method: str) -> None:
    """What is timed ends with codes on disk, of the method that the table names, from the tokens all share."""
    shutil.copy(llama_fp32.model.with_name("sites.json"), tmp_path)
    words = [
        "--model",
        str(llama_fp32.checkpoint),
        "--workdir",
        str(tmp_path),
        "--json",
        str(tmp_path / "figures.json"),
    ]
    words += ["--calib-dataset", "random", "--calib-size", "2", "--calib-seq", "16", "--group-size", "32"]
    words += ["--threads", str(torch.get_num_threads())]
    assert calibration_contenders.main(["prepare", *words]) == 0
    assert calibration_contenders.main([name, *words]) == 0
    figures = Figures(**json.loads((tmp_path / "figures.json").read_text()))
    assert figures.wall_seconds > 0
    assert 0 < figures.import_peak_bytes <= figures.peak_bytes
    run = tmp_path / f"run-{method}"
    layers = read_policy(run / "policy.json").quantized()
    arrays = PolicyArrays(arrays_path(run / "policy.json"))
    assert {layer.weight_method for layer in layers.values()} == {method}
    negative = any((arrays.read(f"{path}.weight_scales") < 0).any() for path in layers)
    assert negative == ("signed" in name)


def test_ratios_are_against_the_better_run_of_the_peer() -> None:
    """Of its two batch sizes one is faster, the other smaller: no ratio gains from the worse one."""
    assert best(SLOW, LARGE) == Figures(1.0, 20.0, 60.0, 1, 2_000_000_000)
    console = Console(file=io.StringIO(), width=200)
    console.print(table_from_figures({"ours": OURS, PEERS[0]: SLOW, PEERS[1]: LARGE}, "tokens"))
    text = console.file.getvalue()  # type: ignore[attr-defined] # the StringIO above
    lines = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "\u2502" in line]
    assert lines[0] == ["ours", "0.5", "10.0", "15.0", "500", "0.500", "0.250", "0.250"]
    assert lines[1][-3:] == ["2.000", "1.000", "1.000"]


@pytest.mark.skipif(importlib.util.find_spec("modelopt") is not None, reason="ModelOpt is here: the bench would run")
def test_missing_peer_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1 with the next step, before anything is prepared: a figure never stands without its baseline."""
    assert main([str(tmp_path), "--workdir", str(tmp_path / "work")]) == 1
    assert "pip install nvidia-modelopt" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_contender_that_fails_is_no_figure(tmp_path: Path) -> None:
    """Its last words are shown."""
    options = argparse.Namespace(
        workdir=tmp_path, calib_dataset="random", calib_size=1, calib_seq=2, group_size=32, threads=1, model="none"
    )
    with pytest.raises(UserError, match="invalid choice: 'another'"):
        figures_of("another", options)
