"""Experts as linears compute what transformers' stacked experts compute, or they are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fptq_export.errors import UserError
from fptq_export.experts.unstack import experts_of_linears, unstack_experts
from tests.support.experts import EXPERTS, tiny_mixtral, tiny_qwen3_moe

FLOAT64_SUM = 1e-12
"""Relative to the largest output: two float64 programs of three sums of at most 128 terms in a row, each off by at most
128 x 2^-53; measured 4e-16."""
TOKENS = 9
BOTH = pytest.mark.parametrize("static", [False, True], ids=["routed", "static"])


class Block(nn.Module):
    """Experts where a model has them: below a module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def stacked(kind: type[nn.Module] = MixtralExperts, config: Any = None) -> Any:
    """Random experts in float64."""
    config = config or tiny_mixtral()
    config._experts_implementation = "eager"
    experts = kind(config).double()
    random = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.2, generator=random)
    return experts.requires_grad_(False)


def unstacked(experts: nn.Module, *, static: bool) -> Any:
    block = Block(copy.deepcopy(experts))
    assert unstack_experts(block, static=static) == ("experts",)
    return block.experts


def routing(*experts: int, k: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random tokens, each of which chooses k of some experts, with random weights."""
    random = torch.Generator().manual_seed(2)
    x = torch.randn(TOKENS, 64, generator=random, dtype=torch.float64)
    among = torch.tensor(experts)
    index = torch.stack([among[torch.randperm(len(experts), generator=random)[:k]] for _ in range(TOKENS)])
    return x, index, torch.rand(TOKENS, k, generator=random, dtype=torch.float64)


@BOTH
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3), (0, 3), (1, 1)], ids=["all", "two left empty", "one alone, twice"])
def test_output_is_that_of_the_stacked_experts(chosen: tuple[int, ...], static: bool) -> None:
    """In float64, whichever experts the tokens choose; experts that none chooses add nothing."""
    experts = stacked()
    arguments = routing(*chosen)
    expected = experts(*arguments)
    given = unstacked(experts, static=static)(*arguments)
    assert (given - expected).abs().max() <= FLOAT64_SUM * expected.abs().max()


@pytest.mark.parametrize("config", [tiny_mixtral, tiny_qwen3_moe], ids=["mixtral", "qwen3-moe"])
@BOTH
def test_logits_are_those_of_the_stacked_model(config: Any, static: bool) -> None:
    """The whole model, with its own router: the module is called as transformers' experts are."""
    settings = config()
    settings._experts_implementation = "eager"
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(settings, dtype=torch.float64).eval()
    ids = torch.arange(24).reshape(2, 12)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        assert len(unstack_experts(model, static=static)) == settings.num_hidden_layers
        given = model(input_ids=ids).logits
    assert (given - expected).abs().max() <= FLOAT64_SUM * expected.abs().max()


def test_experts_that_overflow_on_tokens_of_others_do_no_harm() -> None:
    """0 x Inf is NaN: in the static program, what an expert gives for a token that is not its own is dropped."""
    experts = stacked()
    experts.down_proj[2] = torch.inf
    given = unstacked(experts, static=True)(*routing(0, 1))
    assert given.isfinite().all()


def test_routed_linears_see_their_own_tokens_only() -> None:
    """A hook on a linear sees as many rows as tokens chose its expert; an expert that none chose never runs."""
    experts = unstacked(stacked(), static=False)
    x, index, weights = routing(0, 1, 3)
    rows = [0] * EXPERTS
    for number, expert in enumerate(experts):
        expert.down_proj.register_forward_pre_hook(
            lambda _, args, number=number: rows.__setitem__(number, rows[number] + len(args[0]))
        )
    experts(x, index, weights)
    assert rows == [int((index == number).any(dim=1).sum()) for number in range(EXPERTS)]
    assert rows[2] == 0


def test_weights_are_views_of_the_stack() -> None:
    """Taking a stack apart copies nothing: a checkpoint in memory stays a memory map."""
    stack = stacked()
    storage, block = stack.gate_up_proj.untyped_storage().data_ptr(), Block(stack)
    unstack_experts(block, static=False)
    assert block.get_parameter("experts.3.up_proj.weight").untyped_storage().data_ptr() == storage


def test_linears_are_told_with_their_experts() -> None:
    """Twelve linears of four experts, by torch path."""
    block = Block(stacked())
    unstack_experts(block, static=False)
    found = experts_of_linears(block)
    assert len(found) == 3 * EXPERTS
    assert found["experts.2.down_proj"] == "experts.2"


@use_experts_implementation
class ClampedForward(MixtralExperts):
    """Marked as plain, but its own code does more."""

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Nothing that has to do with the weights."""
        del index, weights
        return x.clamp(-1.0, 1.0)


@use_experts_implementation
class OtherArguments(MixtralExperts):
    """Called with something else than tokens and choices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override] # as other models' experts have it
        """The input."""
        return x


@use_experts_implementation
class OwnGate(MixtralExperts):
    """Its gate is limited, as that of DeepSeek-V4."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        limited: torch.Tensor = self.act_fn(gate.clamp(max=7.0)) * up
        return limited


@use_experts_implementation
class Scaled(MixtralExperts):
    """Has a tensor that a sum of gated experts does not have."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.per_expert_scale = nn.Parameter(torch.ones(EXPERTS))


MARKED = {
    "bias": ({"has_bias": True}, "its experts have biases"),
    "no gate": ({"has_gate": False}, "its experts have no gate"),
    "interleaved": ({"is_concatenated": False}, "gate and up rows are interleaved"),
    "transposed": ({"is_transposed": True}, r"its weights are stored \[in, out\]"),
    "norm": ({"has_post_expert_norm": True}, "a norm follows each expert"),
}


@pytest.mark.parametrize("mark", MARKED)
def test_experts_with_other_marks_are_refused(mark: str) -> None:
    """What transformers notes of a class (biases, layout, norm) is refused with its reason and the module."""
    marks, reason = MARKED[mark]
    block = Block(stacked())
    for name, value in marks.items():
        setattr(block.experts, name, value)
    with pytest.raises(UserError, match=reason) as caught:
        unstack_experts(block, static=True)
    assert caught.value.where == "module experts"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (ClampedForward, "its forward computes something else"),
        (OtherArguments, "its forward cannot be run for comparison"),
        (OwnGate, r"its gate is not act\(gate\) \* up"),
        (Scaled, "it has the tensors down_proj, gate_up_proj, per_expert_scale"),
    ],
)
def test_experts_of_other_code_are_refused(kind: type[nn.Module], reason: str) -> None:
    """Marks are not believed alone: the module's own code is run, small, beside ours."""
    with pytest.raises(UserError, match=reason):
        unstack_experts(Block(stacked(kind)), static=True)


def test_what_is_no_experts_module_is_left_alone() -> None:
    """A convolution has a weight of three dimensions too, and a dense MLP has none."""
    block = nn.ModuleDict({"conv": nn.Conv1d(4, 4, 3), "mlp": nn.Linear(4, 4)})
    modules = dict(block.named_modules())
    assert unstack_experts(block, static=True) == ()
    assert all(modules[path] is module for path, module in block.named_modules())
