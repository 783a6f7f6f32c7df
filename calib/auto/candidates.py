"""What a linear could run, and what each of it does to its output on real inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from calib.auto.probe import Probe
from calib.equalize import LinearScales, closed_form_scale, equalized_weight
from calib.fake_quant import quantize_per_token, quantize_static
from calib.weights import WEIGHT_METHODS, WeightProblem
from calib.weights.per_channel import quantize_int8
from fptq_export.policy import GROUP_SIZES, Activation, CandidateFigures, Precision, WeightMethod
from fptq_export.sites import Linear

__all__ = ["Candidate", "LinearProblem", "candidates_from_linear", "figures_from_candidates", "figures_without_probe"]

_TIERS: Sequence[Activation] = ("static", "lae_static", "per_token")


@dataclass(frozen=True)
class Candidate:
    """One way to run a linear."""

    precision: Precision
    activation: Activation | None
    group_size: int | None


@dataclass(frozen=True)
class LinearProblem:
    """What candidates of one linear are measured on."""

    linear: Linear
    probe: Probe
    weight: torch.Tensor
    """float32 [out, in]."""
    hessian: torch.Tensor | None
    """float32 [in, in] of the input, where the weight method needs it."""
    lae: NDArray[np.float32] | None
    """LAE scales of the input's fold site, float32 [in]; None where the tier `lae_static` is not open."""
    static_scale: float
    """INT8 scale of the input for the tier `static`."""
    absmax: float
    """v of the input, for the closed form of `lae_static`."""
    weight_method: WeightMethod
    signed_scales: bool

    def equalized(self, scales: LinearScales) -> LinearProblem:
        """The same linear at equalized sites: x / s, W s / s_out. Errors of y / s_out weigh s_out^2 times as much."""
        probe, hessian = self.probe, self.hessian
        if scales.input is not None:
            s = torch.from_numpy(scales.input)
            probe = replace(probe, inputs=probe.inputs / s)
            hessian = None if hessian is None else hessian / s[:, None] / s
        if scales.output is not None:
            probe = replace(probe, channel_weights=probe.channel_weights * torch.from_numpy(scales.output).square())
        return replace(self, probe=probe, hessian=hessian, weight=equalized_weight(self.weight, scales))


def candidates_from_linear(linear: Linear, smallest_group: int, *, lae: bool) -> Iterator[Candidate]:
    """W4A8 with every group size, and W8A8, each with every tier that the linear's input can have.

    W4A16 is none: it has the bytes of W4A8 and gives up INT8 products, which a time for one token does not show.

    Args:
        linear: The linear.
        smallest_group: Smallest group size.
        lae: Whether the tier `lae_static` is open.
    """
    tiers = [tier for tier in _TIERS if lae or tier != "lae_static"]
    for size in GROUP_SIZES:
        if size >= smallest_group and linear.in_features % size == 0:
            yield from (Candidate("w4a8", tier, size) for tier in tiers)
    yield from (Candidate("w8a8", tier, None) for tier in tiers)


def figures_from_candidates(
    problem: LinearProblem, candidates: Sequence[Candidate], decode_s: Sequence[float]
) -> tuple[CandidateFigures, ...]:
    """Measure every candidate on the probe's inputs.

    Args:
        problem: The linear.
        candidates: At least one.
        decode_s: Seconds of each candidate for one token, modelled or measured.

    Returns:
        Figures in the order of the candidates.

    Raises:
        ValueError: The weight method cannot quantize the weight.
    """
    exact = problem.probe.inputs @ problem.weight.T
    power = float(exact.square().sum())
    weights: dict[tuple[Precision, int | None, bool], torch.Tensor] = {}
    figures = []
    for candidate, seconds in zip(candidates, decode_s, strict=True):
        equalized = candidate.activation == "lae_static"
        key = (candidate.precision, candidate.group_size, equalized)
        if key not in weights:
            weights[key] = _dequantized(problem, candidate)
        error = _quantized_input(problem, candidate) @ weights[key].T - exact
        noise = float(error.square().sum())
        figures.append(
            CandidateFigures(
                precision=candidate.precision,
                activation=candidate.activation,
                group_size=candidate.group_size,
                sqnr_db=10.0 * math.log10(power / noise) if noise > 0 and power > 0 else None,
                predicted_kl=problem.probe.kl_of(error),
                bits_per_weight=_bits(problem.linear, candidate),
                decode_us=1e6 * seconds,
            )
        )
    return tuple(figures)


def figures_without_probe(
    linear: Linear, candidates: Sequence[Candidate], decode_s: Sequence[float]
) -> tuple[CandidateFigures, ...]:
    """Figures of a linear that the probed text did not reach, of an expert: its errors are not known and count 0."""
    return tuple(
        CandidateFigures(
            precision=candidate.precision,
            activation=candidate.activation,
            group_size=candidate.group_size,
            sqnr_db=None,
            predicted_kl=0.0,
            bits_per_weight=_bits(linear, candidate),
            decode_us=1e6 * seconds,
        )
        for candidate, seconds in zip(candidates, decode_s, strict=True)
    )


def _bits(linear: Linear, candidate: Candidate) -> float:
    """As `LayerPolicy.bits_per_weight`."""
    return 8.0 + 32.0 / linear.in_features if candidate.group_size is None else 4.0 + 16.0 / candidate.group_size


def _scales(problem: LinearProblem, candidate: Candidate) -> torch.Tensor | None:
    if candidate.activation != "lae_static":
        return None
    assert problem.lae is not None
    return torch.from_numpy(problem.lae)


def _dequantized(problem: LinearProblem, candidate: Candidate) -> torch.Tensor:
    """The (equalized) weight after quantization, float32 [out, in]."""
    weight, hessian, s = problem.weight, problem.hessian, _scales(problem, candidate)
    if s is not None:
        weight = weight * s
        hessian = None if hessian is None else hessian / s[:, None] / s
    if candidate.group_size is None:
        int8_codes, channel_scales = quantize_int8(weight)
        return int8_codes.to(torch.float32).mul_(channel_scales[:, None])
    quantized = WEIGHT_METHODS[problem.weight_method].quantize(
        WeightProblem(weight, candidate.group_size, hessian, signed_scales=problem.signed_scales)
    )
    groups = quantized.codes.to(torch.float32).reshape(len(weight), -1, candidate.group_size)
    return groups.mul_(quantized.scales.to(torch.float32)[..., None]).reshape(weight.shape)


def _quantized_input(problem: LinearProblem, candidate: Candidate) -> torch.Tensor:
    """The (equalized) input after INT8 quantization, as floats [rows, in]."""
    x, s = problem.probe.inputs, _scales(problem, candidate)
    if s is not None:
        x = x / s
    if candidate.activation is None:
        return x
    if candidate.activation == "per_token":
        codes, scale = quantize_per_token(x)
        return codes * scale
    static = problem.static_scale if s is None else closed_form_scale(problem.absmax, equalized=True)
    step = torch.tensor(static, dtype=torch.float32)
    return quantize_static(x, step) * step
