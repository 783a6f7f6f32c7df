"""What is a finding, what is not, and what the report advises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fptq_export.errors import UserError
from fptq_export.files import read_json_model, write_json_model
from fptq_export.monitor.options import MonitorOptions
from fptq_export.monitor.report import MonitorReport
from fptq_export.monitor.run import run_monitor
from fptq_export.monitor.table import print_report
from fptq_export.policy import ConvolutionPolicy, LayerPolicy, Policy, Rule
from fptq_export.progress import NoProgress
from fptq_export.range_outputs import RangeOutputs, RangeRow

SCALE = 0.125
RANGE = 127 * SCALE


def write_run(directory: Path, **row: Any) -> Path:
    """A run of three rows: q and k, an expert, a convolution; `row` changes the first."""
    first = {"layers": ("a.q_proj", "a.k_proj"), "scale": SCALE, "calibrated_absmax": RANGE, **row}
    expert = RangeRow(layers=("e.up",), scale=SCALE, calibrated_absmax=RANGE, expert="e")
    convolution = RangeRow(layers=("conv",), scale=SCALE, calibrated_absmax=None)
    write_json_model(RangeOutputs(rows=(RangeRow(**first), expert, convolution)), directory / "range_outputs.json")
    layer = LayerPolicy(
        precision="w4a8",
        activation="static",
        reason="",
        in_features=64,
        out_features=64,
        activation_scale=SCALE,
        group_size=32,
    )
    conv = ConvolutionPolicy(precision="w8a8", reason="", weight_shape=(1, 1, 1, 1), activation_scale=SCALE)
    layers = dict.fromkeys(("a.q_proj", "a.k_proj", "e.up"), layer)
    policy = Policy(model="m", rule=Rule(), layers=layers, convolutions={"conv": conv})
    write_json_model(policy, directory / "policy.json")
    return directory


def report_of(run: Path, *rows: tuple[float, float], **thresholds: float) -> MonitorReport:
    """Of one call with these rates and peaks; rows that are not given are quiet."""
    quiet = [(0.0, 0.5)] * (3 - len(rows))
    np.save(run / "values.npy", np.array([[rate, peak, 4096] for rate, peak in (*rows, *quiet)], np.float32))
    options = MonitorOptions(source=run, values=(run / "values.npy",), **thresholds)  # type: ignore[arg-type]
    return run_monitor(options, "command", NoProgress())[0]


@pytest.mark.parametrize(
    ("rate", "peak", "findings", "advice"),
    [
        (0.0, 1.0, (), None),
        (2.0**-10, 2.0, (), None),
        (2.0**-9, 2.0, ("saturates",), "--calib-dataset of that traffic"),
        (0.0, 2.25, ("drifted",), "larger than in calibration"),
        (0.5, 4.0, ("saturates", "drifted"), "larger than in calibration"),
        (0.5, np.inf, ("saturates", "drifted", "not_finite"), "overflows"),
    ],
)
def test_findings_are_what_is_beyond_a_threshold(
    tmp_path: Path, rate: float, peak: float, findings: tuple[str, ...], advice: str | None
) -> None:
    """Thresholds themselves are allowed; each finding comes with what to do about it."""
    report = report_of(write_run(tmp_path), (rate, peak), max_saturation=2.0**-10, max_drift=2.0)
    assert [row.findings for row in report.rows] == [findings, (), ()]
    assert any(advice in hint for hint in report.hints) if advice else not report.hints
    assert read_json_model(tmp_path / "monitor.json", MonitorReport) == report


def test_a_scale_that_covers_less_than_calibration_is_told_apart_from_drift(tmp_path: Path) -> None:
    """Values as large as in calibration that are clipped are the scale's fault: calibrating again is no cure."""
    report = report_of(write_run(tmp_path, calibrated_absmax=10 * RANGE), (0.25, 9.0))
    assert report.rows[0].findings == ("saturates",)
    assert report.rows[0].drift == pytest.approx(0.9, rel=2.0**-22)
    (hint,) = report.hints
    assert "although calibration saw values as large" in hint


def test_experts_are_shown_and_not_judged(tmp_path: Path) -> None:
    """The graph runs them on tokens of other experts, which calibration did not see: that is no drift."""
    report = report_of(write_run(tmp_path), (0.0, 0.5), (0.5, 9.0))
    assert (report.rows[1].saturation_rate, report.rows[1].findings) == (0.5, ())


def test_a_layer_without_a_measurement_can_saturate_and_not_drift(tmp_path: Path) -> None:
    """Nothing is made up for it: drift is null."""
    report = report_of(write_run(tmp_path), (0.0, 0.5), (0.0, 0.5), (0.5, 9.0))
    assert (report.rows[2].drift, report.rows[2].findings) == (None, ("saturates",))


def test_the_table_names_layers_and_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was found comes first, with the paths; all of it in a terminal of 80 columns."""
    report = report_of(write_run(tmp_path), (0.25, 4.0), (0.5, 9.0))
    print_report(report, Console(width=80))
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if "a.q_proj, k_proj" in line)
    assert all(word in line for word in ("25.0000%", " 4 ", "saturates"))
    assert "drifted" in out
    assert out.index("a.q_proj") < out.index("e.up")
    assert all(hint in " ".join(out.split()) for hint in report.hints)
    assert len(report.hints) == 2


def test_values_of_a_changed_policy_are_refused(tmp_path: Path) -> None:
    """Rates belong to the scales they were measured with."""
    run = write_run(tmp_path, scale=SCALE / 2)
    with pytest.raises(UserError, match=r"other scales than the graph was written with: a\.q_proj, a\.k_proj"):
        report_of(run)


def test_run_without_range_output_is_told_how_to_get_one(tmp_path: Path) -> None:
    """The hint is the command."""
    run = write_run(tmp_path)
    (run / "range_outputs.json").unlink()
    with pytest.raises(UserError, match=r"rewrite .* --emit-range-outputs"):
        report_of(run)


def test_files_without_a_call_are_refused(tmp_path: Path) -> None:
    """Nothing collected is not the same as nothing found."""
    run = write_run(tmp_path)
    (run / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="there is no call in it"):
        run_monitor(MonitorOptions(source=run, values=(run / "empty.jsonl",)), "", NoProgress())
