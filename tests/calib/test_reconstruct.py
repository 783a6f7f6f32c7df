"""Learned rounding of a block: exact at its start, never worse at its end, and always INT4."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import calib.reconstruct
from calib.fake_quant import FakeQuantLinear
from calib.reconstruct import BlockProblem, Reconstruction, Start, block_loss, reconstruct
from calib.weights import WeightProblem
from calib.weights.rtn import quantize_rtn
from tests.support.checkpoints import CountingProgress

WIDTH, TOKENS, BATCHES, GROUP, STEPS = 32, 64, 3, 16, 40
FLOAT64_BOUND = 2.0**-18
"""Relative difference of a loss in float32 and in float64: sums of 32 and of 32 x 64 terms, random roundings of 2^-24
that errors of a tenth of the values enlarge tenfold."""


class _Block(nn.Module):
    """Two linears with a bend between them, and a residual."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return x + y


class _Case:
    """A block quantized by rounding to nearest, its inputs, and what the float block makes of other inputs."""

    def __init__(self, activation: str | None = "per_token") -> None:
        generator = torch.Generator().manual_seed(0)
        weights = {name: torch.randn(WIDTH, WIDTH, generator=generator) / 4 for name in ("first", "second")}
        bias = torch.randn(WIDTH, generator=generator)
        exact = _Block(*(FakeQuantLinear(weight, bias, activation=None) for weight in weights.values()))
        clean = torch.randn(BATCHES, TOKENS, WIDTH, generator=generator)
        self.inputs = clean + 0.02 * torch.randn(clean.shape, generator=generator)
        self.targets = exact(clean)
        self.starts = {}
        scale = 0.02 if activation == "static" else None
        runs: dict[str, FakeQuantLinear] = {}
        for name, weight in weights.items():
            quantized = quantize_rtn(WeightProblem(weight, GROUP))
            self.starts[name] = Start(weight, quantized.codes, quantized.scales)
            runs[name] = FakeQuantLinear(
                dequantized(quantized.codes, quantized.scales),
                bias,
                activation=activation,  # type: ignore[arg-type]
                scale=scale,
            )
        self.block = _Block(**runs)

    def problem(self) -> BlockProblem:
        return BlockProblem(
            self.block, self.starts, lambda block, batch: block(self.inputs[batch]), lambda b: self.targets[b], BATCHES
        )

    def learn(self, steps: int = STEPS, seed: int = 0) -> Reconstruction:
        progress = CountingProgress()
        with progress.task("learn", steps) as task:
            found = reconstruct(self.problem(), steps, seed, task)
        assert progress.done == progress.totals
        return found

    def loss_of(self, codes: dict[str, torch.Tensor]) -> float:
        """Written out in float64 with `FakeQuantLinear` alone, the relative error of every token."""
        runs = {name: getattr(self.block, name) for name in codes}
        for name, linear in runs.items():
            linear.weight.copy_(dequantized(codes[name], self.starts[name].scales))
        error = (self.block(self.inputs).double() - self.targets.double()).norm(dim=-1)
        return float((error / self.targets.double().norm(dim=-1)).square().mean())


def dequantized(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes.float() * scales.float().repeat_interleave(GROUP, dim=1)


@pytest.mark.parametrize("activation", ["per_token", "static", None])
def test_learned_codes_are_better_and_the_losses_are_those_of_the_block(activation: str | None) -> None:
    """Both losses are what the quantized linears of the policy give for the codes: nothing is learned on a fiction."""
    case = _Case(activation)
    found = case.learn()
    starts = {name: start.codes for name, start in case.starts.items()}
    assert found.loss_before == pytest.approx(case.loss_of(starts), rel=FLOAT64_BOUND, abs=0.0)
    assert found.loss_after == pytest.approx(case.loss_of(dict(found.codes)), rel=FLOAT64_BOUND, abs=0.0)
    assert found.loss_after < 0.9 * found.loss_before


def test_codes_stay_int4_neighbours_of_the_start() -> None:
    """A variable that runs away would wrap when codes are packed."""
    case = _Case()
    found = case.learn()
    for name, codes in found.codes.items():
        assert codes.dtype == torch.int8
        assert codes.min() >= -8
        assert codes.max() <= 7
        assert (codes - case.starts[name].codes).abs().max() == 1


def test_codes_at_the_ends_of_the_range_stay_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights far beyond the range push outwards; long steps must not leave [-8, 7] either."""
    monkeypatch.setattr(calib.reconstruct, "_TRAVEL", 20.0)
    case = _Case()
    for name, start in case.starts.items():
        case.starts[name] = Start(3.0 * start.weight, (3 * start.codes).clamp(-8, 7), start.scales)
    for codes in case.learn().codes.values():
        assert codes.min() >= -8
        assert codes.max() <= 7


def test_worse_codes_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that overshoot must leave the start bit for bit, with its loss."""
    monkeypatch.setattr(calib.reconstruct, "_TRAVEL", 1000.0)
    case = _Case()
    found = case.learn(steps=2)
    assert all(torch.equal(found.codes[name], start.codes) for name, start in case.starts.items())
    assert found.loss_after == found.loss_before


def test_same_seed_gives_the_same_codes_and_the_block_is_as_before() -> None:
    """A run can be repeated; and its linears are back in their places, untouched."""
    case = _Case()
    before = {name: module.get_parameter("weight").clone() for name, module in case.block.named_children()}
    first, second = case.learn(), case.learn()
    other = case.learn(seed=1)
    assert all(torch.equal(first.codes[name], second.codes[name]) for name in case.starts)
    assert not all(torch.equal(first.codes[name], other.codes[name]) for name in case.starts)
    for name, module in case.block.named_children():
        assert isinstance(module, FakeQuantLinear)
        assert torch.equal(module.weight, before[name])


def test_loud_tokens_count_no_more_than_others() -> None:
    """One token a thousand times as large, as LLMs have them, must not be all that is learned."""
    target = torch.ones(2, 4)
    target[1] *= 1000.0
    assert float(block_loss(target * 1.1, target)) == pytest.approx(0.01, rel=FLOAT64_BOUND, abs=0.0)
    assert float(block_loss(torch.zeros(2, 4), torch.zeros(2, 4))) == 0.0
