"""`proof.json`: for every entry of the policy, the engine layer that runs it and the precision of both operands.

| verdict | meaning |
|---|---|
| `proven` | the layer list shows both operands as the policy says |
| `partly` | it shows the weights; how the activations were rounded it does not show |
| `float_arithmetic` | the codes are the policy's, the arithmetic is float: no INT8 kernel transposes a convolution |
| `not_shown` | the policy leaves it in float, and no layer of the list names it |
| `failed` | missing, of another size, widened, or block-INT4 weights met INT8 activations |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from fptq_export.build.engine_facts import EngineFacts
from fptq_export.build.findings import Findings, PrecisionProblem
from fptq_export.build.int8_convolutions import Int8Convolution, find_int8_convolutions, is_of_convolution
from fptq_export.build.int8_layers import find_int8_linears
from fptq_export.build.layer_list import EngineLayer, find_int4_linears
from fptq_export.build.operands import LayerList, Operands, float_operands, operands_of
from fptq_export.policy import ConvolutionPolicy, LayerPolicy, Policy

__all__ = ["LIMITS", "Expected", "Proof", "ProofEntry", "Verdict", "find_all", "proof_from_layers"]

Verdict = Literal["proven", "partly", "float_arithmetic", "not_shown", "failed"]

LIMITS = (
    "names, shapes and data types are shown, values are not: codes and scales are proven by the checks of the graph",
    "INT8 activations of an INT4 GEMM are values that were rounded to INT8 and are multiplied in float",
    "TensorRT for RTX compiles its kernels when the engine is loaded, from the types listed here",
)
"""What a layer list cannot show."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Expected(_Model):
    """What the layer list was compared with: the policy, as the graph was lowered."""

    int4: dict[str, int] = Field(default_factory=dict)
    """INT4 codes of each linear, by path; fused linears are one, by their common path."""
    int8: dict[str, int] = Field(default_factory=dict)
    """INT8 codes of each `w8a8` linear."""
    convolutions: dict[str, Int8Convolution] = Field(default_factory=dict)
    plugin: dict[str, str] = Field(default_factory=dict)
    """Path -> operator of the plugin that must run it."""
    fused: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Common path -> torch paths."""
    profiles: int = 1
    """Optimization profiles; each has its own copy of every layer."""


class ProofEntry(_Model):
    """One entry of the policy."""

    layer: str
    kind: Literal["linear", "convolution"]
    policy: str
    """What the policy says: `w4a8 static g64`, `w8a8 per_token`, `float`."""
    engine_layers: tuple[str, ...]
    """Names of the engine's layers that run it; one a profile, or with the layer that dequantizes its weight."""
    weights: str
    """Precision of the weights in the engine."""
    activation: str
    """Precision of the activations they are multiplied by."""
    verdict: Verdict
    evidence: tuple[str, ...]
    """What the layer list shows, in words."""


class Proof(_Model):
    """`proof.json`."""

    schema_version: Literal[1] = 1
    source: str
    """Where the layers were read: the builder's log, or the inspector of an engine that was opened."""
    policy_sha256: str
    """Of `policy.json` when the engine was built."""
    engine: EngineFacts
    expected: Expected
    layers: tuple[ProofEntry, ...]
    problems: tuple[str, ...] = ()
    limits: tuple[str, ...] = LIMITS

    def verdicts(self) -> dict[Verdict, int]:
        """How many layers have each verdict."""
        return dict(Counter(entry.verdict for entry in self.layers))


def find_all(
    layers: Sequence[EngineLayer], expected: Expected
) -> tuple[dict[str, Sequence[EngineLayer]], list[PrecisionProblem]]:
    """Who holds the codes of each quantized linear and convolution, and everything that is wrong with that."""
    others = [layer for layer in layers if not is_of_convolution(layer, expected.convolutions)]
    found: tuple[Findings, ...] = (
        find_int4_linears(layers, expected.int4, expected.profiles, expected.plugin),
        find_int8_linears(others, expected.int8, expected.profiles),
        find_int8_convolutions(layers, expected.convolutions, expected.profiles),
    )
    holders = {path: layers for findings in found for path, layers in findings.holders.items()}
    return holders, [problem for findings in found for problem in findings.problems]


def proof_from_layers(
    layers: Sequence[EngineLayer],
    expected: Expected,
    policy: Policy,
    nodes: Mapping[str, str],
    *,
    source: str,
    policy_sha256: str,
    engine: EngineFacts,
) -> Proof:
    """Match every entry of a policy to the layers that run it.

    Args:
        layers: Layers of the engine.
        expected: What they are compared with.
        policy: The policy.
        nodes: Node of each linear and convolution in the graph before it was quantized, by path.
        source: Where the layers come from.
        policy_sha256: Hash of the policy's file.
        engine: What the engine was built for.

    Returns:
        The proof, also where it fails: then with `problems`, and with the verdict `failed` at each layer concerned.
    """
    holders, problems = find_all(layers, expected)
    listed = LayerList(layers, policy)
    joint = {path: common for common, paths in expected.fused.items() for path in paths}
    failed: dict[str, list[str]] = {}
    for problem in problems:
        for path in problem.paths:
            failed.setdefault(path, []).append(problem.message)
    entries = []
    policies: dict[str, LayerPolicy | ConvolutionPolicy] = {**policy.layers, **policy.convolutions}
    for path, entry in policies.items():
        common = joint.get(path, path)
        if common in failed or (entry.precision != "float" and not holders.get(common)):
            messages = failed.get(common, [f"{path}: the engine was not built with codes for it"])
            entries.append(_failed_entry(path, entry, holders.get(common, ()), messages))
            continue
        if entry.precision == "float":
            operands = float_operands(listed, path, nodes.get(path))
        else:
            operands = operands_of(listed, path, common, holders[common], expected.plugin.get(common))
        entries.append(_entry(path, entry, operands))
    return Proof(
        source=source,
        policy_sha256=policy_sha256,
        engine=engine,
        expected=expected,
        layers=tuple(entries),
        problems=tuple(str(problem) for problem in problems),
    )


def _entry(path: str, entry: LayerPolicy | ConvolutionPolicy, operands: Operands) -> ProofEntry:
    return ProofEntry(
        layer=path,
        kind=_kind(entry),
        policy=_runs(entry),
        engine_layers=operands.layers,
        weights=operands.weights,
        activation=operands.activation,
        verdict=operands.verdict,
        evidence=operands.evidence,
    )


def _failed_entry(
    path: str, entry: LayerPolicy | ConvolutionPolicy, holders: Sequence[EngineLayer], messages: Sequence[str]
) -> ProofEntry:
    return ProofEntry(
        layer=path,
        kind=_kind(entry),
        policy=_runs(entry),
        engine_layers=tuple(layer.name for layer in holders),
        weights="not as the policy says",
        activation="not as the policy says",
        verdict="failed",
        evidence=tuple(messages),
    )


def _kind(entry: LayerPolicy | ConvolutionPolicy) -> Literal["linear", "convolution"]:
    return "linear" if isinstance(entry, LayerPolicy) else "convolution"


def _runs(entry: LayerPolicy | ConvolutionPolicy) -> str:
    return entry.runs if isinstance(entry, LayerPolicy) else entry.precision
