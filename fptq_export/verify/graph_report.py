"""`verify.json` of a graph that the user gave: how far each output is, and the gate that stands on it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from fptq_export.errors import GateError

__all__ = ["GRAPH_KIND", "GraphReport", "OutputFigures", "gate_outputs"]

GRAPH_KIND: Literal["graph"] = "graph"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class OutputFigures(_Model):
    """One output over all batches: r of the reference, c of the candidate, all elements as one vector."""

    name: str
    elements: NonNegativeInt
    cosine: float | None = Field(ge=-1.0, le=1.0)
    """<r, c> / (|r| |c|); null for integers and booleans."""
    sqnr_db: float | None
    """10 log10(|r|^2 / |r - c|^2); null where the two are equal, and for integers."""
    max_abs_error: float | None = Field(ge=0.0)
    """max |r - c|; null for integers."""
    equal: float | None = Field(ge=0.0, le=1.0)
    """Share of equal elements, for integers and booleans; null for floats."""


class GraphReport(_Model):
    """A quantized graph against the file that the user gave, on the same inputs, both in ONNX Runtime."""

    kind: Literal["graph"] = GRAPH_KIND
    schema_version: Literal[1] = 1
    reference: str
    candidate: str
    data: str
    """Where the inputs come from."""
    held_out: bool
    """Whether calibration did not see them."""
    batches: PositiveInt
    outputs: tuple[OutputFigures, ...]


def gate_outputs(report: GraphReport, min_cosine: float | None) -> None:
    """Refuse a candidate one of whose outputs is too far from the reference's.

    Args:
        report: What was measured.
        min_cosine: Smallest cosine of an output, e.g. 0.99; None allows any.

    Raises:
        GateError: An output is below the limit; names all of them.
    """
    if min_cosine is None:
        return
    low = [found for found in report.outputs if found.cosine is not None and found.cosine < min_cosine]
    if low:
        named = ", ".join(f"{found.name!r} {found.cosine:.4f}" for found in low)
        raise GateError(
            f"{report.candidate}: cosine with {report.reference} on {report.data}: {named}; the limit is "
            f"{min_cosine:.4f}\n  -> use --preset accurate or smaller groups, keep layers in float with --exclude, "
            "or lower --min-cosine"
        )
