"""`debug.json`: what was measured of each quantized linear, and what is wrong with it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from fptq_export.verify.perplexity import PerplexityFigures

__all__ = ["DEBUG_SCHEMA_VERSION", "DebugReport", "Fault", "FaultKind", "LayerReport", "LeaveOneOut", "Match"]

DEBUG_SCHEMA_VERSION: Literal[1] = 1

FaultKind = Literal["codes", "group_scales", "fold", "activation_scale", "input", "overflow", "error"]
"""`codes`, `group_scales`: not those that belong to the weight. `fold`: the weight lacks the scale of its fold site, or
has it twice. `activation_scale`: inputs do not fit it, or it is not the policy's. `input`: what the nodes before the
layer compute is not its input. `overflow`: beyond the largest number of the graph's type. `error`: the output is
further off than rounding explains."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Match(_Model):
    """How close a tensor is to its reference; null where it is not finite, or the reference is zero."""

    sqnr_db: float | None
    """10 log10 of the reference's power over that of the difference; infinite where they are equal."""
    cosine: float | None
    """Of all elements as one vector."""


class Fault(_Model):
    """Something that is wrong with a layer."""

    kind: FaultKind
    message: str


class LeaveOneOut(_Model):
    """The quantized graph with this layer alone in float, against the graph as it is. Null where it is not finite."""

    perplexity: float | None
    nll_gain: float | None
    """Nats a token that the text is predicted better; negative where it is predicted worse."""
    nll_gain_stderr: float | None
    """Standard error of that over the tokens: a gain of less than twice this says nothing."""
    kl_gain: float | None
    """Nats a token by which the prediction comes closer to the float model's."""


class LayerReport(_Model):
    """One quantized linear. Tensors are compared in the scale of the float model, biases left out."""

    block: NonNegativeInt | None
    """Decoder block; null outside of them."""
    runs: str
    weight_sqnr_db: float | None
    """Dequantized weight of the graph against the float weight times its fold scales."""
    fp_inputs: Match
    """(a) The graph's layer on the float model's input: its output against the float one."""
    predicted_sqnr_db: float | None
    """Of the same, from the steps of INT4 and INT8 alone (`judge`)."""
    accumulated: Match | None
    """(b) Its output in the graph, behind the errors of all layers before it. Null for experts, whose tokens differ."""
    input: Match | None
    """Its input where every quantized linear of its block is in float: what norms, folds and attention do to it."""
    input_is_wrong: bool
    """Whether that is off by more than rounding. Inputs behind a wrong one in the same block are not judged."""
    saturated: float | None
    """Share of inputs beyond the static INT8 range, in the graph; null for other activations."""
    input_absmax: float
    """Largest magnitude that it reads in the float model, in the graph's scale (after folding)."""
    input_limit: float | None
    """Largest magnitude that its static scale covers."""
    leave_one_out: LeaveOneOut | None
    faults: tuple[Fault, ...]


class DebugReport(_Model):
    """`debug.json`."""

    schema_version: Literal[1] = DEBUG_SCHEMA_VERSION
    tool_version: str
    command: str
    environment: dict[str, str]
    model: str
    text: str
    text_sha256: str
    """Of the token ids."""
    windows: PositiveInt
    window_tokens: PositiveInt
    max_excess_db: float
    changed_files: tuple[str, ...]
    """Files of the run that are not what its manifest says."""
    float_perplexity: PerplexityFigures
    graph_perplexity: PerplexityFigures | None
    """Null where the graph's logits are not finite."""
    graph_kl: float | None
    """KL divergence of the graph's prediction from the float model's, nats a token."""
    layers: dict[str, LayerReport]
    """By torch path, in the order in which the graph runs them."""
    bad_layers: tuple[str, ...]
    """Those with faults, the first bad layer first."""
    seconds: float
    peak_memory_bytes: int
