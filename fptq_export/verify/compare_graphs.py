"""A candidate graph against its reference: every output, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fptq_export.errors import UserError
from fptq_export.progress import Task
from fptq_export.verify.graph_report import OutputFigures

__all__ = ["GraphSession", "compare_graphs"]


class GraphSession(Protocol):
    """A graph that can be compared."""

    @property
    def name(self) -> str:
        """What reports and errors call it."""

    def run(self, outputs: Sequence[str], batch: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Arrays of these outputs."""


@dataclass
class _Sums:
    """Over the elements so far, in float64."""

    is_float: bool = True
    elements: int = 0
    reference: float = 0.0
    candidate: float = 0.0
    product: float = 0.0
    error: float = 0.0
    largest: float = 0.0
    equal: int = 0

    def figures(self, name: str) -> OutputFigures:
        """What they say."""
        if not self.is_float:
            share = self.equal / self.elements if self.elements else 1.0
            return OutputFigures(
                name=name, elements=self.elements, cosine=None, sqnr_db=None, max_abs_error=None, equal=share
            )
        sqnr = 10.0 * math.log10(self.reference / self.error) if self.error and self.reference else None
        return OutputFigures(
            name=name,
            elements=self.elements,
            cosine=self._cosine(),
            sqnr_db=sqnr,
            max_abs_error=self.largest,
            equal=None,
        )

    def _cosine(self) -> float:
        """1 for two zero vectors, 0 for one."""
        norms = math.sqrt(self.reference) * math.sqrt(self.candidate)
        if norms == 0.0:
            return 1.0 if self.reference == self.candidate else 0.0
        return min(1.0, max(-1.0, self.product / norms))  # rounding takes it past 1


def compare_graphs(
    reference: GraphSession,
    candidate: GraphSession,
    outputs: Sequence[str],
    batches: Iterable[Mapping[str, NDArray[Any]]],
    task: Task,
) -> tuple[OutputFigures, ...]:
    """Run both graphs on every batch; one batch of outputs is in memory at a time.

    Args:
        reference: The graph to be reproduced.
        candidate: The graph to be judged.
        outputs: Outputs that both have.
        batches: Inputs of both.
        task: Advanced by 1 for each batch.

    Raises:
        UserError: An output is no tensor, differs in shape, or is NaN or infinite.
    """
    sums = {name: _Sums() for name in outputs}
    for batch in batches:
        pairs = zip(outputs, reference.run(outputs, batch), candidate.run(outputs, batch), strict=True)
        for name, before, after in pairs:
            _check(name, before, after, reference.name, candidate.name)
            _add(sums[name], before, after)
        task.advance()
    return tuple(sums[name].figures(name) for name in outputs)


def _check(name: str, before: Any, after: Any, reference: str, candidate: str) -> None:
    if not (isinstance(before, np.ndarray) and isinstance(after, np.ndarray)):
        raise UserError(f"output {name!r}", "is a sequence, and tensors are compared", "add --no-verify")
    if before.shape != after.shape:
        cause = f"has shape {list(after.shape)} in {candidate}, and {list(before.shape)} in {reference}"
        raise UserError(f"output {name!r}", cause, "add --no-verify if its size depends on the data")
    for array, where in ((before, reference), (after, candidate)):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            hint = "a mask of -inf or an FP16 overflow is the usual cause: leave that output out of the graph"
            raise UserError(f"output {name!r}", f"is NaN or infinite in {where}", hint)


def _add(sums: _Sums, before: NDArray[Any], after: NDArray[Any]) -> None:
    sums.elements += before.size
    if before.dtype.kind != "f":
        sums.is_float = False
        sums.equal += int((before == after).sum())
        return
    r, c = (array.astype(np.float64).reshape(-1) for array in (before, after))
    sums.reference += float(r @ r)
    sums.candidate += float(c @ c)
    sums.product += float(r @ c)
    sums.error += float((r - c) @ (r - c))
    sums.largest = max(sums.largest, float(np.abs(r - c).max(initial=0.0)))
