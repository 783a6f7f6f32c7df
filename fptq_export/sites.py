"""`sites.json`: which linears the traced graph has, what each reads, and where an equalization can be folded.

Written by trace, read by calibration (which linears share an input and may be equalized) and by the rewrites (which
node and which initializers to touch).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict

from fptq_export.files import read_json_model, write_json_model

__all__ = [
    "SITES_SCHEMA_VERSION",
    "FoldSite",
    "Linear",
    "Producer",
    "SiteKind",
    "Sites",
    "UnmatchedLinear",
    "read_sites",
    "write_sites",
]

SITES_SCHEMA_VERSION: Final = 1

SiteKind = Literal["norm", "offset_norm", "gated_mlp"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Producer(_Model):
    """One initializer that is divided by the equalization scale s when a site is folded.

    With `offset` o (Gemma's norms compute x (o + w)): w' = (w + o) / s - o. Without: w' = w / s.
    """

    initializer: str
    axis: int
    """Axis of the initializer that runs along the equalized channels."""
    offset: float = 0.0


class FoldSite(_Model):
    """A place where x' = x / s is exact: the producers are divided by s, every consumer's input rows multiplied by s.

    Kinds: `norm`, a per-channel weight (and bias) that scales the tensor; `offset_norm`, the same with (1 + w);
    `gated_mlp`, a product whose `up` branch is a linear, so its output rows (and bias) are the producer.
    """

    id: str
    kind: SiteKind
    channels: int
    producers: tuple[Producer, ...]
    producer_linear: str | None = None
    """Path of the linear whose output rows are divided (`gated_mlp` only)."""
    consumers: tuple[str, ...]
    """Torch paths of every linear that reads the tensor."""


class Linear(_Model):
    """One linear of the model: y = x W^T + b, a MatMul with a constant right operand in the graph."""

    path: str
    """Torch module path, e.g. `model.layers.0.self_attn.q_proj`."""
    node: str
    """Name of the MatMul node."""
    weight: str
    """Initializer of the weight; [in, out], or [out, in] when `weight_transposed` (a weight tied to an embedding)."""
    weight_transposed: bool
    bias: str | None
    in_features: int
    out_features: int
    input: str
    """Value the node reads; linears with the same input share it."""
    site: str | None
    no_site_reason: str | None
    """Why the input has no exact fold site; None exactly when `site` is set."""


class UnmatchedLinear(_Model):
    """A linear of the model that the graph computes in a way the rewrites do not handle; it keeps its precision."""

    path: str
    in_features: int
    out_features: int
    reason: str


class Sites(_Model):
    """Everything trace learned about the linears of a graph."""

    schema_version: Literal[1] = SITES_SCHEMA_VERSION
    linears: tuple[Linear, ...]
    fold_sites: tuple[FoldSite, ...]
    unmatched: tuple[UnmatchedLinear, ...] = ()

    def linear(self, path: str) -> Linear:
        """The linear at a torch path. Raises KeyError when there is none."""
        for linear in self.linears:
            if linear.path == path:
                return linear
        raise KeyError(path)

    def site(self, site_id: str) -> FoldSite:
        """The fold site with an id. Raises KeyError when there is none."""
        for site in self.fold_sites:
            if site.id == site_id:
                return site
        raise KeyError(site_id)


def read_sites(path: Path) -> Sites:
    """Read `sites.json`. Raises UserErrors naming every field that is wrong."""
    return read_json_model(path, Sites)


def write_sites(sites: Sites, path: Path) -> None:
    """Write `sites.json` in one step."""
    write_json_model(sites, path)
