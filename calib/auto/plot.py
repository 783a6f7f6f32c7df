"""The frontier of `auto.json` as a picture: predicted perplexity against bits, and against decode time."""

from __future__ import annotations

import importlib.util
import io
import math
from pathlib import Path

from calib.auto.report import AutoReport, PolicyTotals
from fptq_export.files import write_text

__all__ = ["can_plot", "plot_report"]


def can_plot() -> bool:
    """Whether matplotlib is installed (`pip install fptq-export[plot]`)."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_report(report: AutoReport, path: Path) -> None:
    """Write an SVG with two diagrams; the paper's policy and the choice are marked in both.

    Args:
        report: With at least one point on its frontier.
        path: Where the SVG goes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "fptq-export"}):  # the same report gives the same bytes
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for axes, attribute, label in (
            (left, "effective_bits", "bits a weight, scales included"),
            (right, "decode_us", f"µs of all linears for one token, {report.cost}"),
        ):
            axes.plot(
                [getattr(point, attribute) for point in report.pareto],
                [_percent(point.predicted_perplexity_ratio) for point in report.pareto],
                marker=".",
                label="best choice",
            )
            for name, totals, marker in (("paper", report.paper, "s"), ("auto", report.auto, "*")):
                axes.plot(getattr(totals, attribute), _percent(_ratio(totals)), marker, label=name)
            axes.set_xlabel(label)
        left.set_ylabel("predicted increase of perplexity, %")
        right.legend()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    write_text(text.getvalue(), path)


def _ratio(totals: PolicyTotals) -> float:
    return math.exp(totals.predicted_kl)


def _percent(ratio: float) -> float:
    return 100.0 * (ratio - 1.0)
