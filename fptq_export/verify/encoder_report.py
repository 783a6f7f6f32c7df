"""`verify.json` of an encoder: what was measured, and the gate that stands on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from fptq_export.errors import GateError
from fptq_export.files import read_json_model
from fptq_export.verify.graph_report import GRAPH_KIND, GraphReport
from fptq_export.verify.report import VerifyReport

__all__ = ["CosineFigures", "EncoderReport", "RetrievalFigures", "gate_cosine", "report_from_file"]

_KIND: Literal["encoder"] = "encoder"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CosineFigures(_Model):
    """<r, c> / (|r| |c|) of the reference's vectors r and the candidate's vectors c."""

    vectors: PositiveInt
    mean: float = Field(ge=-1.0, le=1.0)
    min: float = Field(ge=-1.0, le=1.0)
    """Of the worst vector."""


class RetrievalFigures(_Model):
    """Every text searches all others by cosine of embeddings, once among the reference's and once the candidate's.

    Texts that are equally near keep the order of the text.
    """

    top1_agreement: float = Field(ge=0.0, le=1.0)
    """Share of texts whose nearest other text is the same."""
    nearest: PositiveInt
    """Neighbours looked at in the next figure: 5, or all others where there are fewer."""
    overlap: float = Field(ge=0.0, le=1.0)
    """Mean share of the reference's nearest texts that are among the candidate's nearest."""


class EncoderReport(_Model):
    """A candidate encoder against its reference on the same texts."""

    kind: Literal["encoder"] = _KIND
    schema_version: Literal[1] = 1
    reference: str
    """Name of the reference session; it runs each text alone."""
    candidate: str
    """Name of the candidate session; it runs texts in padded batches."""
    text: str
    """Where the texts come from."""
    hidden_size: PositiveInt
    hidden: CosineFigures
    """Of the hidden states, a vector a token; padding is not counted."""
    embeddings: CosineFigures
    """Of the means of the hidden states over the tokens of each text, a vector a text."""
    retrieval: RetrievalFigures


def report_from_file(path: Path) -> VerifyReport | EncoderReport | GraphReport:
    """Read `verify.json` of any model. Raises UserErrors naming every field that is wrong."""
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None  # the reader below says what is wrong with the file
    if kind == GRAPH_KIND:
        return read_json_model(path, GraphReport)
    return read_json_model(path, EncoderReport) if kind == _KIND else read_json_model(path, VerifyReport)


def gate_cosine(report: EncoderReport, min_cosine: float | None) -> None:
    """Refuse a candidate whose text embeddings are too far from the reference's on average.

    Args:
        report: What was measured.
        min_cosine: Smallest mean cosine, e.g. 0.97; None allows any.

    Raises:
        GateError: It is below the limit; names both.
    """
    if min_cosine is None or report.embeddings.mean >= min_cosine:
        return
    raise GateError(
        f"{report.candidate}: embeddings have a mean cosine of {report.embeddings.mean:.4f} with those of "
        f"{report.reference} ({report.embeddings.vectors} texts); the limit is {min_cosine:.4f}"
        f"\n  -> use --preset accurate or smaller groups, keep layers in float with --exclude, or lower --min-cosine"
    )
