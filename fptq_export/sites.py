"""`sites.json`: which linears and convolutions the graph has, what each reads, and where an equalization can be folded.

Written by trace, read by calibration (which linears share an input and may be equalized) and by the rewrites (which
node and which initializers to touch).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from fptq_export.files import read_json_model, write_json_model

__all__ = [
    "SITES_SCHEMA_VERSION",
    "Convolution",
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

SiteKind = Literal["norm", "offset_norm", "gated_mlp", "relu_mlp", "attention_value"]
Vector = NDArray[np.float32]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Producer(_Model):
    """One initializer that is divided by the equalization scale s when a site is folded.

    With `offset` o (Gemma's norms compute x (o + w)): w' = (w + o) / s - o. Without: w' = w / s. With `span` only that
    part of the initializer is divided: q, k and v, or gate and up, may be one matrix.
    """

    initializer: str
    axis: int
    """Axis of the initializer that runs along the equalized channels."""
    offset: float = 0.0
    span: tuple[NonNegativeInt, PositiveInt] | None = None
    """First index along `axis` that is divided, and the one after the last; None for all."""


class FoldSite(_Model):
    """A place where x' = x / s is exact: the producers are divided by s, every consumer's input rows multiplied by s.

    Kinds: `norm`, a per-channel weight (and bias) that scales the tensor; `offset_norm`, the same with (1 + w);
    `gated_mlp`, a product whose `up` branch is a linear, so its output rows (and bias) are the producer.

    Two kinds are extensions that the FPTQ rule does not use, so `Linear.site` does not name them: `relu_mlp`, ReLU of a
    linear; `attention_value`, attention whose values are a linear. Query heads that share a value head share its
    channels there, so their s are equal, and a cache of values holds v / s.
    """

    id: str
    kind: SiteKind
    channels: int
    producers: tuple[Producer, ...]
    producer_linear: str | None = None
    """Path of the linear whose output rows are divided; None for norms."""
    consumers: tuple[str, ...]
    """Torch paths of every linear that reads the tensor."""
    repeats: PositiveInt = 1
    """How many query heads in a row read one value head (`attention_value` only)."""
    head_dim: PositiveInt | None = None
    """Channels of a head, where heads repeat."""

    def tied(self, s: Vector) -> Vector:
        """The s that the site allows: the largest of each group of channels that come from one producer row.

        Args:
            s: float32 [channels].
        """
        if self.head_dim is None:
            return s
        heads = s.reshape(-1, self.repeats, self.head_dim)
        return np.repeat(heads.max(axis=1), self.repeats, axis=0).reshape(heads.shape).reshape(-1)

    def producer_scale(self, s: Vector) -> Vector:
        """What the producer (its span) is divided by, float32 [producer rows], for a tied s, float32 [channels]."""
        return s if self.head_dim is None else s.reshape(-1, self.repeats, self.head_dim)[:, 0].reshape(-1)


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
    """Fold site that the FPTQ rule may use; an extension site names the linear among its consumers only."""
    no_site_reason: str | None
    """Why the input has no exact fold site; None exactly when `site` is set."""
    expert: str | None = None
    """Path of the expert it belongs to, e.g. `model.layers.0.mlp.experts.3`: only tokens that chose it count for it."""
    float_reason: str | None = None
    """Why it must keep the float precision; None for a linear that may be quantized."""


class UnmatchedLinear(_Model):
    """A linear of the model that the graph computes in a way the rewrites do not handle; it keeps its precision."""

    path: str
    in_features: int
    out_features: int
    reason: str


class Convolution(_Model):
    """One Conv or ConvTranspose of a graph that a user gave; traced models have none."""

    path: str
    node: str
    """Name of the node."""
    op_type: Literal["Conv", "ConvTranspose"]
    weight: str
    """Initializer of the weight; the name of another value where the weight is computed."""
    weight_shape: tuple[int, ...]
    """[out, in/group, kernel...]; of a ConvTranspose [in, out/group, kernel...]. Empty where it is not known."""
    input: str
    """Value the node reads."""
    float_reason: str | None = None
    """Why it must keep the float precision; None for one that may be quantized."""

    @property
    def channel_axis(self) -> int:
        """Axis of the weight that runs along output channels; all of them where the convolution may be quantized."""
        return 1 if self.op_type == "ConvTranspose" else 0


class Sites(_Model):
    """Everything trace learned about the linears of a graph."""

    schema_version: Literal[1] = SITES_SCHEMA_VERSION
    linears: tuple[Linear, ...]
    fold_sites: tuple[FoldSite, ...]
    unmatched: tuple[UnmatchedLinear, ...] = ()
    convolutions: tuple[Convolution, ...] = Field(default=(), exclude_if=lambda found: not found)
    max_sequence: PositiveInt | None = None
    """Most tokens of a sequence that the graph takes, where tracing found a limit (a table of positions)."""
    outside: tuple[str, ...] = Field(default=(), exclude_if=lambda found: not found)
    """Torch paths of the modules that the graph is not meant to hold: vision tower and projector of a language half."""

    def linear(self, path: str) -> Linear:
        """The linear at a torch path. Raises KeyError when there is none."""
        for linear in self.linears:
            if linear.path == path:
                return linear
        raise KeyError(path)

    def paths(self) -> list[str]:
        """Paths of all linears that may be quantized, then of all convolutions."""
        return [*(linear.path for linear in self.linears), *(found.path for found in self.convolutions)]

    def site_by_consumer(self) -> dict[str, str]:
        """Path of a linear -> id of the fold site that it reads, extensions included."""
        return {path: site.id for site in self.fold_sites for path in site.consumers}

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
