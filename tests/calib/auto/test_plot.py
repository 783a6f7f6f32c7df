"""The picture of the frontier: made from the report alone, the same for the same report."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from calib.auto.plot import plot_report
from calib.auto.report import AutoReport, ParetoPoint, PolicyTotals


def report() -> AutoReport:
    totals = PolicyTotals(effective_bits=4.25, decode_us=10.0, dynamic_layers=1, predicted_kl=0.1, measured_kl=0.1)
    points = [
        ParetoPoint(effective_bits=bits, decode_us=2 * bits, predicted_kl=1 / bits, predicted_perplexity_ratio=1.2)
        for bits in (4.25, 5.0, 8.0)
    ]
    return AutoReport(
        effective_bits=4.25, max_kl=None, max_dynamic_layers=None, cost="modelled", kept="auto",
        auto=totals, paper=totals, pareto=tuple(points),
    )  # fmt: skip


def test_picture_is_svg_and_repeatable(tmp_path: Path) -> None:
    """A run that repeats nothing needs a file that does not change with the day."""
    first, second = tmp_path / "a.svg", tmp_path / "b.svg"
    plot_report(report(), first)
    plot_report(report(), second)
    assert ElementTree.parse(first).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert first.read_bytes() == second.read_bytes()
