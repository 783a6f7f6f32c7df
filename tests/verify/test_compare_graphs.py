"""Figures of a graph's outputs are those of all batches as one vector, and the gate stands on the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fptq_export.errors import GateError, UserError
from fptq_export.files import write_json_model
from fptq_export.progress import NoProgress
from fptq_export.verify.compare_graphs import compare_graphs
from fptq_export.verify.encoder_report import report_from_file
from fptq_export.verify.graph_report import GraphReport, OutputFigures, gate_outputs

ROUNDING = 1e-12
"""Of sums and square roots in float64, two orders above what a dozen of them make."""


@dataclass
class Given:
    """A graph that gives what it is told, batch by batch."""

    name: str
    batches: list[dict[str, Any]]

    def run(self, outputs: Sequence[str], batch: Mapping[str, NDArray[Any]]) -> list[Any]:
        """The arrays of the batch whose number is `i`."""
        return [self.batches[int(batch["i"])][name] for name in outputs]


def figures(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> tuple[OutputFigures, ...]:
    """What is measured between the two."""
    numbers = [{"i": np.array(number)} for number in range(len(before))]
    with NoProgress().task("", None) as task:
        return compare_graphs(Given("float", before), Given("int", after), list(before[0]), numbers, task)


def floats(*values: float) -> dict[str, NDArray[np.float32]]:
    """An output `y`."""
    return {"y": np.array(values, np.float32)}


def test_figures_cover_all_batches() -> None:
    """Cosine and SQNR of the concatenated outputs, not means of those of the batches."""
    (found,) = figures([floats(3, 0), floats(0, 4)], [floats(3, 0), floats(0, 3)])
    assert found.elements == 4
    assert found.cosine == pytest.approx((9 + 12) / (5 * math.sqrt(18)), abs=ROUNDING)
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 1), abs=ROUNDING)
    assert found.max_abs_error == 1.0


def test_equal_outputs_have_no_error() -> None:
    """Zeros too: their cosine is 1 by definition, and no SQNR exists."""
    for values in ((1.5, -2.0), (0.0, 0.0)):
        (found,) = figures([floats(*values)], [floats(*values)])
        assert (found.sqnr_db, found.max_abs_error) == (None, 0.0)
        assert found.cosine == pytest.approx(1.0, abs=ROUNDING)


def test_output_that_became_zero_has_cosine_zero() -> None:
    """And a gate refuses it."""
    (found,) = figures([floats(1, 2)], [floats(0, 0)])
    assert found.cosine == 0.0


def test_integers_are_counted() -> None:
    """Share of equal elements; no cosine."""
    (found,) = figures([{"y": np.array([1, 2, 3, 4])}], [{"y": np.array([1, 2, 3, 5])}])
    assert (found.equal, found.cosine, found.sqnr_db) == (0.75, None, None)


@pytest.mark.parametrize(
    ("before", "after", "cause"),
    [
        (floats(1), floats(1, 2), r"has shape \[2\] in int, and \[1\] in float"),
        (floats(1), floats(np.inf), "is NaN or infinite in int"),
        (floats(np.nan), floats(1), "is NaN or infinite in float"),
        ({"y": [np.zeros(1)]}, {"y": [np.zeros(1)]}, "is a sequence"),
    ],
    ids=["shape", "candidate", "reference", "sequence"],
)
def test_outputs_that_cannot_be_compared_are_refused(before: Any, after: Any, cause: str) -> None:
    """The output is named."""
    with pytest.raises(UserError, match=f"output 'y': {cause}"):
        figures([before], [after])


def report(*cosines: float | None) -> GraphReport:
    """A report of outputs y0, y1, ..."""
    outputs = tuple(
        OutputFigures(name=f"y{number}", elements=1, cosine=cosine, sqnr_db=None, max_abs_error=None, equal=None)
        for number, cosine in enumerate(cosines)
    )
    return GraphReport(
        reference="a.onnx", candidate="b.onnx", data="x.npz: 1 batch", held_out=False, batches=1, outputs=outputs
    )


def test_gate_names_every_output_below_the_limit() -> None:
    """Integers have no cosine and pass."""
    with pytest.raises(GateError, match=r"'y1' 0\.9000, 'y3' 0\.5000; the limit is 0\.9500"):
        gate_outputs(report(0.99, 0.9, None, 0.5), 0.95)


@pytest.mark.parametrize("limit", [None, 0.9])
def test_gate_lets_pass_what_is_allowed(limit: float | None) -> None:
    """The limit itself is allowed."""
    gate_outputs(report(0.9, None), limit)


def test_report_survives_the_file(tmp_path: Path) -> None:
    """It is told from the reports of other models by its kind."""
    path = tmp_path / "verify.json"
    write_json_model(report(0.5), path)
    assert report_from_file(path) == report(0.5)
