"""`fptq-export monitor`: read the values, pool them, compare with the policy."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from fptq_export import __version__
from fptq_export.errors import UserError
from fptq_export.files import sha256_from_file, write_json_model
from fptq_export.monitor.options import MonitorOptions
from fptq_export.monitor.report import Finding, MonitorReport, RowFigures, figures_of_row
from fptq_export.monitor.totals import RangeTotals
from fptq_export.monitor.values import calls_from_file
from fptq_export.pipeline.run_directory import RunDirectory
from fptq_export.policy import Policy, read_policy
from fptq_export.progress import Progress
from fptq_export.range_outputs import RangeOutputs, RangeRow, read_range_outputs

__all__ = ["compare", "run_monitor"]

_HINTS: dict[Finding, str] = {
    "saturates": "clipped: quantize again with --calib-dataset of that traffic (ONNX models: --calib-data), or set"
    " these layers to per_token in policy.json and replay it with --policy",
    "drifted": "larger than in calibration: the text that calibrated is not like that traffic; quantize again with"
    " --calib-dataset of it",
    "not_finite": "infinite or NaN: the float part of the graph overflows on that traffic; export with --dtype bf16 or"
    " fp32",
}
_SCALE_HINT = (
    "clipped although calibration saw values as large: the scale covers less than those, which a --range-calibrator"
    " does on purpose, and an edited activation_scale by mistake; see its reason in policy.json"
)
_WHOLE = 0.99
"""Share of the largest value of calibration from which on a scale is said to cover it."""


def run_monitor(options: MonitorOptions, command: str, progress: Progress) -> tuple[MonitorReport, Path]:
    """Compare collected values with the policy of a run.

    Args:
        options: Run directory, files and thresholds.
        command: The command line, for the report.
        progress: Where reading reports.

    Returns:
        The report and the file it was written to.

    Raises:
        UserError: The run has no range output, its policy has changed since, or a file holds something else.
    """
    ranges, policy = _ranges_of_run(options.source)
    totals = RangeTotals.none(len(ranges.rows))
    with progress.task("Reading range outputs", total=len(options.values), unit="files") as task:
        for path in options.values:
            for calls in calls_from_file(path, len(ranges.rows)):
                totals = totals.with_calls(calls)
            task.advance()
    if not totals.calls:
        raise UserError(", ".join(map(str, options.values)), "there is no call in it", "collect at least one")
    rows = compare(ranges, policy, totals, options.max_saturation, options.max_drift)
    report = MonitorReport(
        tool_version=__version__,
        command=command,
        model=policy.model,
        files={str(path): sha256_from_file(path) for path in options.values},
        calls=totals.calls,
        max_saturation=options.max_saturation,
        max_drift=options.max_drift,
        rows=rows,
        hints=tuple(_hints(rows)),
    )
    target = RunDirectory(options.output or options.source).monitor
    write_json_model(report, target)
    return report, target


def compare(
    ranges: RangeOutputs, policy: Policy, totals: RangeTotals, max_saturation: float, max_drift: float
) -> tuple[RowFigures, ...]:
    """Judge every row; for services that pool the output themselves.

    Args:
        ranges: What the rows are.
        policy: The policy that the graph was written from.
        totals: At least one call.
        max_saturation: Share of a row's values that may be clipped.
        max_drift: Largest |x| that may come, in units of the largest of calibration.
    """
    columns = (totals.saturation_rate, totals.worst_rate, totals.peak, totals.values)
    figures = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(
        figures_of_row(row, _runs(row, policy), numbers, max_saturation, max_drift)
        for row, numbers in zip(ranges.rows, figures, strict=True)
    )


def _ranges_of_run(directory: Path) -> tuple[RangeOutputs, Policy]:
    run = RunDirectory(directory)
    path = run.range_outputs
    if not path.is_file():
        hint = f"fptq-export rewrite {directory} --emit-range-outputs writes a graph with one"
        raise UserError(str(path), "no such file: the graph of this run has no range output", hint)
    ranges, policy = read_range_outputs(path), read_policy(run.policy)
    scales = {path: layer.activation_scale for path, layer in policy.layers.items()}
    scales |= {path: entry.activation_scale for path, entry in policy.convolutions.items()}
    changed = [name for row in ranges.rows for name in row.layers if scales.get(name) != row.scale]
    if changed:
        cause = f"policy.json has other scales than the graph was written with: {', '.join(changed)}"
        raise UserError(str(path), cause, f"fptq-export rewrite {directory}, and collect the output of that graph")
    return ranges, policy


def _runs(row: RangeRow, policy: Policy) -> dict[str, str]:
    """Path -> what the layer runs."""
    return {
        path: policy.layers[path].runs if path in policy.layers else f"{policy.convolutions[path].precision} static"
        for path in row.layers
    }


def _hints(rows: Iterable[RowFigures]) -> Iterable[str]:
    """What to do, once for each kind of finding."""
    found = [row for row in rows if row.findings]
    narrow = [row for row in found if row.findings == ("saturates",) and _covers_less(row)]
    if narrow:
        yield _SCALE_HINT
    for finding, hint in _HINTS.items():
        if any(finding in row.findings for row in found if row not in narrow):
            yield hint


def _covers_less(row: RowFigures) -> bool:
    """Whether values of calibration itself would be clipped, by more than roundings."""
    return row.calibrated_absmax is not None and row.range < _WHOLE * row.calibrated_absmax
