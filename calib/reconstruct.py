"""Block reconstruction: learn the rounding of all INT4 weights of a decoder block together, against the float block.

Layer by layer, rounding is chosen as if nothing but the layer itself were quantized. Here the loss is the output of the
whole block (BRECQ, arXiv 2102.05426): that of the quantized block for inputs that quantized blocks gave, against that
of the float block for inputs of the float model. So rounding also makes up for what INT8 inputs and earlier blocks
lose. It needs no labels: BRECQ weighs errors by the Fisher information of a task; here the error of each token is
relative to the token's own magnitude, as the norm that reads it next sees it:

    mean over tokens of |y - y_float|^2 / |y_float|^2

What is learned is as in AdaRound (arXiv 2004.10568) the rounding alone; scales stay. A variable v for each weight,
rounded to the code, starts at the code that is there, off its middle by what the weight is, up to `_MARGIN`: so codes
that error feedback moved on purpose stay unless the gradient says otherwise. Rounding passes gradients straight
through, for weights as for INT8 inputs (SignRound, arXiv 2309.05516, learns the same way, with the sign of the
gradient). So every step sees the codes that would be stored; AdaRound's relaxed codes need thousands of steps until
they are integers (in block 3 of SmolLM2, 60 steps left 0.89 of the loss of `gptq` with them, and 0.57 with these).

Codes are kept only if the loss over all the text is less than before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from calib.fake_quant import FakeQuantLinear
from fptq_export.numerics import INT8_MAX, INT8_MIN, PER_TOKEN_EPS
from fptq_export.packing import INT4_MAX, INT4_MIN
from fptq_export.progress import Task

__all__ = ["BlockProblem", "Reconstruction", "block_loss", "reconstruct"]

_MARGIN = 0.4
"""A code is half a step wide to each side; what lies within 0.1 of its edge would cross it by chance."""
_TRAVEL = 0.3
"""How far a variable comes, in codes, if every step moves it the same way: enough to leave the code it starts at."""


@dataclass(frozen=True)
class Start:
    """A linear before its rounding is learned; all on the CPU."""

    weight: torch.Tensor
    """float32 [out, in], equalized."""
    codes: torch.Tensor
    """int8 [out, in] in [-8, 7]."""
    scales: torch.Tensor
    """float16 [out, in/group_size]."""


@dataclass(frozen=True)
class BlockProblem:
    """A block whose rounding is learned."""

    block: nn.Module
    """Its linears are replaced while it is trained, and are those of before afterwards."""
    starts: Mapping[str, Start]
    """By path in the block; the linears there are `FakeQuantLinear`."""
    output: Callable[[nn.Module, int], torch.Tensor]
    """Runs the block on a batch of the text, differentiably."""
    target: Callable[[int], torch.Tensor]
    """What the float block makes of that batch, on the CPU."""
    batches: int


@dataclass(frozen=True)
class Reconstruction:
    """What was learned."""

    codes: Mapping[str, torch.Tensor]
    """Path in the block -> int8 [out, in] on the CPU."""
    loss_before: float
    loss_after: float
    """Of `codes`: never above that before."""


def reconstruct(problem: BlockProblem, steps: int, seed: int, task: Task) -> Reconstruction:
    """Learn the rounding of a block; the same seed gives the same codes.

    Args:
        problem: The block and its start.
        steps: Of Adam, a batch each, drawn without replacement until all have been.
        seed: Of the order of the batches.
        task: Counts the steps.
    """
    learned = {path: _learned(problem, path) for path in problem.starts}
    with _replaced(problem.block, learned):
        before = _loss(problem)
        _train(problem, list(learned.values()), steps, seed, task)
        after = _loss(problem)
    if after < before:
        return Reconstruction({path: linear.codes() for path, linear in learned.items()}, before, after)
    return Reconstruction({path: start.codes for path, start in problem.starts.items()}, before, before)


def block_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error, relative to the token: [..., hidden] -> scalar."""
    error = (output - target).square().sum(dim=-1)
    return (error / target.square().sum(dim=-1).clamp(min=torch.finfo(target.dtype).tiny)).mean()


def _learned(problem: BlockProblem, path: str) -> _LearnedLinear:
    linear = problem.block.get_submodule(path)
    assert isinstance(linear, FakeQuantLinear), path
    return _LearnedLinear(linear, problem.starts[path])


@contextmanager
def _replaced(block: nn.Module, learned: Mapping[str, _LearnedLinear]) -> Iterator[None]:
    before = {path: block.get_submodule(path) for path in learned}
    for path, linear in learned.items():
        block.set_submodule(path, linear)
    try:
        yield
    finally:
        for path, module in before.items():
            block.set_submodule(path, module)


def _loss(problem: BlockProblem) -> float:
    """Over all the text; the last batch may be smaller."""
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch in range(problem.batches):
            output = problem.output(problem.block, batch)
            count = output.shape[:-1].numel()
            total += float(block_loss(output, problem.target(batch).to(output.device))) * count
            tokens += count
    return total / tokens


def _train(problem: BlockProblem, learned: Sequence[_LearnedLinear], steps: int, seed: int, task: Task) -> None:
    """Adam, whose step falls linearly to zero."""
    variables = [linear.v for linear in learned]
    first = 2.0 * _TRAVEL / steps
    adam = torch.optim.Adam(variables, lr=first)
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        order = order or torch.randperm(problem.batches, generator=generator).tolist()
        batch = order.pop()
        with torch.enable_grad():
            output = problem.output(problem.block, batch)
            loss = block_loss(output, problem.target(batch).to(output.device))
            gradients = torch.autograd.grad(loss, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.grad = gradient
        adam.step()
        schedule.step()
        task.advance()


class _LearnedLinear(nn.Module):
    """A quantized linear whose codes follow a variable, as `FakeQuantLinear` runs it.

    Args:
        linear: Gives the bias and how the input is quantized.
        start: Weight and codes to begin with.
    """

    def __init__(self, linear: FakeQuantLinear, start: Start) -> None:
        super().__init__()
        self._linear = linear
        group_size = start.weight.shape[1] // start.scales.shape[1]
        steps = start.scales.to(torch.float32).repeat_interleave(group_size, dim=1)
        codes = start.codes.to(torch.float32)
        v = codes + (start.weight / steps - codes).clamp_(-_MARGIN, _MARGIN)
        self._steps = steps.to(linear.weight.device)
        self.v = nn.Parameter(v.to(linear.weight.device))

    def codes(self) -> torch.Tensor:
        """int8 [out, in] on the CPU."""
        return _rounded(self.v.detach(), INT4_MIN, INT4_MAX).to(torch.int8).cpu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out], differentiable by `v` and x."""
        values = x if self._linear.divisor is None else x / self._linear.divisor
        weight = _rounded(self.v, INT4_MIN, INT4_MAX) * self._steps
        bias = self._linear.bias
        if self._linear.activation is None:
            return F.linear(values, weight, bias)
        scale = self._linear.scale if self._linear.activation == "static" else _token_scale(values.detach())
        assert scale is not None
        # An input beyond the range of its scale is clipped: its gradient is zero.
        codes = _rounded((values / scale).clamp(INT8_MIN, INT8_MAX), INT8_MIN, INT8_MAX)
        y = F.linear(codes, weight) * scale
        return y if bias is None else y + bias


def _rounded(x: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """clip(rint(x), low, high), ties to even, with the gradient of x: exact, as close numbers subtract exactly."""
    return x + (x.detach().round().clamp_(low, high) - x.detach())


def _token_scale(x: torch.Tensor) -> torch.Tensor:
    return x.abs().amax(dim=-1, keepdim=True).clamp_(min=float(PER_TOKEN_EPS)) / INT8_MAX
